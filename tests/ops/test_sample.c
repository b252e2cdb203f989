/* Sampling: against a plain version in double precision that sorts the whole vocabulary. */
#include "ops/philox.h"
#include "tests/ops/ops_test.h"

/* Defaults that change nothing. */
static qv_sample_row plain_row(void)
{
    return (qv_sample_row){
        .target = -1, .temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f, .n_top = -1};
}

static qv_backend *open_for_sampling(const char *isa, int32_t n_vocab)
{
    qv_backend *be = open_isa(isa, 2);
    if (be)
        PASS(qv_backend_reserve(be, &(qv_backend_limits){.max_logits = 64, .n_vocab = n_vocab}));
    return be;
}

static qv_sample_result sample_one(qv_backend *be, const float *logits, int32_t n_vocab,
                                   int32_t n_valid, const qv_sample_row *row)
{
    qv_sample_result result;
    float *copy = copied_floats(logits, n_vocab);
    PASS(qv_op_sample(be, qv_tensor_2d(copy, QV_F32, 1, n_vocab), n_valid, row, &result));
    free(copy);
    return result;
}

/* --- Oracle ------------------------------------------------------------------------------- */

typedef struct {
    double logit;
    int32_t id;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static int by_id(const void *a, const void *b)
{
    return ((const ranked *)a)->id < ((const ranked *)b)->id ? -1 : 1;
}

/* Penalised logits as float32 holds them: penalties are part of the definition. */
static void oracle_penalties(const qv_sample_row *row, float *logit, int32_t n_vocab)
{
    for (int32_t id = 0; id < n_vocab; id++) {
        int n_seen = 0, n_generated = 0;
        for (int32_t i = 0; row->tokens && i < row->n_tokens; i++)
            if (row->tokens[i] == id) {
                n_seen++;
                n_generated += i >= row->n_prompt;
            }
        if (n_seen == 0)
            continue;
        float x = logit[id] > 0 ? logit[id] / row->repetition_penalty
                                : logit[id] * row->repetition_penalty;
        x -= row->frequency_penalty * (float)n_generated;
        logit[id] = x - (n_generated ? row->presence_penalty : 0.0f);
    }
}

/* How many of the ranked tokens remain. *doubtful if a sum comes so close to top_p, or a
 * probability so close to min_p, that float32 may decide otherwise. */
static int32_t oracle_cut(const qv_sample_row *row, const ranked *r, int32_t n, bool *doubtful)
{
    double total = 0, sum = 0;
    if (row->top_k > 0 && row->top_k < n)
        n = row->top_k;
    for (int32_t i = 0; i < n; i++)
        total += exp((r[i].logit - r[0].logit) / row->temperature);
    if (row->top_p < 1) {
        int32_t kept = 0;
        while (kept < n && (kept == 0 || sum < (double)row->top_p * total)) {
            sum += exp((r[kept++].logit - r[0].logit) / row->temperature);
            *doubtful |= fabs(sum / total - row->top_p) < 1e-5;
        }
        n = kept;
    }
    for (int32_t i = 0; row->min_p > 0 && i < n; i++) {
        double p = exp((r[i].logit - r[0].logit) / row->temperature);
        double least = row->min_p < 1 ? row->min_p : 1;
        *doubtful |= p != 1 && fabs(p / least - 1) < 1e-5;
        if (i > 0 && p < least)
            return i;
    }
    return n;
}

/* The token of a row; *doubtful as above, or if the draw falls on the edge between two tokens. */
static int32_t oracle_token(const float *logits, int32_t n_vocab, int32_t n_valid,
                            const qv_sample_row *row, bool *doubtful)
{
    float *logit = copied_floats(logits, n_vocab);
    ranked *r = must(malloc((size_t)n_valid * sizeof *r));
    int32_t n = 0, token = -1;
    *doubtful = false;
    oracle_penalties(row, logit, n_vocab);
    for (int32_t id = 0; id < n_valid; id++) {
        bool banned = false;
        for (int32_t i = 0; i < row->n_banned; i++)
            banned |= row->banned[i] == id;
        if (!banned)
            r[n++] = (ranked){.logit = logit[id], .id = id};
    }
    qsort(r, (size_t)n, sizeof *r, by_rank);
    if (row->temperature == 0) {
        token = r[0].id;
    } else {
        double max = r[0].logit, total = 0, sum = 0;
        n = oracle_cut(row, r, n, doubtful);
        qsort(r, (size_t)n, sizeof *r, by_id);
        for (int32_t i = 0; i < n; i++)
            total += exp((r[i].logit - max) / row->temperature);
        double target = qv_philox_uniform(row->seed, row->stream, row->draw) * total;
        for (int32_t i = 0; i < n && token < 0; i++) {
            sum += exp((r[i].logit - max) / row->temperature);
            *doubtful |= fabs(sum - target) < 1e-5 * total;
            if (sum > target)
                token = r[i].id;
        }
    }
    free(r);
    free(logit);
    return token;
}

static double oracle_logprob(const float *logits, int32_t n_vocab, int32_t token)
{
    double max = -INFINITY, sum = 0;
    for (int32_t i = 0; i < n_vocab; i++)
        max = logits[i] > max ? logits[i] : max;
    for (int32_t i = 0; i < n_vocab; i++)
        sum += exp(logits[i] - max);
    return logits[token] - max - log(sum);
}

/* --- Philox ------------------------------------------------------------------------------- */

/* The known answers that the authors of Philox publish. */
Test(philox, gives_the_published_answers)
{
    static const struct {
        uint32_t counter[4], key[2], want[4];
    } rows[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < QV_ROWS(rows); i++) {
        uint32_t counter[4];
        memcpy(counter, rows[i].counter, sizeof counter);
        qv_philox4x32(counter, rows[i].key);
        for (int j = 0; j < 4; j++)
            cr_assert_eq(counter[j], rows[i].want[j], "row %zu, word %d: %08x", i, j, counter[j]);
    }
}

/* Pinned: a release that changed these would continue a request differently after a restart. */
Test(philox, draws_never_change)
{
    static const struct {
        uint64_t seed;
        uint32_t stream, draw;
        double want;
    } rows[] = {
        {0, 0, 0, 0x1.989fa35785a7p-2},
        {0, 0, 1, 0x1.f1c99948b964p-1},
        {0, 1, 0, 0x1.ab4317b3a88d8p-2},
        {1, 0, 0, 0x1.c7d00ce1ca141p-1},
        {1234567890123, 0, 7, 0x1.bd3b0ab6885ap-3},
        {UINT64_MAX, UINT32_MAX, UINT32_MAX, 0x1.34635f490c2bp-2},
        {4294967296, 0, 0, 0x1.fbbc7c17f4fcbp-1},
        {42, 3, 100000, 0x1.9f0c759ab5745p-1},
    };
    for (size_t i = 0; i < QV_ROWS(rows); i++) {
        double u = qv_philox_uniform(rows[i].seed, rows[i].stream, rows[i].draw);
        cr_assert(u == rows[i].want, "row %zu: %a", i, u);
    }
}

/* --- Greedy ------------------------------------------------------------------------------- */

Test(sample, greedy_takes_the_highest_and_the_lowest_id_among_equals)
{
    enum { V = 100 };
    static const struct {
        int32_t n_high, high[3], n_valid, want;
    } rows[] = {
        {1, {0}, V, 0},           {1, {99}, V, 99},      {2, {40, 41}, V, 40},
        {3, {97, 15, 16}, V, 15}, {2, {90, 17}, 90, 17}, {2, {95, 80}, 90, 80},
    };
    for (size_t a = 0; a < QV_ROWS(isas); a++) {
        qv_backend *be = open_for_sampling(isas[a], V);
        for (size_t i = 0; be && i < QV_ROWS(rows); i++) {
            float *logits = filled_floats(V, -1.5f);
            for (int32_t j = 0; j < rows[i].n_high; j++)
                logits[rows[i].high[j]] = 2.5f;
            qv_sample_row row = plain_row();
            row.temperature = 0;
            qv_sample_result got = sample_one(be, logits, V, rows[i].n_valid, &row);
            cr_assert_eq(got.token, rows[i].want, "row %zu: %d", i, got.token);
            free(logits);
        }
        qv_backend_close(be);
    }
}

Test(sample, banned_tokens_are_never_chosen)
{
    enum { V = 40 };
    static const int32_t banned[] = {7, 39};
    qv_backend *be = open_for_sampling(NULL, V);
    float *logits = filled_floats(V, 0);
    logits[7] = 5;
    logits[39] = 4;
    logits[11] = 3;
    qv_sample_row row = plain_row();
    row.temperature = 0;
    row.banned = banned;
    row.n_banned = 2;
    qv_sample_result got = sample_one(be, logits, V, V, &row);
    cr_assert_eq(got.token, 11);
    cr_assert_float_eq(got.logprob, oracle_logprob(logits, V, 11), 1e-5);
    free(logits);
    qv_backend_close(be);
}

/* --- Against the oracle ------------------------------------------------------------------- */

typedef struct {
    const char *name;
    float temperature;
    int32_t top_k;
    float top_p, min_p;
    float presence, frequency, repetition;
} settings;

static const settings settings_rows[] = {
    {"plain", 1, 0, 1, 0, 0, 0, 1},
    {"cool", 0.3f, 0, 1, 0, 0, 0, 1},
    {"hot", 3, 0, 1, 0, 0, 0, 1},
    {"icy", 1e-6f, 0, 1, 0, 0, 0, 1},
    {"icy, cut", 1e-30f, 20, 0.9013f, 0.1f, 0, 0, 1},
    {"denormal", 1e-42f, 0, 0.9013f, 0, 0, 0, 1},
    {"boiling", 1e30f, 0, 1, 0, 0, 0, 1},
    {"boiling, cut", 3e38f, 50, 0.5007f, 0.1f, 0, 0, 1},
    {"top-k 1", 1, 1, 1, 0, 0, 0, 1},
    {"top-k 20", 1, 20, 1, 0, 0, 0, 1},
    {"top-k 300", 2, 300, 1, 0, 0, 0, 1},
    {"top-k all but one", 2, 999, 1, 0, 0, 0, 1},
    {"top-k beyond", 1, 1000000, 1, 0, 0, 0, 1},
    {"top-p 0", 1, 0, 0, 0, 0, 0, 1},
    {"top-p 0.1", 1, 0, 0.1003f, 0, 0, 0, 1},
    {"top-p 0.95", 0.7f, 0, 0.9503f, 0, 0, 0, 1},
    {"top-p nearly 1", 2, 0, 0.9999f, 0, 0, 0, 1},
    {"min-p 0.1", 1, 0, 1, 0.1f, 0, 0, 1},
    {"min-p 1", 1, 0, 1, 1, 0, 0, 1},
    {"min-p tiny", 3, 0, 1, 1e-12f, 0, 0, 1},
    {"all three", 1.3f, 60, 0.9013f, 0.02f, 0, 0, 1},
    {"presence", 1, 0, 0.9013f, 0, 1.5f, 0, 1},
    {"frequency", 1, 40, 1, 0, 0, 0.7f, 1},
    {"repetition", 1, 0, 1, 0.05f, 0, 0, 1.3f},
    {"rewarded", 0.8f, 0, 0.9013f, 0, -1, -0.5f, 0.8f},
    {"everything", 0.9013f, 50, 0.9013f, 0.01f, 0.5f, 0.5f, 1.2f},
};

enum { VOCAB = 1000, VALID = 990, N_HISTORY = 60 };

static qv_sample_row row_of(const settings *s, const int32_t *history, uint64_t seed)
{
    qv_sample_row row = plain_row();
    row.temperature = s->temperature;
    row.top_k = s->top_k;
    row.top_p = s->top_p;
    row.min_p = s->min_p;
    row.presence_penalty = s->presence;
    row.frequency_penalty = s->frequency;
    row.repetition_penalty = s->repetition;
    row.tokens = history;
    row.n_tokens = N_HISTORY;
    row.n_prompt = 35;
    row.seed = seed;
    row.draw = (uint32_t)(seed % 5);
    row.n_top = 3;
    return row;
}

/* Logits of various shapes: peaked, flat, with ties, far below and above zero. */
static float *some_logits(int kind)
{
    qv_rng rng = qv_rng_seed((uint64_t)kind);
    static const float scales[] = {8, 2, 0.05f, 0, 300};
    float *x = random_floats(&rng, VOCAB, scales[kind]);
    for (int32_t i = 0; i < VOCAB; i++) {
        if (kind == 1)
            x[i] = roundf(x[i] * 4) / 4;
        x[i] += kind == 2 ? -5000.0f : 0.0f;
    }
    return x;
}

Test(sample, agrees_with_a_full_sort_in_double)
{
    int n_doubtful = 0, n_checked = 0;
    qv_rng rng = qv_rng_seed(99);
    int32_t history[N_HISTORY];
    for (int i = 0; i < N_HISTORY; i++) /* the second half repeats some of the first */
        history[i] = i < 40 ? (int32_t)qv_rng_range(&rng, 0, VOCAB) : history[i - 20];
    for (size_t a = 0; a < QV_ROWS(isas); a++) {
        qv_backend *be = open_for_sampling(isas[a], VOCAB);
        for (int kind = 0; be && kind < 5; kind++) {
            float *logits = some_logits(kind);
            for (size_t i = 0; i < QV_ROWS(settings_rows); i++)
                for (uint64_t seed = 0; seed < 20; seed++) {
                    bool doubtful;
                    qv_sample_row row = row_of(&settings_rows[i], history, seed);
                    int32_t want = oracle_token(logits, VOCAB, VALID, &row, &doubtful);
                    qv_sample_result got = sample_one(be, logits, VOCAB, VALID, &row);
                    n_checked++;
                    n_doubtful += doubtful;
                    cr_assert(doubtful || got.token == want,
                              "%s, logits %d, %s, seed %d: token %d, wanted %d", isas[a], kind,
                              settings_rows[i].name, (int)seed, got.token, want);
                    cr_assert(got.token >= 0 && got.token < VALID);
                    cr_assert_float_eq(got.logprob, oracle_logprob(logits, VOCAB, got.token), 1e-3);
                }
            free(logits);
        }
        qv_backend_close(be);
    }
    cr_assert_lt(n_doubtful * 50, n_checked, "%d of %d in doubt", n_doubtful, n_checked);
}

/* Rows of a batch, in any order and on any thread, give what each gives alone. */
Test(sample, a_row_is_the_same_in_every_batch)
{
    enum { N = QV_ROWS(settings_rows) };
    qv_backend *be = open_for_sampling(NULL, VOCAB);
    int32_t history[N_HISTORY];
    for (int i = 0; i < N_HISTORY; i++)
        history[i] = i * 7 % 50;
    float *logits = some_logits(0), *all = must(malloc(N * VOCAB * sizeof *all));
    qv_sample_row rows[N];
    qv_sample_result got[N];
    for (int turn = 0; turn < 3; turn++) {
        for (int i = 0; i < N; i++) {
            rows[i] = row_of(&settings_rows[(i * 5 + turn) % N], history, 3);
            memcpy(all + i * VOCAB, logits, VOCAB * sizeof *all);
        }
        PASS(qv_op_sample(be, qv_tensor_2d(all, QV_F32, N, VOCAB), VALID, rows, got));
        for (int i = 0; i < N; i++) {
            qv_sample_result alone = sample_one(be, logits, VOCAB, VALID, &rows[i]);
            cr_assert_eq(got[i].token, alone.token);
            cr_assert_eq(qv_f32_bits(got[i].logprob), qv_f32_bits(alone.logprob));
        }
    }
    free(logits);
    free(all);
    qv_backend_close(be);
}

/* --- Distribution ------------------------------------------------------------------------- */

static void check_distribution(const qv_sample_row *row, const double *want, int n_kinds)
{
    enum { V = 8, DRAWS = 20000 };
    static const float logits[V] = {0.5f, -1.0f, 2.0f, 0.0f, 1.0f, -3.0f, 1.5f, 0.25f};
    qv_backend *be = open_for_sampling(NULL, V);
    int count[V] = {0};
    qv_sample_row r = *row;
    for (uint32_t i = 0; i < DRAWS; i++) {
        r.seed = i / 100;
        r.stream = i / 10 % 10;
        r.draw = i % 10;
        count[sample_one(be, logits, V, V, &r).token]++;
    }
    double chi2 = 0;
    for (int i = 0; i < V; i++) {
        double expected = want[i] * DRAWS;
        if (expected == 0)
            cr_assert_eq(count[i], 0, "token %d was drawn %d times", i, count[i]);
        else
            chi2 += (count[i] - expected) * (count[i] - expected) / expected;
    }
    /* 99.99 % of such sums lie below 30 for 7 degrees of freedom, and below that for fewer. */
    cr_assert_lt(chi2, 30, "chi-square %.1f over %d tokens", chi2, n_kinds);
    qv_backend_close(be);
}

static void softmax_of(const double *logit, double temperature, double *p)
{
    double sum = 0;
    for (int i = 0; i < 8; i++)
        sum += p[i] = isinf(logit[i]) ? 0 : exp(logit[i] / temperature);
    for (int i = 0; i < 8; i++)
        p[i] /= sum;
}

Test(sample, draws_follow_the_distribution)
{
    double p[8];
    qv_sample_row row = plain_row();
    softmax_of((double[]){0.5, -1, 2, 0, 1, -3, 1.5, 0.25}, 1, p);
    check_distribution(&row, p, 8);
    row.temperature = 0.5f;
    softmax_of((double[]){0.5, -1, 2, 0, 1, -3, 1.5, 0.25}, 0.5, p);
    check_distribution(&row, p, 8);
    row.top_k = 3;
    softmax_of((double[]){-INFINITY, -INFINITY, 2, -INFINITY, 1, -INFINITY, 1.5, -INFINITY}, 0.5,
               p);
    check_distribution(&row, p, 3);
}

/* Pinned: the same seed gives the same tokens in every release. */
Test(sample, seeds_give_the_same_tokens_for_ever)
{
    enum { V = 50 };
    static const int32_t want[] = {10, 24, 1, 32, 11, 13, 48, 9,  32, 5,  40, 21,
                                   25, 33, 5, 45, 36, 32, 1,  28, 21, 14, 24, 49};
    qv_backend *be = open_for_sampling(NULL, V);
    float logits[V];
    for (int i = 0; i < V; i++)
        logits[i] = (float)((i * 37 + 11) % 50) / 12.5f;
    for (uint32_t i = 0; i < QV_ROWS(want); i++) {
        qv_sample_row row = plain_row();
        row.seed = 1234567890123ull;
        row.stream = i / 12;
        row.draw = i % 12;
        row.top_p = i % 2 ? 0.9f : 1.0f;
        int32_t token = sample_one(be, logits, V, V, &row).token;
        cr_assert_eq(token, want[i], "draw %u: %d", i, token);
    }
    qv_backend_close(be);
}

/* --- Logprobs ----------------------------------------------------------------------------- */

Test(sample, logprobs_are_of_the_unmodified_logits)
{
    static const int32_t history[] = {5, 5, 6};
    for (size_t a = 0; a < QV_ROWS(isas); a++) {
        qv_backend *be = open_for_sampling(isas[a], VOCAB);
        for (int kind = 0; be && kind < 5; kind++) {
            float *logits = some_logits(kind);
            qv_sample_row row = plain_row();
            row.temperature = 0;
            row.presence_penalty = 2;
            row.repetition_penalty = 3;
            row.tokens = history;
            row.n_tokens = 3;
            logits[5] = logits[6] = 3.0f + (kind == 4 ? 400.0f : 0.0f);
            qv_sample_result got = sample_one(be, logits, VOCAB, VOCAB, &row);
            cr_assert_float_eq(got.logprob, oracle_logprob(logits, VOCAB, got.token), 1e-4);
            for (int32_t target = 0; target < VOCAB; target += 111) {
                row.target = target;
                got = sample_one(be, logits, VOCAB, VALID, &row);
                cr_assert_eq(got.token, target);
                double want = oracle_logprob(logits, VOCAB, target);
                cr_assert_float_eq(got.logprob, want, 1e-4 + 2 * U32 * fabs(want),
                                   "kind %d, target %d: %g, wanted %g", kind, target, got.logprob,
                                   want);
            }
            free(logits);
        }
        qv_backend_close(be);
    }
}

Test(sample, alternatives_come_most_likely_first_and_lowest_id_first)
{
    static const int32_t counts[] = {0, 1, 2, 5, 17, QV_MAX_TOP_LOGPROBS};
    for (size_t a = 0; a < QV_ROWS(isas); a++) {
        qv_backend *be = open_for_sampling(isas[a], VOCAB);
        for (int kind = 0; be && kind < 5; kind++) {
            float *logits = some_logits(kind);
            ranked r[VALID];
            for (int32_t i = 0; i < VALID; i++)
                r[i] = (ranked){.logit = logits[i], .id = i};
            qsort(r, VALID, sizeof *r, by_rank);
            for (size_t c = 0; c < QV_ROWS(counts); c++) {
                qv_sample_row row = plain_row();
                row.n_top = counts[c];
                qv_sample_result got = sample_one(be, logits, VOCAB, VALID, &row);
                cr_assert_eq(got.n_top, counts[c]);
                for (int32_t i = 0; i < got.n_top; i++) {
                    cr_assert_eq(got.top_token[i], r[i].id, "kind %d, place %d", kind, i);
                    cr_assert_float_eq(got.top_logprob[i], oracle_logprob(logits, VOCAB, r[i].id),
                                       1e-4);
                }
            }
            free(logits);
        }
        qv_backend_close(be);
    }
}

Test(sample, a_vocabulary_smaller_than_the_alternatives_reports_all_of_it)
{
    qv_backend *be = open_for_sampling(NULL, 3);
    float logits[] = {1, 3, 2};
    qv_sample_row row = plain_row();
    row.n_top = 20;
    qv_sample_result got = sample_one(be, logits, 3, 3, &row);
    cr_assert_eq(got.n_top, 3);
    cr_assert(got.top_token[0] == 1 && got.top_token[1] == 2 && got.top_token[2] == 0);
    qv_backend_close(be);
}

/* A vocabulary like Qwen3.5's, as the model has it. */
Test(sample, large_vocabularies_work)
{
    enum { V = 248320, N_VALID = 248077 };
    qv_backend *be = open_for_sampling(NULL, V);
    qv_rng rng = qv_rng_seed(4);
    float *logits = must(malloc(V * sizeof *logits));
    qv_fill_normal(&rng, logits, V, 2.5f);
    for (size_t i = 0; i < QV_ROWS(settings_rows); i++) {
        bool doubtful;
        qv_sample_row row = row_of(&settings_rows[i], NULL, i);
        int32_t want = oracle_token(logits, V, N_VALID, &row, &doubtful);
        qv_sample_result got = sample_one(be, logits, V, N_VALID, &row);
        cr_assert(doubtful || got.token == want, "%s: token %d, wanted %d", settings_rows[i].name,
                  got.token, want);
        cr_assert_float_eq(got.logprob, oracle_logprob(logits, V, got.token), 1e-4);
    }
    free(logits);
    qv_backend_close(be);
}

/* --- Refusals ----------------------------------------------------------------------------- */

Test(sample, names_the_row_whose_logits_are_not_finite)
{
    enum { V = 37, N = 3 };
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    static const int32_t places[] = {0, 16, 36};
    qv_backend *be = open_for_sampling(NULL, V);
    qv_sample_row rows[N] = {plain_row(), plain_row(), plain_row()};
    qv_sample_result results[N];
    for (size_t b = 0; b < QV_ROWS(bad); b++)
        for (size_t p = 0; p < QV_ROWS(places); p++) {
            float *logits = filled_floats(N * V, 1);
            logits[1 * V + places[p]] = bad[b];
            FAIL_WITH(QV_ERR_INTERNAL, "row 1 ",
                      qv_op_sample(be, qv_tensor_2d(logits, QV_F32, N, V), V, rows, results));
            free(logits);
        }
    qv_backend_close(be);
}

Test(sample, bad_rows_leave_the_others_their_results)
{
    enum { V = 37, N = 5 };
    qv_backend *be = open_for_sampling(NULL, V);
    int32_t all[V];
    qv_sample_row rows[N];
    qv_sample_result results[N];
    float *logits = filled_floats(N * V, 1);
    for (int i = 0; i < N; i++) {
        rows[i] = plain_row();
        rows[i].temperature = 0;
        logits[i * V + 10 + i] = 2;
    }
    for (int i = 0; i < V; i++)
        all[i] = i;
    logits[1 * V + 36] = NAN;
    rows[3].banned = all;
    rows[3].n_banned = V;
    FAIL_WITH(QV_ERR_INTERNAL, "row 1 ",
              qv_op_sample(be, qv_tensor_2d(logits, QV_F32, N, V), V, rows, results));
    for (int i = 0; i < N; i++)
        cr_assert(i == 1 || i == 3 ? results[i].token < 0 : results[i].token == 10 + i);
    free(logits);
    qv_backend_close(be);
}

Test(sample, refuses_parameters_that_make_no_sense)
{
    enum { V = 10 };
    qv_backend *be = open_for_sampling(NULL, V);
    float logits[V] = {0};
    static const int32_t all[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, outside[] = {3, 10},
                         below[] = {-1};
    struct {
        const char *text;
        qv_sample_row row;
    } rows[] = {
        {"temperature -1", plain_row()},
        {"temperature nan", plain_row()},
        {"temperature inf", plain_row()},
        {"top_k -1", plain_row()},
        {"top_p nan", plain_row()},
        {"min_p -0.5", plain_row()},
        {"repetition_penalty 0", plain_row()},
        {"presence_penalty inf", plain_row()},
        {"33 alternatives", plain_row()},
        {"target 10", plain_row()},
        {"token 10", plain_row()},
        {"banned token -1", plain_row()},
        {"every token banned", plain_row()},
    };
    rows[0].row.temperature = -1;
    rows[1].row.temperature = NAN;
    rows[2].row.temperature = INFINITY;
    rows[3].row.top_k = -1;
    rows[4].row.top_p = NAN;
    rows[5].row.min_p = -0.5f;
    rows[6].row.repetition_penalty = 0;
    rows[7].row.presence_penalty = INFINITY;
    rows[8].row.n_top = 33;
    rows[9].row.target = 10;
    rows[10].row.tokens = outside;
    rows[10].row.n_tokens = 2;
    rows[11].row.banned = below;
    rows[11].row.n_banned = 1;
    rows[12].row.banned = all;
    rows[12].row.n_banned = 10;
    qv_sample_result result;
    for (size_t i = 0; i < QV_ROWS(rows); i++)
        FAIL_WITH(QV_ERR_ARG, rows[i].text,
                  qv_op_sample(be, qv_tensor_2d(logits, QV_F32, 1, V), V, &rows[i].row, &result));
    qv_backend_close(be);
}

Test(sample, more_columns_than_reserved_is_a_limit)
{
    qv_backend *be = open_cpu(1);
    float logits[20] = {0};
    qv_sample_row row = plain_row();
    qv_sample_result result;
    FAIL_WITH(QV_ERR_LIMIT, "20 logits, but 0 are reserved",
              qv_op_sample(be, qv_tensor_2d(logits, QV_F32, 1, 20), 20, &row, &result));
    PASS(qv_backend_reserve(be, &(qv_backend_limits){.n_vocab = 20}));
    PASS(qv_op_sample(be, qv_tensor_2d(logits, QV_F32, 1, 20), 20, &row, &result));
    FAIL_WITH(QV_ERR_SHAPE, "21 valid tokens of 20",
              qv_op_sample(be, qv_tensor_2d(logits, QV_F32, 1, 20), 21, &row, &result));
    PASS(qv_op_sample(be, qv_tensor_2d(NULL, QV_F32, 0, 20), 20, NULL, NULL));
    qv_backend_close(be);
}

/* --- Two halves --------------------------------------------------------------------------- */

/* Rows with penalties whose last token is what a row of the sampling before chose, which is not
 * read yet: the same as when it is known. `known` is among their other tokens or not. */
Test(sample, a_row_may_count_a_token_that_nobody_has_read)
{
    enum { V = 100, N = 2 };
    static const int32_t others[][3] = {{3, 4, 4}, {3, 40, 40}, {40, 5, 6}};
    for (size_t k = 0; k < QV_ROWS(others); k++) {
        qv_backend *be = open_for_sampling(NULL, V);
        float *first = filled_floats(N * V, 0), *logits = filled_floats(N * V, 0);
        first[7] = first[V + 40] = 9; /* rows choose 7 and 40 */
        logits[40] = logits[V + 40] = 3;
        logits[41] = logits[V + 41] = 2;
        qv_sample_row rows[N], after[N];
        int32_t tokens[4] = {others[k][0], others[k][1], others[k][2], QV_TOKEN_OF_ROW(1)};
        for (int i = 0; i < N; i++) {
            rows[i] = after[i] = plain_row();
            rows[i].temperature = after[i].temperature = 0;
            after[i].tokens = tokens;
            after[i].n_tokens = 4;
            after[i].n_prompt = 1;
            after[i].n_top = 3;
            after[i].frequency_penalty = i == 0 ? 0.6f : 0.2f;
        }
        qv_sample_result got[N], chosen[N], want[N];
        float *copy = copied_floats(logits, N * V);
        PASS(qv_op_sample_begin(be, qv_tensor_2d(first, QV_F32, N, V), V, rows));
        PASS(qv_op_sample_begin(be, qv_tensor_2d(copy, QV_F32, N, V), V, after));
        FAIL_WITH(QV_ERR_LIMIT, "not ended",
                  qv_op_sample_begin(be, qv_tensor_2d(first, QV_F32, N, V), V, rows));
        PASS(qv_op_sample_end(be, chosen));
        PASS(qv_op_sample_end(be, got));
        cr_assert_eq(chosen[0].token, 7);
        cr_assert_eq(chosen[1].token, 40);
        tokens[3] = 40;
        PASS(qv_op_sample(be, qv_tensor_2d(logits, QV_F32, N, V), V, after, want));
        for (int i = 0; i < N; i++) {
            cr_expect_eq(got[i].token, want[i].token, "tokens %zu, row %d", k, i);
            cr_expect_eq(qv_f32_bits(got[i].logprob), qv_f32_bits(want[i].logprob));
        }
        cr_expect_eq(want[0].token, k == 1 ? 41 : want[0].token, "three times 0.6 is enough");
        free(first);
        free(logits);
        free(copy);
        qv_backend_close(be);
    }
}

Test(sample, its_choices_become_tokens_of_the_next_batch)
{
    enum { V = 50, N = 3 };
    qv_backend *be = open_for_sampling(NULL, V);
    PASS(qv_backend_reserve(be, &(qv_backend_limits){.max_tokens = 8, .max_logits = N}));
    float *logits = filled_floats(N * V, 0);
    logits[11] = logits[V + 12] = 5;
    logits[2 * V] = NAN;
    qv_sample_row rows[N];
    for (int i = 0; i < N; i++) {
        rows[i] = plain_row();
        rows[i].temperature = 0;
    }
    PASS(qv_op_sample_begin(be, qv_tensor_2d(logits, QV_F32, N, V), V, rows));
    int32_t token[] = {4, QV_TOKEN_OF_ROW(1), QV_TOKEN_OF_ROW(0), QV_TOKEN_OF_ROW(2), 5};
    const int32_t want[] = {4, 12, 11, 0, 5};
    qv_batch batch = {.n_tokens = 5, .token = token}, out;
    PASS(qv_backend_put_batch(be, &batch, &out));
    for (int i = 0; i < 5; i++)
        cr_expect_eq(out.token[i], want[i], "token %d", i);
    cr_expect_eq(token[1], QV_TOKEN_OF_ROW(1), "the caller's stay as they are");
    token[4] = QV_TOKEN_OF_ROW(N);
    FAIL_WITH(QV_ERR_ARG, "row 3", qv_backend_put_batch(be, &batch, &out));
    qv_sample_result results[N];
    FAIL_WITH(QV_ERR_INTERNAL, "row 2", qv_op_sample_end(be, results));
    cr_expect_eq(results[1].token, 12);
    free(logits);
    qv_backend_close(be);
}
