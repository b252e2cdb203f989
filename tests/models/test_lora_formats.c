/* Routed experts, embedding and head: every form that trainers write means the same change of the
 * weights, and what does not is refused by name. */
#include "models/lora.h"
#include "models/lora_pool.h"
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    N = 11,
    VOCAB = 50,
    HIDDEN = 24,
    RANK = 3,
    MAX_E = 6,
    MAX_IN = 24,
    FFN = 10,
    SLOT_RANK = 16
};
static const int32_t tokens[N] = {3, 41, 5, 9, 0, 49, 7, 7, 12, 30, 2};

typedef struct {
    fx_file file;
    char config[1024];
} draft;

/* --- One change of the weights ---------------------------------------------------------------- */

/* Of one layer. The sides that face the residual stream are the same for all experts, so that every
 * form can say it; the up-projection's A is that of the gate, too. */
typedef struct {
    float a_in[RANK * MAX_IN];         /* [rank, n_in] */
    float b_in[MAX_E][2 * FFN * RANK]; /* [gate and up, rank]; up alone without a gate */
    float a_out[MAX_E][RANK * FFN];    /* [rank, ffn] */
    float b_out[MAX_IN * RANK];        /* [n_in, rank] */
} change;

typedef struct {
    fx_moe m;
    int64_t e, in, wide; /* experts, their input, rows of the in-projection */
    change layers[2];
} delta;

/* Numbers that every dtype holds. */
static void draw(qv_rng *rng, float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)qv_rng_range(rng, -24, 25) / 64;
}

static delta new_delta(fx_moe_kind kind)
{
    delta d = {.m = fx_moe_model(kind)};
    qv_rng rng = qv_rng_seed(4 + kind);
    d.e = d.m.n_experts, d.in = d.m.n_in, d.wide = d.m.gated ? 2 * FFN : FFN;
    for (int l = 0; l < 2; l++) {
        change *c = &d.layers[l];
        draw(&rng, c->a_in, RANK * d.in);
        draw(&rng, c->b_out, RANK * d.in);
        for (int64_t e = 0; e < d.e; e++) {
            draw(&rng, c->b_in[e], d.wide * RANK);
            draw(&rng, c->a_out[e], RANK * FFN);
        }
    }
    return d;
}

/* w [rows, cols] += 2 b a: alpha / rank is 2 everywhere. */
static void merge(float *w, const float *b, const float *a, int64_t rows, int64_t cols)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++)
            for (int64_t k = 0; k < RANK; k++)
                w[i * cols + j] += 2 * b[i * RANK + k] * a[k * cols + j];
}

/* The checkpoint with the change of the in-projection, the out-projection, or both. */
static void merge_delta(fx_file *model, const delta *d, bool in, bool out)
{
    for (int l = 0; l < 2; l++) {
        const change *c = &d->layers[l];
        for (int64_t e = 0; e < d->e; e++) {
            char up[128], down[128];
            const char *end = d->m.gated ? "gate_up_proj" : "up_proj.weight";
            char number[16] = "";
            if (!d->m.gated)
                snprintf(number, sizeof number, "%d.", (int)e);
            snprintf(up, sizeof up, "%slayers.%d.%s.%s%s", d->m.prefix, d->m.layers[l],
                     d->m.experts, number, end);
            snprintf(down, sizeof down, "%slayers.%d.%s.%sdown_proj%s", d->m.prefix, d->m.layers[l],
                     d->m.experts, number, d->m.gated ? "" : ".weight");
            int64_t skip = d->m.gated ? e : 0;
            if (in)
                merge((float *)fx_find(model, up)->data + skip * d->wide * d->in, c->b_in[e],
                      c->a_in, d->wide, d->in);
            if (out)
                merge((float *)fx_find(model, down)->data + skip * d->in * FFN, c->b_out,
                      c->a_out[e], d->in, FFN);
        }
    }
}

/* --- Forms ------------------------------------------------------------------------------------ */

/* How to write it down. */
typedef struct {
    const char *start; /* of names; NULL: "base_model.model.model." */
    qv_dtype dtype;
    bool swapped, grouped, doubled; /* of flat pairs */
    bool shared_a, shared_b;        /* of pairs of all experts */
    bool skip_in, skip_out;
} how;

static void add(draft *d, const how *h, int layer, const delta *x, const char *rest, int n_dims,
                const int64_t *shape, const float *values)
{
    char name[200];
    snprintf(name, sizeof name, "%slayers.%d.%s%s",
             h->start != NULL ? h->start : "base_model.model.model.", x->m.layers[layer],
             x->m.experts, rest);
    fx_add(&d->file, name, h->dtype, n_dims, shape, values);
}

/* One pair an expert. */
static void write_single(draft *d, const how *h, const delta *x, int l)
{
    const change *c = &x->layers[l];
    for (int e = 0; e < x->e; e++) {
        char rest[64];
        const char *const in[] = {x->m.gated ? "gate_proj" : "up_proj", "up_proj"};
        for (int i = 0; i < x->wide / FFN && !h->skip_in; i++) {
            snprintf(rest, sizeof rest, ".%d.%s.lora_A.weight", e, in[i]);
            add(d, h, l, x, rest, 2, (int64_t[]){RANK, x->in}, c->a_in);
            snprintf(rest, sizeof rest, ".%d.%s.lora_B.weight", e, in[i]);
            add(d, h, l, x, rest, 2, (int64_t[]){FFN, RANK}, c->b_in[e] + i * FFN * RANK);
        }
        if (h->skip_out)
            continue;
        snprintf(rest, sizeof rest, ".%d.down_proj.lora_A.weight", e);
        add(d, h, l, x, rest, 2, (int64_t[]){RANK, FFN}, c->a_out[e]);
        snprintf(rest, sizeof rest, ".%d.down_proj.lora_B.weight", e);
        add(d, h, l, x, rest, 2, (int64_t[]){x->in, RANK}, c->b_out);
    }
}

/* The same matrix for each expert, or once for all. */
static void add_outer(draft *d, const how *h, const delta *x, int l, const char *rest, bool shared,
                      int64_t rows, int64_t cols, const float *values)
{
    float all[MAX_E * MAX_IN * RANK];
    int64_t n = shared ? 1 : x->e;
    for (int64_t e = 0; e < n; e++)
        memcpy(all + e * rows * cols, values, (size_t)(rows * cols) * sizeof *all);
    add(d, h, l, x, rest, 3, (int64_t[]){n, rows, cols}, all);
}

