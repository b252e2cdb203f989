/* What sampling a row is made of: scans, penalties, candidates, draws. Inside the sampling files of
 * the CPU backend, once per instruction set.
 *
 * A restricted draw (top-k, top-p, min-p) keeps a prefix of the tokens ordered by logit, highest
 * first, lowest id first among equals. Nothing is sorted: candidates are gathered in the order of
 * their ids above a cut that is far enough down, a radix select finds the last one of the prefix,
 * and the draw walks those kept in the order of ids. Probabilities are float32, their sums double.
 */
#ifndef QV_OPS_CPU_SAMPLE_ROW_H
#define QV_OPS_CPU_SAMPLE_ROW_H

#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"
#include "ops/philox.h"

#include <float.h>

#define BLOCK QV_SAMPLE_BLOCK

/* --- Whole rows --------------------------------------------------------------------------- */

/* The maximum of n logits; *finite whether all of them are numbers. x - x is 0 for a number and NaN
 * for an infinity or a NaN, and sums of either stay so. */
static inline float scan(const float *logit, int64_t n, bool *finite)
{
    v16 max = v_set1(-INFINITY), zero = v_zero();
    int64_t whole = n / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) {
        v16 x = v_load(logit + i);
        max = v_max(max, x);
        zero = v_add(zero, v_sub(x, x));
    }
    float best = v_max_lane(max), rest = v_sum(zero);
    for (int64_t i = whole; i < n; i++) {
        best = logit[i] > best ? logit[i] : best;
        rest += logit[i] - logit[i];
    }
    *finite = rest == 0.0f;
    return best;
}

static inline int32_t first_at_least(const float *logit, int64_t n, float value)
{
    QV_FOR_LANES(i, lanes, n)
    {
        unsigned mask = v_bits(v_ge(v_load_lanes(logit + i, lanes), v_set1(value)));
        mask &= (1u << lanes) - 1;
        if (mask)
            return (int32_t)(i + __builtin_ctz(mask));
    }
    return -1;
}

/* Sum of exp((logit - max) / temperature) over [0, n), by blocks of BLOCK tokens in double; the
 * terms go to prob and the blocks' sums to block where these are given. */
static inline double sum_exp(const float *logit, int64_t n, float max, float temperature,
                             float *prob, double *block)
{
    double total = 0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t end = n - first < BLOCK ? n - first : BLOCK;
        v16 sum = v_zero();
        QV_FOR_LANES(i, lanes, end)
        {
            v16 z = v_sub(v_load_lanes(logit + first + i, lanes), v_set1(max));
            v16 p = v_exp(temperature == 1.0f ? z : v_div(z, v_set1(temperature)));
            if (lanes < 16) { /* lanes beyond the row add nothing */
                float kept[16] = {0};
                v_store_n(kept, p, lanes);
                p = v_load(kept);
            }
            if (prob)
                v_store_lanes(prob + first + i, p, lanes);
            sum = v_add(sum, p);
        }
        double block_sum = v_sum(sum);
        if (block)
            block[first / BLOCK] = block_sum;
        total += block_sum;
    }
    return total;
}

/* The n highest logits and their ids, highest first, lowest id first among equals. Returns how many
 * there are. */
static inline int32_t find_highest(const float *logit, int64_t n_valid, int32_t n, float *top,
                                   int32_t *id)
{
    int32_t have = 0;
    if (n > n_valid)
        n = (int32_t)n_valid;
    QV_FOR_LANES(i, lanes, n > 0 ? n_valid : 0)
    {
        v16 x = v_load_lanes(logit + i, lanes);
        unsigned above = have < n ? 0xFFFF : v_bits(v_gt(x, v_set1(top[n - 1])));
        above &= (1u << lanes) - 1;
        for (; above; above &= above - 1) {
            int64_t token = i + __builtin_ctz(above);
            if (have == n && logit[token] <= top[n - 1])
                continue;
            int32_t at = have < n ? have++ : n - 1;
            for (; at > 0 && top[at - 1] < logit[token]; at--) {
                top[at] = top[at - 1];
                id[at] = id[at - 1];
            }
            top[at] = logit[token];
            id[at] = (int32_t)token;
        }
    }
    return have;
}

static inline void find_top(const float *logit, int64_t n_valid, double log_sum, int32_t n,
                            qv_sample_result *result)
{
    float top[QV_MAX_TOP_LOGPROBS];
    result->n_top = find_highest(logit, n_valid, n, top, result->top_token);
    for (int32_t i = 0; i < result->n_top; i++)
        result->top_logprob[i] = (float)((double)top[i] - log_sum);
}

/* --- Penalties ---------------------------------------------------------------------------- */

