/* The router: which experts a token goes to, and with what weights. Tokens beside each other, each
 * on one thread. Scores are float32; experts are compared in the order of their index, so that the
 * lowest wins among equals.
 */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

#define MAX_EXPERTS 4096
#define MAX_GROUPS  256

typedef struct {
    const qv_router *router;
    qv_tensor logits, ids, weights;
} router_ctx;

/* --- Scores ------------------------------------------------------------------------------- */

/* Sixteen logits are one vector, so rows are padded: -inf has score 0 in both kinds. */
static int64_t padded(int64_t n)
{
    return (n + 15) / 16 * 16;
}

/* In place: softmax over n numbers. */
static void softmax(float *x, int64_t n)
{
    v16 max = v_set1(-INFINITY), sum = v_zero();
    for (int64_t i = 0; i < n; i += 16)
        max = v_max(max, v_load(x + i));
    max = v_set1(v_max_lane(max));
    for (int64_t i = 0; i < n; i += 16) {
        v16 p = v_exp(v_sub(v_load(x + i), max));
        v_store(x + i, p);
        sum = v_add(sum, p);
    }
    v16 total = v_set1(v_sum(sum));
    for (int64_t i = 0; i < n; i += 16)
        v_store(x + i, v_div(v_load(x + i), total));
}

static void score_row(const router_ctx *c, int64_t t, float *score)
{
    int64_t n = c->logits.shape[1];
    memcpy(score, qv_row2(c->logits, t), (size_t)n * sizeof *score);
    for (int64_t i = n; i < padded(n); i++)
        score[i] = -INFINITY;
    if (c->router->kind == QV_ROUTER_SOFTMAX)
        softmax(score, padded(n));
    else
        for (int64_t i = 0; i < n; i += 16)
            v_store(score + i, v_sigmoid(v_load(score + i)));
}

/* --- Choice ------------------------------------------------------------------------------- */

/* Insert `id` with its value into a list of the best `most`, best first, and return its new length.
 * An equal one that came earlier stays in front. */
static int32_t insert(int32_t id, float value, int32_t n, int32_t most, int32_t *ids, float *values)
{
    if (n == most && !(value > values[n - 1]))
        return n;
    int32_t at = n < most ? n++ : n - 1;
    for (; at > 0 && values[at - 1] < value; at--) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
    return n;
}

/* The sum of the two highest of n values; with one, itself. */
static float best_two(const float *value, int64_t n)
{
    float first = value[0], second = n > 1 ? -INFINITY : 0.0f;
    for (int64_t i = 1; i < n; i++) {
        if (value[i] > first) {
            second = first;
            first = value[i];
        } else if (value[i] > second) {
            second = value[i];
        }
    }
    return first + second;
}

/* Mark the groups that may be chosen from. */
static void choose_groups(const qv_router *r, const float *value, int64_t n_each, bool *chosen)
{
    int32_t ids[MAX_GROUPS], n = 0;
    float best[MAX_GROUPS];
    for (int32_t g = 0; g < r->n_groups; g++) {
        chosen[g] = false;
        n = insert(g, best_two(value + g * n_each, n_each), n, r->topk_groups, ids, best);
    }
    for (int32_t i = 0; i < n; i++)
        chosen[ids[i]] = true;
}

/* ids[top_k], best first. `best` is room for as many values. */
static void choose(const qv_router *r, const float *value, int64_t n_experts, int32_t *ids,
                   float *best)
{
    int64_t n_each = n_experts / r->n_groups;
    bool chosen[MAX_GROUPS] = {true};
    if (r->n_groups > 1)
        choose_groups(r, value, n_each, chosen);
    int32_t n = 0;
    for (int32_t g = 0; g < r->n_groups; g++)
        for (int64_t e = g * n_each; chosen[g] && e < (g + 1) * n_each; e++)
            n = insert((int32_t)e, value[e], n, r->top_k, ids, best);
}

/* --- Rows --------------------------------------------------------------------------------- */

/* What experts are chosen by. NaNs come last. */
static void values_of(const router_ctx *c, int64_t t, const float *score, float *value)
{
    const qv_router *r = c->router;
    const float *bias = r->bias.data, *from = score;
    if (r->kind == QV_ROUTER_SOFTMAX && bias == NULL && r->n_groups == 1)
        from = qv_row2(c->logits, t); /* in their order, which rounding may take from scores */
    for (int64_t i = 0; i < c->logits.shape[1]; i++) {
        float v = bias != NULL ? from[i] + bias[i] : from[i];
        value[i] = isnan(v) ? -INFINITY : v;
    }
}

static void route_row(const router_ctx *c, int64_t t)
{
    const qv_router *r = c->router;
    int64_t n_experts = c->logits.shape[1];
    float score[MAX_EXPERTS], value[MAX_EXPERTS];
    score_row(c, t, score);
    values_of(c, t, score, value);
    int32_t *ids = (int32_t *)c->ids.data + t * r->top_k;
    float *weights = qv_row2(c->weights, t), sum = 0;
    choose(r, value, n_experts, ids, weights);
    for (int32_t j = 0; j < r->top_k; j++) {
        weights[j] = score[ids[j]];
        sum += weights[j];
    }
    if (r->kind == QV_ROUTER_SIGMOID)
        sum += 1e-20f;
    for (int32_t j = 0; j < r->top_k; j++)
        weights[j] = (r->normalize ? weights[j] / sum : weights[j]) * r->scale;
}

static void route_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        route_row(ctx, t);
}

qv_status QV_ISA(qv_cpu_router)(qv_backend *be, const qv_router *router, qv_tensor logits,
                                qv_tensor ids, qv_tensor weights)
{
    int64_t n_experts = logits.shape[1];
    if (n_experts > MAX_EXPERTS || router->n_groups > MAX_GROUPS)
        return qv_fail(QV_ERR_LIMIT, "router: %lld experts in %d groups, but %d in %d are possible",
                       (long long)n_experts, router->n_groups, MAX_EXPERTS, MAX_GROUPS);
    router_ctx c = {.router = router, .logits = logits, .ids = ids, .weights = weights};
    int64_t ns = n_experts * 3 + router->top_k * (router->top_k + 8);
    qv_pool_run(qv_cpu(be)->pool, logits.shape[0], ns, route_rows, &c);
    return QV_OK;
}