/* Rows [first, first + n) of the in-projection's B for all experts. */
static void add_b_in(draft *d, const how *h, const delta *x, int l, const char *rest, int64_t first,
                     int64_t n)
{
    float all[MAX_E * 2 * FFN * RANK];
    for (int64_t e = 0; e < x->e; e++)
        memcpy(all + e * n * RANK, x->layers[l].b_in[e] + first * RANK,
               (size_t)(n * RANK) * sizeof *all);
    add(d, h, l, x, rest, 3, (int64_t[]){x->e, n, RANK}, all);
}

static void add_out(draft *d, const how *h, const delta *x, int l, const char *name,
                    const char *end)
{
    char rest[64];
    float all[MAX_E * FFN * RANK];
    for (int64_t e = 0; e < x->e; e++)
        memcpy(all + e * FFN * RANK, x->layers[l].a_out[e], FFN * RANK * sizeof *all);
    snprintf(rest, sizeof rest, "%s.lora_A%s", name, end);
    add(d, h, l, x, rest, 3, (int64_t[]){x->e, RANK, FFN}, all);
    snprintf(rest, sizeof rest, "%s.lora_B%s", name, end);
    add_outer(d, h, x, l, rest, h->shared_b, x->in, RANK, x->layers[l].b_out);
}

/* w1, w2, w3: pairs of all experts. */
static void write_w(draft *d, const how *h, const delta *x, int l)
{
    static const char *const gated[] = {".w1", ".w3"};
    for (int i = 0; i < x->wide / FFN; i++) {
        char rest[64];
        snprintf(rest, sizeof rest, "%s.lora_A.weight", gated[i]);
        add_outer(d, h, x, l, rest, h->shared_a, RANK, x->in, x->layers[l].a_in);
        snprintf(rest, sizeof rest, "%s.lora_B.weight", gated[i]);
        add_b_in(d, h, x, l, rest, i * FFN, FFN);
    }
    if (!x->m.gated) { /* no such matrix, said by tensors without elements */
        add(d, h, l, x, ".w3.lora_A.weight", 1, (int64_t[]){0}, NULL);
        add(d, h, l, x, ".w3.lora_B.weight", 1, (int64_t[]){0}, NULL);
    }
    add_out(d, h, x, l, ".w2", ".weight");
}

/* Merged: gate and up in one pair of all experts. */
static void write_merged(draft *d, const how *h, const delta *x, int l)
{
    char rest[64];
    const char *in = x->m.gated ? ".gate_up_proj" : ".up_proj";
    snprintf(rest, sizeof rest, "%s.lora_A", in);
    add_outer(d, h, x, l, rest, h->shared_a, RANK, x->in, x->layers[l].a_in);
    snprintf(rest, sizeof rest, "%s.lora_B", in);
    add_b_in(d, h, x, l, rest, 0, x->wide);
    add_out(d, h, x, l, ".down_proj", "");
}

/* A flat pair from a_e [rank, p] and b_e [q, rank], each of which may be the same for all. */
static void add_flat(draft *d, const how *h, const delta *x, int l, const char *wrapper,
                     int64_t rank, int64_t p, int64_t q, const float *const *a,
                     const float *const *b)
{
    char rest[64];
    float *flat_a = calloc((size_t)(x->e * rank * (p + q)), sizeof *flat_a);
    float *flat_b = calloc((size_t)(x->e * rank * (p + q)), sizeof *flat_b);
    int64_t cols = h->swapped ? q : p, rows = h->swapped ? p : q;
    for (int64_t e = 0; e < x->e; e++) {
        for (int64_t k = 0; k < rank; k++) {
            for (int64_t i = 0; i < cols; i++)
                flat_a[(e * rank + k) * cols + i] =
                    h->swapped ? b[e][i * rank + k] : a[e][k * p + i];
            for (int64_t i = 0; i < rows; i++)
                flat_b[i * rank * x->e + (h->grouped ? e * rank + k : k * x->e + e)] =
                    h->swapped ? a[e][k * p + i] : b[e][i * rank + k];
        }
    }
    snprintf(rest, sizeof rest, "%s.lora_A.weight", wrapper);
    add(d, h, l, x, rest, 2, (int64_t[]){x->e * rank, cols}, flat_a);
    snprintf(rest, sizeof rest, "%s.lora_B.weight", wrapper);
    add(d, h, l, x, rest, 2, (int64_t[]){rows, rank * x->e}, flat_b);
    free(flat_a), free(flat_b);
}

/* PEFT's wrappers of parameters; doubled: gate and up as two blocks of twice the rank. */
static void write_flat(draft *d, const how *h, const delta *x, int l)
{
    const change *c = &x->layers[l];
    const float *a[MAX_E], *b[MAX_E];
    static float a2[2 * RANK * MAX_IN], b2[MAX_E][2 * FFN * 2 * RANK];
    int64_t rank = h->doubled ? 2 * RANK : RANK;
    memset(b2, 0, sizeof b2);
    for (int half = 0; half < 2; half++)
        memcpy(a2 + half * RANK * x->in, c->a_in, (size_t)(RANK * x->in) * sizeof *a2);
    for (int64_t e = 0; e < x->e; e++) {
        for (int64_t i = 0; i < x->wide; i++)
            for (int64_t k = 0; k < RANK; k++)
                b2[e][i * 2 * RANK + (i < FFN ? 0 : RANK) + k] = c->b_in[e][i * RANK + k];
        a[e] = h->doubled ? a2 : c->a_in;
        b[e] = h->doubled ? b2[e] : c->b_in[e];
    }
    bool both = !h->skip_in && !h->skip_out;
    if (!h->skip_in)
        add_flat(d, h, x, l, both ? ".base_layer" : "", rank, x->in, x->wide, a, b);
    for (int64_t e = 0; e < x->e; e++)
        a[e] = c->a_out[e], b[e] = c->b_out;
    if (!h->skip_out)
        add_flat(d, h, x, l, "", RANK, FFN, x->in, a, b);
}

typedef void write_fn(draft *d, const how *h, const delta *x, int layer);

#define CONFIG(more) "{\"peft_type\": \"LORA\", \"r\": 3, \"lora_alpha\": 6" more "}"

