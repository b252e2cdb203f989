/* Golden cases in BF16 arithmetic, which is what a device computes: how far the logprobs are from
 * the float32 reference, by the measure that the models' own regression tests use.
 *
 * A router chooses experts by comparing scores. Where two are closer than the arithmetic can tell
 * apart, BF16 may choose another expert than float32 does, and from there on the two compute
 * different functions of the sequence: a single such choice can move logprobs by whole units, in
 * the reference's own BF16 too. That is looked at apart. A case in which it happens is run again
 * with the router's logits of the float32 run, which leaves arithmetic alone to be judged; and the
 * first such choice of each sequence is a near tie by the scores themselves. */
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    double most; /* of KL = mean(0.5 (logprob - reference)^2) over the cases of an adapter */
} models[] = {
    {"tiny-qwen3.5", 4e-3},
    {"tiny-qwen3.5-moe", 1e-3},
    {"tiny-nemotron3-nano", 2.5e-3},
    {"tiny-nemotron3-super", 2.5e-3},
};

/* Largest gap of a choice that counts as a tie, in scores between 0 and 1 (Nemotron-3) or logits
 * (Qwen3.5): what BF16 changes of them. */
#define TIE 0.02

/* Of KL, where no expert was chosen differently: well below every threshold. */
#define MOST_OF_ARITHMETIC 1e-3

enum { MAX_LAYERS = 64 };

/* --- What routers see and choose -------------------------------------------------------------- */

/* Logits and choices of a run, layer by layer. */
typedef struct {
    int64_t k, n_experts;
    float *logits[MAX_LAYERS];   /* [T, experts]; NULL: no router */
    int32_t *chosen[MAX_LAYERS]; /* [T, k] */
    int32_t n_tokens;
    bool replay; /* put `logits` in place of those of the run */
} trace;

static void *keep(void *old, const qv_tensor *value)
{
    size_t bytes = (size_t)(value->shape[0] * value->shape[1]) * 4;
    free(old);
    return memcpy(malloc(bytes), value->data, bytes);
}

static void watch(int64_t layer, const char *name, const qv_tensor *value, void *user)
{
    trace *t = user;
    bool logits = strcmp(name, "router_logits") == 0;
    if (logits && t->replay) { /* before the router reads them */
        size_t bytes = (size_t)(value->shape[0] * value->shape[1]) * sizeof(float);
        memcpy(value->data, t->logits[layer], bytes);
    } else if (logits) {
        t->logits[layer] = keep(t->logits[layer], value);
        t->n_experts = value->shape[1];
        t->n_tokens = (int32_t)value->shape[0];
    } else if (strcmp(name, "experts") == 0 && !t->replay) {
        t->chosen[layer] = keep(t->chosen[layer], value);
        t->k = value->shape[1];
    }
}

static void free_trace(trace *t)
{
    for (int i = 0; i < MAX_LAYERS; i++) {
        free(t->logits[i]);
        free(t->chosen[i]);
    }
}

static bool has(const int32_t *ids, int64_t k, int64_t id)
{
    for (int64_t j = 0; j < k; j++) {
        if (ids[j] == id)
            return true;
    }
    return false;
}

/* --- Ties ------------------------------------------------------------------------------------- */

/* What a router compares, of one token: logits, or sigmoid plus a layer's bias. */
static void score(const fx_golden *g, const qv_safetensors *st, int layer, const float *logits,
                  int64_t n, double *out)
{
    char name[128];
    snprintf(name, sizeof name, "backbone.layers.%d.mixer.gate.e_score_correction_bias", layer);
    const qv_stored_tensor *bias = qv_safetensors_find(st, name);
    float values[256] = {0};
    cr_assert(n <= 256 && (bias != NULL) == (strstr(g->dir, "nemotron") != NULL));
    if (bias != NULL)
        cr_assert_eq(qv_stored_tensor_f32(bias, 0, n, values), QV_OK);
    for (int64_t e = 0; e < n; e++)
        out[e] = bias != NULL ? 1 / (1 + exp(-(double)logits[e])) + (double)values[e] : logits[e];
}

static double best_two(const double *scores, int64_t n)
{
    double first = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        second = fmax(second, fmin(first, scores[i]));
        first = fmax(first, scores[i]);
    }
    return first + second;
}

/* How close a choice was that came out as `other` instead of `own`: between the experts that left
 * and came, or between their groups where those are chosen first. */
static double gap_of(const qv_model_config *config, const double *scores, const int32_t *own,
                     const int32_t *other, int64_t k, int64_t n)
{
    int64_t each = n / config->router_groups;
    double best = INFINITY;
    for (int64_t i = 0; i < k; i++) {
        for (int64_t j = 0; j < k && !has(other, k, own[i]); j++) {
            if (has(own, k, other[j]))
                continue;
            double gap = fabs(scores[own[i]] - scores[other[j]]);
            int64_t from = own[i] / each * each, to = other[j] / each * each;
            if (from != to)
                gap = fmin(gap, fabs(best_two(scores + from, each) - best_two(scores + to, each)));
            best = fmin(best, gap);
        }
    }
    return best;
}

/* A choice that BF16 made otherwise, the first of a sequence: nothing before it differs. */
typedef struct {
    int n; /* of all such choices */
    int layer, token;
    double gap;
} flips;

