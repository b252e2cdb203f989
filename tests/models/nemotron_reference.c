#include "tests/models/nemotron_reference.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- Tools ------------------------------------------------------------------------------------ */

typedef struct {
    const qv_model_config *c;
    fx_file *file;
    int64_t layer;
    int32_t n; /* tokens */
} reference;

static double *zeros(int64_t n)
{
    double *x = calloc((size_t)n + 1, sizeof *x);
    QV_ASSERT(x != NULL);
    return x;
}

/* A tensor of the layer (of the whole model when that is -1), widened. The caller frees. */
static double *tensor(const reference *r, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static double *tensor(const reference *r, const char *format, ...)
{
    char full[200];
    int used =
        r->layer < 0 ? 0 : snprintf(full, sizeof full, "backbone.layers.%" PRId64 ".", r->layer);
    va_list args;
    va_start(args, format);
    vsnprintf(full + used, sizeof full - (size_t)used, format, args);
    va_end(args);
    const fx_tensor *t = fx_find(r->file, full);
    int64_t n = 1;
    for (int i = 0; i < t->n_dims; i++)
        n *= t->shape[i];
    float *values = malloc((size_t)n * sizeof *values);
    QV_ASSERT(qv_dtype_to_f32(t->dtype, t->data, values, n) == QV_OK);
    double *out = zeros(n);
    for (int64_t i = 0; i < n; i++)
        out[i] = values[i];
    free(values);
    return out;
}

/* y[rows] = w[rows, cols] x */
static void multiply(const double *w, const double *x, int64_t rows, int64_t cols, double *y)
{
    for (int64_t i = 0; i < rows; i++) {
        y[i] = 0;
        for (int64_t k = 0; k < cols; k++)
            y[i] += w[i * cols + k] * x[k];
    }
}

static double silu(double x)
{
    return x / (1 + exp(-x));
}

/* x[n] over its root mean square, times w. */
static void rms_norm(double *x, const double *w, int64_t n, double eps)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    double scale = 1 / sqrt(sum / (double)n + eps);
    for (int64_t i = 0; i < n; i++)
        x[i] *= scale * w[i];
}

/* --- Mixers: x and y are [n, hidden] ---------------------------------------------------------- */

/* Channel `ch` of the convolution at token `t`, with SiLU: p is [n, width], the channels begin at
 * `first`. */
static double convolve(const reference *r, const double *p, int64_t width, int64_t first,
                       int64_t ch, int32_t t, const double *w, const double *bias)
{
    int64_t taps = r->c->conv_kernel;
    double sum = bias[ch];
    for (int64_t j = 0; j < taps; j++) {
        int64_t at = t - (taps - 1) + j;
        if (at >= 0)
            sum += w[ch * taps + j] * p[at * width + first + ch];
    }
    return silu(sum);
}

static void mamba(const reference *r, const double *x, double *y)
{
    const qv_model_config *c = r->c;
    int64_t inner = c->ssm_heads * c->ssm_head_dim, bc = c->ssm_groups * c->ssm_state;
    int64_t channels = inner + 2 * bc, width = inner + channels + c->ssm_heads;
    int64_t state = c->ssm_state, dim = c->ssm_head_dim, group_size = inner / c->ssm_groups;
    double *in = tensor(r, "mixer.in_proj.weight"), *out = tensor(r, "mixer.out_proj.weight");
    double *conv = tensor(r, "mixer.conv1d.weight"), *bias = tensor(r, "mixer.conv1d.bias");
    double *a_log = tensor(r, "mixer.A_log"), *skip = tensor(r, "mixer.D");
    double *dt_bias = tensor(r, "mixer.dt_bias"), *norm = tensor(r, "mixer.norm.weight");
    double *p = zeros(r->n * width), *s = zeros(inner * state), *u = zeros(inner);
    double *xbc = zeros(channels);
    for (int32_t t = 0; t < r->n; t++)
        multiply(in, x + t * c->hidden, width, c->hidden, p + t * width);
    for (int32_t t = 0; t < r->n; t++) {
        const double *z = p + t * width, *dt_raw = z + inner + channels;
        for (int64_t ch = 0; ch < channels; ch++)
            xbc[ch] = convolve(r, p, width, inner, ch, t, conv, bias);
        for (int64_t h = 0; h < c->ssm_heads; h++) {
            int64_t group = h / (c->ssm_heads / c->ssm_groups);
            const double *b = xbc + inner + group * state, *cc = b + bc;
            double dt = log1p(exp(dt_raw[h] + dt_bias[h])), decay = exp(-exp(a_log[h]) * dt);
            for (int64_t d = 0; d < dim; d++) {
                double *row = s + (h * dim + d) * state, xd = xbc[h * dim + d];
                double sum = skip[h] * xd;
                for (int64_t k = 0; k < state; k++) {
                    row[k] = decay * row[k] + dt * xd * b[k];
                    sum += row[k] * cc[k];
                }
                u[h * dim + d] = sum * silu(z[h * dim + d]); /* the gate comes before the norm */
            }
        }
        for (int64_t g = 0; g < c->ssm_groups; g++)
            rms_norm(u + g * group_size, norm + g * group_size, group_size, c->norm_eps);
        multiply(out, u, c->hidden, inner, y + t * c->hidden);
    }
    free(in), free(out), free(conv), free(bias), free(a_log), free(skip), free(dt_bias), free(norm);
    free(p), free(s), free(u), free(xbc);
}