static draft write_form(write_fn *fn, const how *h, const delta *x, const char *config)
{
    draft d = {.file = {.n = 0}};
    snprintf(d.config, sizeof d.config, "%s", config);
    for (int l = 0; l < 2; l++)
        fn(&d, h, x, l);
    return d;
}

static const char *write_draft(const draft *d)
{
    const char *dir = qv_temp_dir();
    qv_write_text(qv_path(dir, "adapter_config.json"), d->config);
    fx_write(&d->file, qv_path(dir, "adapter_model.safetensors"));
    return dir;
}

/* Forms with the same `same` have the same digest. */
static const struct {
    const char *what;
    write_fn *write;
    how h;
    const char *config;
    int same;
    bool gated_only;
} forms[] = {
    {"a pair an expert", write_single, {.dtype = QV_F32}, CONFIG(""), 1, false},
    {"a pair an expert, BF16, of a multimodal model",
     write_single,
     {.dtype = QV_BF16, .start = "base_model.model.model.language_model."},
     CONFIG(""),
     1,
     false},
    {"a pair an expert, of the remote code's names",
     write_single,
     {.dtype = QV_F16, .start = "base_model.model.backbone."},
     CONFIG(""),
     1,
     false},
    {"w1, w2, w3", write_w, {.dtype = QV_F32}, CONFIG(""), 1, false},
    {"w1, w2, w3, outer sides shared",
     write_w,
     {.dtype = QV_F32, .shared_a = true, .shared_b = true},
     CONFIG(""),
     2,
     false},
    {"w1, w2, w3, A shared", write_w, {.dtype = QV_BF16, .shared_a = true}, CONFIG(""), 3, false},
    {"w1, w2, w3, B shared", write_w, {.dtype = QV_F32, .shared_b = true}, CONFIG(""), 4, false},
    {"merged", write_merged, {.dtype = QV_F32}, CONFIG(""), 5, false},
    {"merged, outer sides shared",
     write_merged,
     {.dtype = QV_F32, .shared_a = true, .shared_b = true},
     CONFIG(""),
     6,
     false},
    {"flat", write_flat, {.dtype = QV_F32}, CONFIG(", \"peft_version\": \"0.19.1\""), 5, false},
    {"flat, BF16", write_flat, {.dtype = QV_BF16}, CONFIG(""), 5, false},
    {"flat, swapped",
     write_flat,
     {.dtype = QV_F32, .swapped = true},
     CONFIG(", \"peft_version\": \"0.18.0\""),
     5,
     false},
    {"flat, B grouped",
     write_flat,
     {.dtype = QV_F32, .grouped = true},
     CONFIG(", \"expert_b_packing\": \"grouped\""),
     5,
     false},
    {"flat, of twice the rank",
     write_flat,
     {.dtype = QV_F32, .doubled = true},
     CONFIG(", \"rank_pattern\": {\".*\\\\.gate_up_proj\": 6},"
            " \"alpha_pattern\": {\".*\\\\.gate_up_proj\": 12}"),
     7,
     true},
};
enum { N_FORMS = sizeof forms / sizeof *forms };

/* --- What they do ----------------------------------------------------------------------------- */

static float *logits_of(const char *model_dir, const char *adapter_dir, char *digest)
{
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, model_dir, &limits);
    int32_t slot = -1;
    if (adapter_dir != NULL) {
        qv_adapter *adapter;
        cr_assert_eq(qv_adapter_open(model, adapter_dir, &adapter), QV_OK, "%s", qv_error());
        slot = 3;
        cr_assert_eq(qv_model_adapter_install(model, slot, adapter), QV_OK, "%s", qv_error());
        if (digest != NULL)
            strcpy(digest, qv_adapter_digest(adapter));
        qv_adapter_close(adapter);
    }
    float *logits = fx_run(model, tokens, N, 0, slot, 0, 0);
    qv_model_close(model);
    qv_backend_close(be);
    return logits;
}

static double furthest(const float *x, const float *y)
{
    double worst = 0;
    for (int i = 0; i < N * VOCAB; i++)
        worst = fmax(worst, fabs((double)x[i] - y[i]));
    return worst;
}

Test(lora_formats, every_form_of_one_change_equals_merged_weights)
{
    for (int kind = FX_QWEN_MOE; kind <= FX_NEMOTRON; kind++) {
        delta x = new_delta((fx_moe_kind)kind);
        fx_file model = {.n = 0};
        fx_random_moe(&model, (fx_moe_kind)kind, QV_F32, 31);
        const char *dir = fx_write_model(x.m.config, &model);
        float *base = logits_of(dir, NULL, NULL);
        merge_delta(&model, &x, true, true);
        float *merged = logits_of(fx_write_model(x.m.config, &model), NULL, NULL);
        cr_assert_gt(furthest(base, merged), 0.05);
        char digests[N_FORMS][33];
        for (int i = 0; i < N_FORMS; i++) {
            digests[i][0] = '\0';
            if (forms[i].gated_only && !x.m.gated)
                continue;
            draft d = write_form(forms[i].write, &forms[i].h, &x, forms[i].config);
            float *adapted = logits_of(dir, write_draft(&d), digests[i]);
            cr_expect(qv_close_f32(forms[i].what, adapted, merged, N * VOCAB, 5e-5));
            for (int k = 0; k < i; k++) {
                /* Without a gate, a merged pair is a plain one. */
                int same_k = !x.m.gated && forms[k].same == 1 ? 5 : forms[k].same;
                int same_i = !x.m.gated && forms[i].same == 1 ? 5 : forms[i].same;
                same_k = !x.m.gated && same_k == 2 ? 6 : same_k;
                same_i = !x.m.gated && same_i == 2 ? 6 : same_i;
                cr_expect_eq(strcmp(digests[i], digests[k]) == 0, same_i == same_k, "%s and %s",
                             forms[i].what, forms[k].what);
            }
            free(adapted);
            fx_free(&d.file);
        }
        free(base), free(merged);
        fx_free(&model);
    }
}