#define MARK_SEEN UINT32_C(0x80000000) /* in the prompt or generated */
#define MARK_APPLIED                                                                               \
    UINT32_C(0x40000000)                /* its logit has been changed, raw holds the one before    \
                                         */
#define MARK_COUNT UINT32_C(0x3FFFFFFF) /* how often it was generated */

static inline bool has_penalties(const qv_sample_row *row)
{
    return row->tokens && row->n_tokens > 0 &&
           (row->repetition_penalty != 1.0f || row->presence_penalty != 0.0f ||
            row->frequency_penalty != 0.0f);
}

static inline float penalise(float logit, const qv_sample_row *row, uint32_t count)
{
    float x = logit > 0 ? logit / row->repetition_penalty : logit * row->repetition_penalty;
    x -= row->frequency_penalty * (float)count;
    x -= count > 0 ? row->presence_penalty : 0.0f;
    return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
}

/* `before` is the sampling that may have chosen the last token. */
static inline void apply_penalties(const qv_sample_row *row, const qv_cpu_sampling *before,
                                   float *logit, qv_cpu_sample_scratch *s)
{
    for (int32_t i = 0; i < row->n_tokens; i++)
        s->mark[qv_cpu_token_id(before, row->tokens[i])] |= MARK_SEEN;
    for (int32_t i = row->n_prompt; i < row->n_tokens; i++)
        s->mark[qv_cpu_token_id(before, row->tokens[i])]++;
    for (int32_t i = 0; i < row->n_tokens; i++) {
        int32_t token = qv_cpu_token_id(before, row->tokens[i]);
        if (s->mark[token] & MARK_APPLIED)
            continue;
        s->raw[token] = logit[token];
        logit[token] = penalise(logit[token], row, s->mark[token] & MARK_COUNT);
        s->mark[token] |= MARK_APPLIED;
    }
}

static inline void clear_marks(const qv_sample_row *row, const qv_cpu_sampling *before,
                               qv_cpu_sample_scratch *s)
{
    for (int32_t i = 0; i < row->n_tokens; i++)
        s->mark[qv_cpu_token_id(before, row->tokens[i])] = 0;
}

/* --- Candidates --------------------------------------------------------------------------- */

/* Gather tokens with a logit of at least `cut`, in the order of ids. Returns how many. */
static inline int64_t gather(const float *logit, int64_t n_valid, float cut,
                             qv_cpu_sample_scratch *s)
{
    int64_t n = 0;
    QV_FOR_LANES(i, lanes, n_valid)
    {
        unsigned keep = v_bits(v_ge(v_load_lanes(logit + i, lanes), v_set1(cut)));
        for (keep &= (1u << lanes) - 1; keep; keep &= keep - 1) {
            int64_t token = i + __builtin_ctz(keep);
            s->id[n] = (int32_t)token;
            s->id_logit[n] = logit[token];
            s->id_prob[n++] = s->prob[token];
        }
    }
    return n;
}

static inline double mass_of(const float *prob, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += prob[i];
    return sum;
}

/* Gather enough tokens for the prefix that top-k or top-p will keep: those within e^-8 of the most
 * likely one nearly always do; else within e^-20; else all. */
static inline int64_t gather_enough(const qv_sample_row *row, const float *logit, int64_t n_valid,
                                    float max, double total, qv_cpu_sample_scratch *s)
{
    static const float depth[] = {8.0f, 20.0f};
    for (int i = 0; i < 2; i++) {
        int64_t n = gather(logit, n_valid, fmaxf(max - depth[i] * row->temperature, -FLT_MAX), s);
        if (row->top_k > 0 ? n >= row->top_k : mass_of(s->id_prob, n) >= row->top_p * total)
            return n;
    }
    return gather(logit, n_valid, -FLT_MAX, s);
}

/* A logit as an unsigned number of the same order. */
static inline uint32_t order_key(float logit)
{
    uint32_t bits = qv_f32_bits(logit + 0.0f); /* -0 becomes +0: they are equal */
    return bits & UINT32_C(0x80000000) ? ~bits : bits | UINT32_C(0x80000000);
}

/* The key of the last token of the shortest prefix whose weights sum to at least *limit; *limit
 * becomes what the tokens of that very key must contribute. Digit by digit from the top, a
 * histogram of the weights tells in which digit the sum crosses the limit. */