/* No positions, no norms, no gate. */
static void attention(const reference *r, const double *x, double *y)
{
    const qv_model_config *c = r->c;
    int64_t nq = c->n_heads * c->head_dim, nkv = c->n_kv_heads * c->head_dim, d = c->head_dim;
    double *wq = tensor(r, "mixer.q_proj.weight"), *wk = tensor(r, "mixer.k_proj.weight");
    double *wv = tensor(r, "mixer.v_proj.weight"), *wo = tensor(r, "mixer.o_proj.weight");
    double *q = zeros(nq), *k = zeros(r->n * nkv), *v = zeros(r->n * nkv);
    double *out = zeros(nq), *score = zeros(r->n);
    for (int32_t t = 0; t < r->n; t++) {
        multiply(wq, x + t * c->hidden, nq, c->hidden, q);
        multiply(wk, x + t * c->hidden, nkv, c->hidden, k + t * nkv);
        multiply(wv, x + t * c->hidden, nkv, c->hidden, v + t * nkv);
        for (int64_t h = 0; h < c->n_heads; h++) {
            int64_t kv = h / (c->n_heads / c->n_kv_heads) * d;
            double total = 0;
            for (int32_t j = 0; j <= t; j++) {
                double dot = 0;
                for (int64_t i = 0; i < d; i++)
                    dot += q[h * d + i] * k[j * nkv + kv + i];
                total += score[j] = exp(dot / sqrt((double)d));
            }
            for (int64_t i = 0; i < d; i++) {
                out[h * d + i] = 0;
                for (int32_t j = 0; j <= t; j++)
                    out[h * d + i] += score[j] / total * v[j * nkv + kv + i];
            }
        }
        multiply(wo, out, c->hidden, nq, y + t * c->hidden);
    }
    free(wq), free(wk), free(wv), free(wo), free(q), free(k), free(v), free(out), free(score);
}

/* down(relu(up(x))^2) of one token, `in` wide and `ffn` inside. */
static void mlp(const double *up, const double *down, const double *x, int64_t in, int64_t ffn,
                double *y)
{
    double *u = zeros(ffn);
    multiply(up, x, ffn, in, u);
    for (int64_t i = 0; i < ffn; i++)
        u[i] = u[i] > 0 ? u[i] * u[i] : 0;
    multiply(down, u, in, ffn, y);
    free(u);
}

static void dense(const reference *r, const double *x, double *y)
{
    const qv_model_config *c = r->c;
    double *up = tensor(r, "mixer.up_proj.weight"), *down = tensor(r, "mixer.down_proj.weight");
    for (int32_t t = 0; t < r->n; t++)
        mlp(up, down, x + t * c->hidden, c->hidden, c->ffn, y + t * c->hidden);
    free(up), free(down);
}

/* The index of the largest of x[n] that is not taken, the first of equals. */
static int64_t take_largest(const double *x, int64_t n, bool *taken)
{
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++) {
        if (!taken[i] && (best < 0 || x[i] > x[best]))
            best = i;
    }
    taken[best] = true;
    return best;
}

/* Weights [n_experts] of one token, 0 for those not chosen. The bias takes part in the choice
 * only; a group counts by the sum of its two best. */
static void route(const reference *r, const double *gate, const double *bias, const double *x,
                  double *weights)
{
    const qv_model_config *c = r->c;
    int64_t n = c->n_experts, size = n / c->router_groups;
    double *score = zeros(n), *choice = zeros(n), *group = zeros(c->router_groups), sum = 0;
    bool *taken = calloc((size_t)n, 1), *open = calloc((size_t)n, 1);
    multiply(gate, x, n, c->hidden, score);
    for (int64_t e = 0; e < n; e++) {
        score[e] = 1 / (1 + exp(-score[e]));
        choice[e] = score[e] + bias[e];
        weights[e] = 0;
    }
    for (int64_t g = 0; g < c->router_groups; g++) {
        bool best_two[64] = {false};
        for (int k = 0; k < 2 && k < size; k++)
            group[g] += choice[g * size + take_largest(choice + g * size, size, best_two)];
    }
    for (int64_t k = 0; k < c->router_topk_groups; k++)
        take_largest(group, c->router_groups, open);
    for (int64_t e = 0; e < n; e++)
        taken[e] = !open[e / size];
    for (int64_t k = 0; k < c->moe_top_k; k++) {
        int64_t e = take_largest(choice, n, taken);
        sum += weights[e] = score[e];
    }
    for (int64_t e = 0; e < n; e++)
        weights[e] *= c->router_scale / (c->router_normalize ? sum : 1);
    free(score), free(choice), free(group), free(taken), free(open);
}