Test(lora_formats, a_single_wrapper_is_of_the_parameter_that_the_config_names)
{
    static const struct {
        bool in;
        const char *qwen, *nemotron;
    } rows[] = {
        {true, CONFIG(", \"target_parameters\": [\"experts.gate_up_proj\"]"),
         CONFIG(", \"target_parameters\": [\"mixer.experts.up_proj\"]")},
        {false, CONFIG(", \"target_parameters\": [\"down_proj\"]"),
         CONFIG(", \"target_parameters\": [\"experts.down_proj\"]")},
    };
    for (int kind = FX_QWEN_MOE; kind <= FX_NEMOTRON; kind++) {
        delta x = new_delta((fx_moe_kind)kind);
        for (int i = 0; i < 4; i++) {
            bool in = rows[i / 2].in;
            how h = {.dtype = QV_F32, .swapped = i % 2, .skip_in = !in, .skip_out = in};
            fx_file model = {.n = 0};
            fx_random_moe(&model, (fx_moe_kind)kind, QV_F32, 32);
            const char *dir = fx_write_model(x.m.config, &model);
            merge_delta(&model, &x, in, !in);
            float *merged = logits_of(fx_write_model(x.m.config, &model), NULL, NULL);
            draft d =
                write_form(write_flat, &h, &x, x.m.gated ? rows[i / 2].qwen : rows[i / 2].nemotron);
            float *adapted = logits_of(dir, write_draft(&d), NULL);
            cr_expect(qv_close_f32(in ? "in" : "out", adapted, merged, N * VOCAB, 5e-5));
            free(merged), free(adapted);
            fx_free(&d.file), fx_free(&model);
        }
    }
}

Test(lora_formats, experts_that_an_adapter_lacks_stay_as_they_are)
{
    for (int kind = FX_QWEN_MOE; kind <= FX_NEMOTRON; kind++) {
        delta x = new_delta((fx_moe_kind)kind);
        fx_file model = {.n = 0};
        fx_random_moe(&model, (fx_moe_kind)kind, QV_F32, 33);
        const char *dir = fx_write_model(x.m.config, &model);
        draft d = write_form(write_single, &(how){.dtype = QV_F32}, &x, CONFIG(""));
        for (int l = 0; l < 2; l++) { /* odd experts lack everything, expert 0 its out-projection */
            for (int e = 0; e < x.e; e++) {
                for (int i = 0; i < d.file.n; i++) {
                    char middle[64], down[80];
                    snprintf(middle, sizeof middle, "layers.%d.%s.%d.", x.m.layers[l], x.m.experts,
                             e);
                    snprintf(down, sizeof down, "%sdown_proj", middle);
                    const char *name = d.file.tensors[i].name;
                    bool gone = (e % 2 && strstr(name, middle)) || (e == 0 && strstr(name, down));
                    if (gone)
                        fx_remove(&d.file, name), i--;
                }
                if (e % 2)
                    memset(x.layers[l].b_in[e], 0, sizeof x.layers[l].b_in[e]);
                if (e % 2 || e == 0)
                    memset(x.layers[l].a_out[e], 0, sizeof x.layers[l].a_out[e]);
            }
        }
        merge_delta(&model, &x, true, true);
        float *merged = logits_of(fx_write_model(x.m.config, &model), NULL, NULL);
        float *adapted = logits_of(dir, write_draft(&d), NULL);
        cr_expect(qv_close_f32("some experts", adapted, merged, N * VOCAB, 5e-5));
        free(merged), free(adapted);
        fx_free(&d.file), fx_free(&model);
    }
}

Test(lora_formats, an_adapter_that_no_slot_could_hold_is_refused_when_it_is_opened)
{
    delta x = new_delta(FX_QWEN_MOE);
    fx_file model_file = {.n = 0};
    fx_random_moe(&model_file, FX_QWEN_MOE, QV_F32, 35);
    draft d = write_form(write_w, &(how){.dtype = QV_F32}, &x, CONFIG(""));
    const char *dir = fx_write_model(x.m.config, &model_file), *adapter_dir = write_draft(&d);
    qv_backend *be = fx_backend();
    for (int enough = 0; enough < 2; enough++) {
        qv_model_limits limits = fx_limits();
        limits.adapter_memory = enough ? 100000 : 1000;
        qv_model *model = fx_open(be, dir, &limits);
        qv_adapter *adapter;
        cr_expect_eq(qv_adapter_open(model, adapter_dir, &adapter), enough ? QV_OK : QV_ERR_LIMIT);
        if (enough)
            qv_adapter_close(adapter);
        else
            cr_expect_not_null(strstr(qv_error(), "adapter-memory allows 1000"), "%s", qv_error());
        qv_model_close(model);
    }
    qv_backend_close(be);
    fx_free(&d.file), fx_free(&model_file);
}

/* --- Reading alone ---------------------------------------------------------------------------- */

static const qv_layout *layout_of(const char *config_text)
{
    static qv_model_config config;
    static qv_layout layout;
    cr_assert_eq(qv_model_config_parse(config_text, strlen(config_text), NULL, 0, "test", &config),
                 QV_OK, "%s", qv_error());
    cr_assert_eq(qv_layout_init(&layout, &config, 0, 1), QV_OK);
    return &layout;
}

static qv_status read_draft(const char *model_config, const draft *d, qv_adapter **out)
{
    size_t size;
    uint8_t *bytes = fx_bytes(&d->file, &size);
    qv_adapter_spec spec = {
        .layout = layout_of(model_config), .max_rank = SLOT_RANK, .dtype = QV_F32};
    qv_status status =
        qv_adapter_read_memory(&spec, d->config, strlen(d->config), bytes, size, out);
    free(bytes);
    return status;
}

Test(lora_formats, rslora_scales_experts_too)
{
    for (int i = 0; i < N_FORMS; i++) {
        delta x = new_delta(FX_QWEN_MOE);
        char config[512];
        snprintf(config, sizeof config, "%.*s, \"use_rslora\": true}",
                 (int)strlen(forms[i].config) - 1, forms[i].config);
        draft d = write_form(forms[i].write, &forms[i].h, &x, config);
        qv_adapter *adapter;
        cr_assert_eq(read_draft(x.m.config, &d, &adapter), QV_OK, "%s", qv_error());
        for (size_t k = 0; k < qv_adapter_n_items(adapter); k++) {
            const qv_lora_item *item = qv_adapter_item(adapter, k);
            double alpha = item->rank == 6 ? 12 : 6;
            cr_expect_float_eq(item->scale, alpha / sqrt(item->rank), 1e-6, "%s", forms[i].what);
        }
        qv_adapter_close(adapter);
        fx_free(&d.file);
    }
}