static flips find_flips(const fx_golden *g, const trace *f32, const trace *bf16)
{
    flips f = {.n = 0};
    qv_safetensors *st;
    cr_assert_eq(qv_safetensors_open_dir(g->dir, &st), QV_OK);
    for (int32_t t = 0; t < f32->n_tokens; t++) {
        for (int l = 0; l < MAX_LAYERS; l++) {
            if (f32->logits[l] == NULL)
                continue;
            const int32_t *own = f32->chosen[l] + t * f32->k, *other = bf16->chosen[l] + t * f32->k;
            bool same = true;
            for (int64_t j = 0; j < f32->k; j++)
                same &= has(other, f32->k, own[j]);
            if (same || f.n++ > 0)
                continue;
            double scores[256];
            score(g, st, l, f32->logits[l] + t * f32->n_experts, f32->n_experts, scores);
            f.layer = l, f.token = t;
            f.gap =
                gap_of(qv_model_get_config(g->model), scores, own, other, f32->k, f32->n_experts);
        }
    }
    qv_safetensors_close(st);
    return f;
}

/* --- KL --------------------------------------------------------------------------------------- */

/* Sums over tokens of 0.5 (logprob - reference)^2. */
typedef struct {
    double sum, replayed, reference; /* reference: of its own BF16, over the cases that have it */
    int64_t n, n_reference;
    int n_flips;
} totals;

static double squares(const float *x, const float *y, int32_t n)
{
    double sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += 0.5 * ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
    return sum;
}

static void run_case(fx_golden *f32, fx_golden *bf16, const fx_case *c, totals *out)
{
    int32_t slot = fx_golden_slot(f32, c->adapter), n = c->n - 1;
    trace full = {.k = 0}, rounded = {.k = 0};
    qv_model_set_probe(f32->model, watch, &full);
    qv_model_set_probe(bf16->model, watch, &rounded);
    free(fx_golden_logprobs(f32, c, slot, 0));
    float *logprobs = fx_golden_logprobs(bf16, c, slot, 0);
    double sum = squares(logprobs, c->logprobs, n), replayed = sum;
    flips f = find_flips(f32, &full, &rounded);
    if (f.n > 0) {
        full.replay = true;
        qv_model_set_probe(bf16->model, watch, &full);
        float *again = fx_golden_logprobs(bf16, c, slot, 0);
        replayed = squares(again, c->logprobs, n);
        free(again);
        cr_expect_lt(f.gap, TIE, "%s %s: layer %d, token %d: no tie, scores differ by %g", f32->dir,
                     c->name, f.layer, f.token, f.gap);
        if (sum / n > 5e-4)
            fprintf(stderr,
                    "  %s: %d choices of experts differ, first at token %d, layer %d, where scores "
                    "are %.1e apart: KL %.1e, with the choices of float32 %.1e\n",
                    c->name, f.n, f.token, f.layer, f.gap, sum / n, replayed / n);
    }
    out->sum += sum, out->replayed += replayed, out->n += n, out->n_flips += f.n;
    if (c->bf16 != NULL) {
        out->reference += squares(c->bf16, c->logprobs, n);
        out->n_reference += n;
    }
    free(logprobs);
    free_trace(&full), free_trace(&rounded);
}

static void run_adapter(fx_golden *f32, fx_golden *bf16, const char *adapter, double most)
{
    totals t = {.n = 0};
    for (int i = 0; i < f32->n; i++) {
        if (strcmp(f32->cases[i].adapter, adapter) == 0)
            run_case(f32, bf16, &f32->cases[i], &t);
    }
    if (t.n == 0)
        return;
    double kl = t.sum / (double)t.n, replayed = t.replayed / (double)t.n;
    const char *name = adapter[0] != '\0' ? adapter : "base";
    fprintf(stderr, "%-20s %-14s KL %.1e", strrchr(f32->dir, '/') + 1, name, kl);
    if (t.n_flips > 0)
        fprintf(stderr, ", %d choices of experts differ, without them %.1e", t.n_flips, replayed);
    cr_expect_lt(t.n_flips > 0 ? fmin(kl, replayed) : kl, most, "%s %s: %g", f32->dir, name, kl);
    cr_expect_lt(replayed, MOST_OF_ARITHMETIC, "%s %s: %g", f32->dir, name, replayed);
    if (t.n_reference > 0) {
        double reference = t.reference / (double)t.n_reference;
        fprintf(stderr, "; the reference's own %.1e", reference);
        cr_expect_lt(kl, 2 * reference, "%s %s: %g, the reference's own %g", f32->dir, name, kl,
                     reference);
    }
    fprintf(stderr, "\n");
}

Test(golden_bf16, is_as_near_to_float32_as_the_reference_in_bf16_is)
{
    int found = 0;
    for (size_t m = 0; m < sizeof models / sizeof *models; m++) {
        fx_golden f32, bf16;
        qv_backend_options options = {.name = "cpu", .n_threads = 2};
        if (!fx_golden_open(&f32, models[m].name, &options))
            continue;
        options.arithmetic = "bf16";
        cr_assert(fx_golden_open(&bf16, models[m].name, &options));
        run_adapter(&f32, &bf16, "", models[m].most);
        for (int i = 0; i < f32.n_adapters; i++)
            run_adapter(&f32, &bf16, f32.adapters[i], models[m].most);
        fx_golden_close(&f32), fx_golden_close(&bf16);
        found++;
    }
    if (found == 0)
        cr_skip_test("data not present: golden models");
}