static void experts(const reference *r, const double *x, double *y)
{
    const qv_model_config *c = r->c;
    int64_t width = c->moe_latent > 0 ? c->moe_latent : c->hidden;
    double *gate = tensor(r, "mixer.gate.weight");
    double *bias = tensor(r, "mixer.gate.e_score_correction_bias");
    double *up = tensor(r, "mixer.shared_experts.up_proj.weight");
    double *down = tensor(r, "mixer.shared_experts.down_proj.weight");
    double *fc1 = c->moe_latent > 0 ? tensor(r, "mixer.fc1_latent_proj.weight") : NULL;
    double *fc2 = c->moe_latent > 0 ? tensor(r, "mixer.fc2_latent_proj.weight") : NULL;
    double *weights = zeros(c->n_experts), *u = zeros(width), *one = zeros(width);
    double *sum = zeros(width), *wide = zeros(c->hidden);
    for (int32_t t = 0; t < r->n; t++) {
        const double *xt = x + t * c->hidden;
        double *yt = y + t * c->hidden;
        route(r, gate, bias, xt, weights);
        memcpy(u, xt, sizeof *u * (size_t)(fc1 ? 0 : width));
        if (fc1 != NULL)
            multiply(fc1, xt, width, c->hidden, u);
        memset(sum, 0, sizeof *sum * (size_t)width);
        for (int64_t e = 0; e < c->n_experts; e++) {
            if (weights[e] == 0)
                continue;
            double *e_up = tensor(r, "mixer.experts.%" PRId64 ".up_proj.weight", e);
            double *e_down = tensor(r, "mixer.experts.%" PRId64 ".down_proj.weight", e);
            mlp(e_up, e_down, u, width, c->moe_ffn, one);
            for (int64_t i = 0; i < width; i++)
                sum[i] += weights[e] * one[i];
            free(e_up), free(e_down);
        }
        memcpy(wide, sum, sizeof *wide * (size_t)(fc2 ? 0 : width));
        if (fc2 != NULL)
            multiply(fc2, sum, c->hidden, width, wide);
        mlp(up, down, xt, c->hidden, c->shared_ffn, yt);
        for (int64_t i = 0; i < c->hidden; i++)
            yt[i] += wide[i];
    }
    free(gate), free(bias), free(up), free(down), free(fc1), free(fc2);
    free(weights), free(u), free(one), free(sum), free(wide);
}

/* --- The model -------------------------------------------------------------------------------- */

double *nemotron_reference(const qv_model_config *config, fx_file *file, const int32_t *tokens,
                           int32_t n)
{
    reference r = {.c = config, .file = file, .layer = -1, .n = n};
    int64_t hidden = config->hidden;
    double *embedding = tensor(&r, "backbone.embeddings.weight");
    double *final = tensor(&r, "backbone.norm_f.weight"), *head = tensor(&r, "lm_head.weight");
    double *x = zeros(n * hidden), *h = zeros(n * hidden), *y = zeros(n * hidden);
    double *logits = zeros(n * config->vocab);
    for (int32_t t = 0; t < n; t++)
        memcpy(x + t * hidden, embedding + tokens[t] * hidden, sizeof *x * (size_t)hidden);
    for (r.layer = 0; r.layer < config->n_layers; r.layer++) {
        uint16_t parts = config->layer_parts[r.layer];
        double *norm = tensor(&r, "norm.weight");
        memcpy(h, x, sizeof *h * (size_t)(n * hidden));
        for (int32_t t = 0; t < n; t++)
            rms_norm(h + t * hidden, norm, hidden, config->norm_eps);
        if (parts & QV_PART_SSM)
            mamba(&r, h, y);
        else if (parts & QV_PART_ATTENTION)
            attention(&r, h, y);
        else if (parts & QV_PART_MOE)
            experts(&r, h, y);
        else
            dense(&r, h, y);
        for (int64_t i = 0; i < n * hidden; i++)
            x[i] += y[i];
        free(norm);
    }
    for (int32_t t = 0; t < n; t++) {
        rms_norm(x + t * hidden, final, hidden, config->norm_eps);
        multiply(head, x + t * hidden, config->vocab, hidden, logits + t * config->vocab);
    }
    free(embedding), free(final), free(head), free(x), free(h), free(y);
    return logits;
}