/* A model whose in-projection is square for all experts: 2 x 12 rows of 24. */
static const char *square_config(void)
{
    static char text[2048];
    const char *config = fx_moe_model(FX_QWEN_MOE).config;
    const char *at = strstr(config, "\"moe_intermediate_size\": 10");
    snprintf(text, sizeof text, "%.*s\"moe_intermediate_size\": 12%s", (int)(at - config), config,
             at + strlen("\"moe_intermediate_size\": 10"));
    return text;
}

Test(lora_formats, a_square_pair_needs_a_word_about_its_layout)
{
    static const struct {
        const char *config;
        bool swapped; /* what it is read as */
        qv_status status;
    } rows[] = {
        {CONFIG(", \"peft_version\": \"0.19.1\""), false, QV_OK},
        {CONFIG(", \"peft_version\": \"0.21.0.dev0\""), false, QV_OK},
        {CONFIG(", \"peft_version\": \"1.0\""), false, QV_OK},
        {CONFIG(", \"expert_layout\": \"standard\""), false, QV_OK},
        {CONFIG(", \"expert_layout\": \"swapped\", \"peft_version\": \"0.20.0\""), true, QV_OK},
        {CONFIG(""), false, QV_ERR_FORMAT},
        {CONFIG(", \"peft_version\": \"0.19.0\""), false, QV_ERR_FORMAT},
        {CONFIG(", \"peft_version\": \"0.18.1\""), false, QV_ERR_FORMAT},
        {CONFIG(", \"peft_version\": \"new\""), false, QV_ERR_FORMAT},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        draft d = {.file = {.n = 0}};
        qv_rng rng = qv_rng_seed(5);
        snprintf(d.config, sizeof d.config, "%s", rows[i].config);
        const char *start = "base_model.model.model.layers.0.mlp.experts";
        static const int64_t shapes[4][2] = {{15, 24}, {24, 15}, {15, 12}, {24, 15}};
        static const char *const ends[] = {".base_layer.lora_A.weight", ".base_layer.lora_B.weight",
                                           ".lora_A.weight", ".lora_B.weight"};
        bool swapped = strstr(rows[i].config, "swapped") != NULL;
        for (int t = 0; t < 4; t++) {
            int64_t shape[2] = {shapes[t][0], shapes[t][1]};
            if (swapped && t == 2)
                shape[1] = 24;
            if (swapped && t == 3)
                shape[0] = 12;
            char name[128];
            snprintf(name, sizeof name, "%s%s", start, ends[t]);
            fx_add_random(&d.file, name, QV_F32, 2, shape, &rng, 1);
        }
        qv_adapter *adapter;
        cr_expect_eq(read_draft(square_config(), &d, &adapter), rows[i].status, "%s: %s",
                     rows[i].config, qv_error());
        if (rows[i].status == QV_OK) { /* the first number of expert 1 */
            const float *a = d.file.tensors[0].data, *b = d.file.tensors[1].data;
            const qv_lora_item *item = qv_adapter_item(adapter, 1);
            cr_expect_eq(item->expert, 1);
            cr_expect_eq(((const float *)item->a)[0], rows[i].swapped ? b[1] : a[3 * 24]);
            qv_adapter_close(adapter);
        } else {
            cr_expect_not_null(strstr(qv_error(), "expert_layout"), "%s", qv_error());
        }
        fx_free(&d.file);
    }
}

/* --- What is refused -------------------------------------------------------------------------- */

/* The first tensor whose name ends so. */
static fx_tensor *ending(draft *d, const char *end)
{
    for (int i = 0; i < d->file.n; i++) {
        const char *name = d->file.tensors[i].name;
        size_t n = strlen(name), k = strlen(end);
        if (n >= k && strcmp(name + n - k, end) == 0)
            return &d->file.tensors[i];
    }
    cr_assert_fail("no tensor ends in %s", end);
    return NULL;
}

/* Another shape of as many numbers or fewer. */
static void reshape(draft *d, const char *end, int n_dims, int64_t x, int64_t y, int64_t z)
{
    fx_tensor *t = ending(d, end);
    t->n_dims = n_dims;
    t->shape[0] = x, t->shape[1] = y, t->shape[2] = z;
}

static void drop(draft *d, const char *end)
{
    fx_remove(&d->file, ending(d, end)->name);
}

static void rename_to(draft *d, const char *end, const char *fresh)
{
    fx_tensor *t = ending(d, end);
    size_t n = strlen(t->name) - strlen(end);
    char name[240];
    snprintf(name, sizeof name, "%.*s%s", (int)n, t->name, fresh);
    free((char *)t->name);
    t->name = strdup(name);
}

static void put(draft *d, const char *rest, int n_dims, int64_t x, int64_t y, int64_t z)
{
    static float zeros[8192];
    char name[240];
    snprintf(name, sizeof name, "base_model.model.model.layers.0.mlp.experts%s", rest);
    fx_add(&d->file, name, QV_F32, n_dims, (int64_t[]){x, y, z}, zeros);
}

static void set_nan(draft *d, const char *end)
{
    ((float *)ending(d, end)->data)[7] = NAN;
}

static void w_dim0_2(draft *d)
{
    reshape(d, "experts.w1.lora_A.weight", 3, 2, RANK, 24);
}
static void w_dim0_4(draft *d)
{
    reshape(d, "experts.w2.lora_A.weight", 3, 4, RANK, FFN);
}
static void w_flat(draft *d)
{
    reshape(d, "experts.w1.lora_A.weight", 2, 5 * RANK, 24, 0);
}
static void w_transposed(draft *d)
{
    reshape(d, "experts.w1.lora_A.weight", 3, 5, 24, RANK);
}
static void w_b_transposed(draft *d)
{
    reshape(d, "experts.w3.lora_B.weight", 3, 5, RANK, FFN);
}
static void w_rank(draft *d)
{
    reshape(d, "experts.w1.lora_A.weight", 3, 5, 2, 24);
}
static void w_nan(draft *d)
{
    set_nan(d, "experts.w2.lora_B.weight");
}
static void w_no_b(draft *d)
{
    drop(d, "experts.w3.lora_B.weight");
}
static void w_4(draft *d)
{
    put(d, ".w4.lora_A.weight", 3, 1, RANK, 24);
}
static void w_hybrid(draft *d)
{
    put(d, ".shared.w1.lora_A.weight", 2, RANK, 24, 0);
}
static void w_large(draft *d)
{
    fx_free(&d->file);
    put(d, ".w1.lora_A.weight", 3, 1, 17, 24);
    put(d, ".w1.lora_B.weight", 3, 5, FFN, 17);
}
static void w_and_single(draft *d)
{
    put(d, ".2.gate_proj.lora_A.weight", 2, RANK, 24, 0);
    put(d, ".2.gate_proj.lora_B.weight", 2, FFN, RANK, 0);
}
static void w_and_merged(draft *d)
{
    put(d, ".gate_up_proj.lora_A", 3, 1, RANK, 24);
    put(d, ".gate_up_proj.lora_B", 3, 5, 2 * FFN, RANK);
}
static void w_twice(draft *d)
{
    put(d, ".gate_proj.lora_A.weight", 3, 1, RANK, 24);
}