static inline uint32_t select_last(const qv_cpu_sample_scratch *s, int64_t n, bool by_prob,
                                   double *limit)
{
    uint32_t key = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        double weight[256] = {0};
        uint32_t count[256] = {0}, any[256]; /* any: some key with this digit */
        for (int64_t i = 0; i < n; i++) {
            uint32_t k = order_key(s->id_logit[i]), digit = k >> shift & 0xFF;
            if ((k & mask) != key)
                continue;
            weight[digit] += by_prob ? s->id_prob[i] : 1.0;
            count[digit]++;
            any[digit] = k;
        }
        uint32_t lowest = 0, last = 255;
        while (count[lowest] == 0)
            lowest++;
        for (; last > lowest && weight[last] < *limit; last--)
            *limit -= weight[last];
        while (count[last] == 0) /* a limit of 0 is reached before any token */
            last--;
        if (count[last] == 1)
            return any[last];
        key |= last << shift;
        mask |= UINT32_C(0xFF) << shift;
    }
    return key;
}

/* Keep the shortest prefix, by logit, whose weights sum to at least `limit`: weights are the
 * probabilities, or 1 each. At least one is kept. Returns how many are, still in order of ids. */
static inline int64_t keep_prefix(qv_cpu_sample_scratch *s, int64_t n, bool by_prob, double limit)
{
    uint32_t key = select_last(s, n, by_prob, &limit);
    int64_t n_kept = 0;
    double tied = 0; /* weight of the kept ones that are equal to the last of the prefix */
    bool enough = false;
    for (int64_t i = 0; i < n; i++) {
        uint32_t k = order_key(s->id_logit[i]);
        if (k < key || (k == key && enough))
            continue;
        if (k == key) {
            tied += by_prob ? s->id_prob[i] : 1.0;
            enough = tied >= limit;
        }
        s->id[n_kept] = s->id[i];
        s->id_logit[n_kept] = s->id_logit[i];
        s->id_prob[n_kept++] = s->id_prob[i];
    }
    return n_kept;
}

static inline int64_t keep_likely(qv_cpu_sample_scratch *s, int64_t n, float min_p)
{
    int64_t n_kept = 0;
    for (int64_t i = 0; i < n; i++)
        if (s->id_prob[i] >= min_p) {
            s->id[n_kept] = s->id[i];
            s->id_prob[n_kept++] = s->id_prob[i];
        }
    return n_kept;
}

/* --- Draws -------------------------------------------------------------------------------- */

/* The first i whose running sum, starting at `sum`, passes `target`; the last likely one if
 * rounding keeps the sum below it. */
static inline int64_t walk(const float *prob, int64_t n, double sum, double target)
{
    int64_t last = 0;
    for (int64_t i = 0; i < n; i++) {
        if (prob[i] <= 0)
            continue;
        last = i;
        sum += prob[i];
        if (sum > target)
            break;
    }
    return last;
}

static inline int32_t draw_from_all(const qv_cpu_sample_scratch *s, int64_t n_valid, double total,
                                    double u)
{
    double target = u * total, sum = 0;
    int64_t block = 0, last = (n_valid - 1) / BLOCK;
    while (last > 0 && s->block[last] <= 0)
        last--;
    while (block < last && sum + s->block[block] <= target)
        sum += s->block[block++];
    int64_t first = block * BLOCK, n = n_valid - first < BLOCK ? n_valid - first : BLOCK;
    return (int32_t)(first + walk(s->prob + first, n, sum, target));
}

/* Cut and draw among the n candidates in `s`; `total` is the mass that top-p counts from when top-k
 * does not cut. */
static inline int32_t draw_candidates(const qv_sample_row *row, int64_t n, bool cut_k, double total,
                                      double u, qv_cpu_sample_scratch *s)
{
    if (cut_k)
        n = keep_prefix(s, n, false, row->top_k);
    if (row->top_p < 1.0f)
        n = keep_prefix(s, n, true, row->top_p * (cut_k ? mass_of(s->id_prob, n) : total));
    if (row->min_p > 0)
        n = keep_likely(s, n, row->min_p < 1.0f ? row->min_p : 1.0f);
    return s->id[walk(s->id_prob, n, 0, u * mass_of(s->id_prob, n))];
}

static inline int32_t draw(const qv_sample_row *row, const float *logit, int64_t n_valid, float max,
                           qv_cpu_sample_scratch *s)
{
    double u = qv_philox_uniform(row->seed, row->stream, row->draw);
    double total = sum_exp(logit, n_valid, max, row->temperature, s->prob, s->block);
    bool cut_k = row->top_k > 0 && row->top_k < n_valid, cut_p = row->top_p < 1.0f;
    if (!cut_k && !cut_p && row->min_p <= 0)
        return draw_from_all(s, n_valid, total, u);
    int64_t n = cut_k || cut_p ? gather_enough(row, logit, n_valid, max, total, s)
                               : gather(logit, n_valid, -FLT_MAX, s);
    return draw_candidates(row, n, cut_k, total, u, s);
}

#endif