static void single_no_such(draft *d)
{
    rename_to(d, ".4.up_proj.lora_A.weight", ".5.up_proj.lora_A.weight");
}
static void single_leading_zero(draft *d)
{
    rename_to(d, ".4.up_proj.lora_A.weight", ".04.up_proj.lora_A.weight");
}
static void single_cube(draft *d)
{
    reshape(d, ".1.up_proj.lora_A.weight", 3, 1, RANK, 24);
}
static void single_transposed(draft *d)
{
    reshape(d, ".1.up_proj.lora_A.weight", 2, 24, RANK, 0);
}
static void single_no_a(draft *d)
{
    drop(d, ".3.down_proj.lora_A.weight");
}
static void single_rank(draft *d)
{
    reshape(d, ".3.down_proj.lora_B.weight", 2, 24, 2, 0);
}
static void single_nan(draft *d)
{
    set_nan(d, ".3.down_proj.lora_B.weight");
}
static void single_dora(draft *d)
{
    put(d, ".0.up_proj.lora_magnitude_vector", 1, FFN, 0, 0);
}
static void single_bias(draft *d)
{
    put(d, ".0.up_proj.lora_B.bias", 1, FFN, 0, 0);
}
static void single_weight(draft *d)
{
    put(d, ".0.up_proj.weight", 2, FFN, 24, 0);
}
static void single_matrix(draft *d)
{
    put(d, ".0.v_proj.lora_A.weight", 2, RANK, 24, 0);
}

static void flat_experts(draft *d)
{
    reshape(d, "base_layer.lora_A.weight", 2, 14, 24, 0);
}
static void flat_rank(draft *d)
{
    reshape(d, "base_layer.lora_B.weight", 2, 2 * FFN, 10, 0);
}
static void flat_transposed(draft *d)
{
    reshape(d, "base_layer.lora_A.weight", 2, 24, 15, 0);
}
static void flat_cube(draft *d)
{
    reshape(d, "base_layer.lora_A.weight", 3, 5, RANK, 24);
}
static void flat_alone(draft *d)
{
    for (int l = 0; l < 2; l++)
        drop(d, "experts.lora_A.weight"), drop(d, "experts.lora_B.weight");
}
static void flat_no_b(draft *d)
{
    drop(d, "base_layer.lora_B.weight");
}
static void flat_nan(draft *d)
{
    set_nan(d, "base_layer.lora_B.weight");
}
static void flat_deep(draft *d)
{
    put(d, ".base_layer.base_layer.lora_A.weight", 2, 15, 24, 0);
}
static void flat_layout(draft *d)
{
    strcpy(d->config, CONFIG(", \"expert_layout\": \"swapped\""));
}
static void flat_other_target(draft *d)
{
    strcpy(d->config, CONFIG(", \"target_parameters\": [\"experts.down_proj\"]"));
}
static void flat_both_named(draft *d)
{
    drop(d, "base_layer.lora_A.weight"), drop(d, "base_layer.lora_B.weight");
    strcpy(d->config, CONFIG(", \"target_parameters\": [\"gate_up_proj\", \"down_proj\"]"));
}
static void flat_and_single(draft *d)
{
    w_and_single(d);
}
static void flat_pattern(draft *d)
{
    strcpy(d->config, CONFIG(", \"rank_pattern\": {\"experts.gate_up_proj\": 6}"));
}
static void dense_layer(draft *d)
{
    rename_to(d, "0.mlp.experts.lora_A.weight", "7.mlp.experts.lora_A.weight");
}

Test(lora_formats, refuses_experts_that_do_not_fit_and_names_them)
{
    static const struct {
        const char *what;
        write_fn *write;
        void (*spoil)(draft *);
        qv_status status;
        const char *says;
    } rows[] = {
        {"dim0 of 2", write_w, w_dim0_2, QV_ERR_SHAPE,
         "w1.lora_A.weight is F32[2, 3, 24]; the model makes it [5 or 1, rank, 24]"},
        {"too few experts", write_w, w_dim0_4, QV_ERR_SHAPE, "w2.lora_A.weight is F32[4, 3, 10]"},
        {"two dimensions", write_w, w_flat, QV_ERR_SHAPE,
         "F32[15, 24]; the model makes it [5 or 1"},
        {"transposed A", write_w, w_transposed, QV_ERR_SHAPE, "F32[5, 24, 3]"},
        {"transposed B", write_w, w_b_transposed, QV_ERR_SHAPE,
         "F32[5, 3, 10]; the model makes it [5 or 1, 10, rank]"},
        {"rank", write_w, w_rank, QV_ERR_SHAPE, "has rank 2, but its lora_B has rank 3"},
        {"NaN", write_w, w_nan, QV_ERR_FORMAT, "w2.lora_B.weight: element 7 is NaN"},
        {"no B", write_w, w_no_b, QV_ERR_FORMAT, "w3.lora_A.weight has no lora_B"},
        {"w4", write_w, w_4, QV_ERR_UNSUPPORTED, "w4.lora_A.weight (experts have no such matrix)"},
        {"partly shared", write_w, w_hybrid, QV_ERR_UNSUPPORTED, "partly shared"},
        {"rank above the slots'", write_w, w_large, QV_ERR_LIMIT, "rank 17; the adapter slots"},
        {"an expert twice", write_w, w_and_single, QV_ERR_FORMAT, "change the same rows"},
        {"gate twice", write_w, w_and_merged, QV_ERR_FORMAT, "change the same rows"},
        {"two spellings", write_w, w_twice, QV_ERR_FORMAT, "the same matrix twice"},
        {"no such expert", write_single, single_no_such, QV_ERR_UNSUPPORTED,
         "experts.5.up_proj.lora_A.weight (the model has no such expert)"},
        {"number", write_single, single_leading_zero, QV_ERR_UNSUPPORTED, "experts.04.up_proj"},
        {"three dimensions", write_single, single_cube, QV_ERR_SHAPE, "F32[1, 3, 24]"},
        {"transposed", write_single, single_transposed, QV_ERR_SHAPE,
         "F32[24, 3]; the model makes it [rank, 24]"},
        {"no A", write_single, single_no_a, QV_ERR_FORMAT,
         "3.down_proj.lora_B.weight has no lora_A"},
        {"rank of one", write_single, single_rank, QV_ERR_SHAPE,
         "3.down_proj.lora_A.weight has rank 3"},
        {"NaN of one", write_single, single_nan, QV_ERR_FORMAT,
         "3.down_proj.lora_B.weight: element 7"},
        {"DoRA", write_single, single_dora, QV_ERR_UNSUPPORTED, "DoRA"},
        {"bias", write_single, single_bias, QV_ERR_UNSUPPORTED, "trained biases"},
        {"weight", write_single, single_weight, QV_ERR_UNSUPPORTED, "a full copy of a weight"},
        {"matrix", write_single, single_matrix, QV_ERR_UNSUPPORTED,
         "0.v_proj.lora_A.weight (experts"},
        {"experts of a flat pair", write_flat, flat_experts, QV_ERR_SHAPE,
         "F32[14, 24]; the model makes it [rank x 5 experts, 24]"},
        {"rank of a flat pair", write_flat, flat_rank, QV_ERR_SHAPE,
         "F32[20, 10], but its lora_A has rank x experts = 15"},
        {"transposed flat A", write_flat, flat_transposed, QV_ERR_SHAPE,
         "is F32[24, 15] and its lora_B is F32[20, 15]"},
        {"flat of 3 dimensions", write_flat, flat_cube, QV_ERR_SHAPE, "F32[5, 3, 24]"},
        {"inner alone", write_flat, flat_alone, QV_ERR_FORMAT, "stands inside another pair"},
        {"flat without B", write_flat, flat_no_b, QV_ERR_FORMAT,
         "base_layer.lora_A.weight has no lora_B"},
        {"flat NaN", write_flat, flat_nan, QV_ERR_FORMAT, "base_layer.lora_B.weight: element 7"},
        {"three wrappers", write_flat, flat_deep, QV_ERR_UNSUPPORTED, "base_layer.base_layer"},
        {"the other layout", write_flat, flat_layout, QV_ERR_FORMAT,
         "expert_layout is swapped, but"},
        {"not targeted", write_flat, flat_other_target, QV_ERR_FORMAT,
         "target_parameters does not name gate_up_proj"},
        {"which of two", write_flat, flat_both_named, QV_ERR_FORMAT,
         "let target_parameters name the one"},
        {"flat and single", write_flat, flat_and_single, QV_ERR_FORMAT, "change the same rows"},
        {"pattern", write_flat, flat_pattern, QV_ERR_FORMAT,
         "experts.gate_up_proj has rank 3, but the file says rank 6"},
        {"layer", write_flat, dense_layer, QV_ERR_UNSUPPORTED, "the model has no such layer"},
    };
    delta x = new_delta(FX_QWEN_MOE);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        draft d = write_form(rows[i].write, &(how){.dtype = QV_F32}, &x, CONFIG(""));
        rows[i].spoil(&d);
        qv_adapter *adapter;
        cr_expect_eq(read_draft(x.m.config, &d, &adapter), rows[i].status, "%s", rows[i].what);
        cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s: %s", rows[i].what, qv_error());
        fx_free(&d.file);
    }
}

Test(lora_formats, refuses_what_a_model_without_gates_does_not_have)
{
    delta x = new_delta(FX_NEMOTRON);
    static const struct {
        const char *start, *says;
    } rows[] = {
        {"model.layers.1.mixer.experts.w3",
         "experts.w3.lora_A.weight (experts have no such matrix)"},
        {"model.layers.1.mixer.experts.2.gate_proj", "2.gate_proj.lora_A.weight (experts have no"},
        {"model.layers.0.mixer.experts.2.up_proj", "a layer of this kind has no experts"},
        {"model.layers.1.mlp.experts.2.up_proj", "no such module"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        draft d = write_form(write_single, &(how){.dtype = QV_F32}, &x, CONFIG(""));
        char name[128];
        float zeros[256] = {0};
        snprintf(name, sizeof name, "%s.lora_A.weight", rows[i].start);
        fx_add(&d.file, name, QV_F32, 2, (int64_t[]){RANK, 16}, zeros);
        qv_adapter *adapter;
        cr_expect_eq(read_draft(x.m.config, &d, &adapter), QV_ERR_UNSUPPORTED);
        cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s", qv_error());
        fx_free(&d.file);
    }
    /* One flat pair of [16, 10] fits up as it is and down swapped: which one, only a word says. */
    draft d = write_form(write_flat, &(how){.dtype = QV_F32, .skip_out = true}, &x, CONFIG(""));
    qv_adapter *adapter;
    cr_expect_eq(read_draft(x.m.config, &d, &adapter), QV_ERR_FORMAT);
    cr_expect_not_null(strstr(qv_error(), "may be of up_proj or of down_proj"), "%s", qv_error());
    fx_free(&d.file);
}

Test(lora_formats, refuses_every_truncation_of_every_form)
{
    for (int i = 0; i < N_FORMS; i++) {
        delta x = new_delta(FX_QWEN_MOE);
        draft d = write_form(forms[i].write, &forms[i].h, &x, forms[i].config);
        size_t size;
        uint8_t *bytes = fx_bytes(&d.file, &size);
        qv_adapter_spec spec = {
            .layout = layout_of(x.m.config), .max_rank = SLOT_RANK, .dtype = QV_F32};
        for (size_t n = 0; n < size; n += n < 300 ? 7 : 911) {
            uint8_t *cut = memcpy(malloc(n + 1), bytes, n);
            qv_adapter *adapter;
            cr_expect_neq(
                qv_adapter_read_memory(&spec, d.config, strlen(d.config), cut, n, &adapter), QV_OK);
            free(cut);
        }
        free(bytes);
        fx_free(&d.file);
    }
}

/* --- Embedding and head ----------------------------------------------------------------------- */

enum { E_RANK = 5 };

/* A pair of the embedding: A [rank, vocab], B [hidden, rank], scale 2; or of the head, transposed.
 */
typedef struct {
    float a[E_RANK * VOCAB], b[HIDDEN * E_RANK];
} vocabulary;

static void transpose(const float *x, int64_t rows, int64_t cols, float *y)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++)
            y[j * rows + i] = x[i * cols + j];
}

/* w [vocab, hidden] += 2 (b a)^T */
static void merge_vocabulary(float *w, const vocabulary *v)
{
    for (int t = 0; t < VOCAB; t++)
        for (int i = 0; i < HIDDEN; i++)
            for (int k = 0; k < E_RANK; k++)
                w[t * HIDDEN + i] += 2 * v->b[i * E_RANK + k] * v->a[k * VOCAB + t];
}

#define E_CONFIG(more) "{\"peft_type\": \"LORA\", \"r\": 5, \"lora_alpha\": 10" more "}"

Test(lora_formats, the_embedding_and_the_head_are_changed_apart_unless_they_are_tied)
{
    static const struct {
        const char *a, *b;
        bool as_head; /* stored as the head's: A [rank, hidden], B [vocab, rank] */
        bool tied;    /* the model's head */
        const char *config;
        bool embedding, head; /* what changes */
    } rows[] = {
        {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B", false, false,
         E_CONFIG(""), true, false},
        {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B", false, true,
         E_CONFIG(""), true, false},
        {"embed_tokens.lora_A.weight", "embed_tokens.lora_B.weight", true, true, E_CONFIG(""), true,
         false},
        {"word_embeddings.lora_embedding_A.default", "word_embeddings.lora_embedding_B.default",
         false, false, E_CONFIG(""), true, false},
        {"lm_head.lora_A.weight", "lm_head.lora_B.weight", true, true, E_CONFIG(""), false, true},
        {"lm_head.lora_embedding_A", "lm_head.lora_embedding_B", true, false, E_CONFIG(""), false,
         true},
        {"lm_head.lora_embedding_A", "lm_head.lora_embedding_B", false, true, E_CONFIG(""), false,
         true},
        {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B", false, true,
         E_CONFIG(", \"ensure_weight_tying\": true"), true, true},
        {"lm_head.lora_A.weight", "lm_head.lora_B.weight", true, true,
         E_CONFIG(", \"ensure_weight_tying\": true"), true, true},
        {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B", false, false,
         E_CONFIG(", \"ensure_weight_tying\": true"), true, false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_rng rng = qv_rng_seed(6);
        vocabulary v;
        float flipped_a[VOCAB * E_RANK], flipped_b[E_RANK * HIDDEN];
        qv_fill_normal(&rng, v.a, E_RANK * VOCAB, 0.3f);
        qv_fill_normal(&rng, v.b, HIDDEN * E_RANK, 0.3f);
        transpose(v.a, E_RANK, VOCAB, flipped_a);
        transpose(v.b, HIDDEN, E_RANK, flipped_b);
        draft d = {.file = {.n = 0}};
        strcpy(d.config, rows[i].config);
        bool as_head = rows[i].as_head;
        char name[128];
        snprintf(name, sizeof name, "base_model.model.%s", rows[i].a);
        fx_add(&d.file, name, QV_F32, 2, (int64_t[]){E_RANK, as_head ? HIDDEN : VOCAB},
               as_head ? flipped_b : v.a);
        snprintf(name, sizeof name, "base_model.model.%s", rows[i].b);
        fx_add(&d.file, name, QV_F32, 2, (int64_t[]){as_head ? VOCAB : HIDDEN, E_RANK},
               as_head ? flipped_a : v.b);

        fx_file model = {.n = 0};
        fx_random_model(&model, "model.", rows[i].tied, QV_F32, 34);
        float *adapted =
            logits_of(fx_write_model(fx_config_text(rows[i].tied), &model), write_draft(&d), NULL);
        if (rows[i].tied)
            fx_add(&model, "lm_head.weight", QV_F32, 2, (int64_t[]){VOCAB, HIDDEN},
                   fx_find(&model, "model.embed_tokens.weight")->data);
        if (rows[i].embedding)
            merge_vocabulary(fx_find(&model, "model.embed_tokens.weight")->data, &v);
        if (rows[i].head)
            merge_vocabulary(fx_find(&model, "lm_head.weight")->data, &v);
        float *merged = logits_of(fx_write_model(fx_config_text(false), &model), NULL, NULL);
        char what[160];
        snprintf(what, sizeof what, "row %zu: %s", i, rows[i].a);
        cr_expect(qv_close_f32(what, adapted, merged, N * VOCAB, 5e-5));
        free(adapted), free(merged);
        fx_free(&d.file), fx_free(&model);
    }
}

Test(lora_formats, tied_pairs_that_differ_are_refused)
{
    for (int differ = 0; differ < 2; differ++) {
        draft d = {.file = {.n = 0}};
        strcpy(d.config, E_CONFIG(", \"ensure_weight_tying\": true"));
        qv_rng rng = qv_rng_seed(7);
        vocabulary v;
        float flipped_a[VOCAB * E_RANK], flipped_b[E_RANK * HIDDEN];
        qv_fill_normal(&rng, v.a, E_RANK * VOCAB, 0.3f);
        qv_fill_normal(&rng, v.b, HIDDEN * E_RANK, 0.3f);
        transpose(v.a, E_RANK, VOCAB, flipped_a);
        transpose(v.b, HIDDEN, E_RANK, flipped_b);
        flipped_b[3] += (float)differ;
        fx_add(&d.file, "model.embed_tokens.lora_embedding_A", QV_F32, 2,
               (int64_t[]){E_RANK, VOCAB}, v.a);
        fx_add(&d.file, "model.embed_tokens.lora_embedding_B", QV_F32, 2,
               (int64_t[]){HIDDEN, E_RANK}, v.b);
        fx_add(&d.file, "lm_head.lora_A.weight", QV_F32, 2, (int64_t[]){E_RANK, HIDDEN}, flipped_b);
        fx_add(&d.file, "lm_head.lora_B.weight", QV_F32, 2, (int64_t[]){VOCAB, E_RANK}, flipped_a);
        qv_adapter *adapter;
        cr_expect_eq(read_draft(fx_config_text(true), &d, &adapter),
                     differ ? QV_ERR_FORMAT : QV_OK);
        if (differ)
            cr_expect_not_null(strstr(qv_error(), "are not the same pair"), "%s", qv_error());
        else
            qv_adapter_close(adapter);
        fx_free(&d.file);
    }
}
