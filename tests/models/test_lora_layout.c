/* The layout of adapter slots, from files through the pool to the ops: planes spaced by the pool's
 * rank, zero above a loaded rank, nothing left of who was there before. For dense projections,
 * experts with and without gate, experts with shared outer sides, embedding and head. */
#include "models/lora.h"
#include "models/lora_pool.h"
#include "models/weights.h"
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BLOCKS = 64, TOP_K = 2, N_SLOTS = 4, VOCAB = 50, MAX_T = 8 };

/* --- Adapters --------------------------------------------------------------------------------- */

/* Pairs of a subject: module, rows, columns; of experts, [1 or experts] of each. */
typedef struct {
    const char *module;
    int64_t n_a, n_b, rows, cols; /* n_a 0: a plain pair */
} pair_row;

static const pair_row dense_rows[] = {
    {"model.layers.0.linear_attn.in_proj_qkv", 0, 0, 92, 24},
    {"model.layers.0.linear_attn.in_proj_b", 0, 0, 6, 24},
    {"model.layers.0.linear_attn.out_proj", 0, 0, 24, 60},
    {"model.layers.1.self_attn.k_proj", 0, 0, 24, 24},
    {"model.layers.1.self_attn.v_proj", 0, 0, 24, 24},
    {"model.layers.1.mlp.gate_proj", 0, 0, 40, 24},
    {"model.layers.2.mlp.gate_up_proj", 0, 0, 80, 24},
    {"model.layers.2.mlp.down_proj", 0, 0, 24, 40},
};
static const pair_row vocabulary_rows[] = {
    {"model.embed_tokens", 0, 0, 24, VOCAB},
    {"lm_head", 0, 0, VOCAB, 24},
};
static const pair_row gated_rows[] = {
    {"model.layers.0.mlp.experts.w1", 5, 5, 10, 24},
    {"model.layers.0.mlp.experts.w3", 5, 5, 10, 24},
    {"model.layers.0.mlp.experts.w2", 5, 5, 24, 10},
    {"model.layers.1.mlp.experts.1.up_proj", 0, 0, 10, 24},
    {"model.layers.1.mlp.experts.4.down_proj", 0, 0, 24, 10},
    {"model.layers.0.mlp.shared_expert_gate", 0, 0, 1, 24},
    {"model.layers.1.mlp.gate", 0, 0, 5, 24},
};
static const pair_row plain_rows[] = {
    {"model.layers.1.mixer.experts.w1", 6, 6, 10, 16},
    {"model.layers.1.mixer.experts.w2", 6, 6, 16, 10},
    {"model.layers.3.mixer.experts.2.down_proj", 0, 0, 16, 10},
    {"model.layers.0.mixer.in_proj", 0, 0, 86, 24},
    {"model.layers.1.mixer.fc1_latent_proj", 0, 0, 16, 24},
    {"model.layers.3.mixer.fc2_latent_proj", 0, 0, 24, 16},
};
static const pair_row shared_rows[] = {
    {"model.layers.0.mlp.experts.w1", 1, 5, 10, 24},
    {"model.layers.0.mlp.experts.w3", 1, 5, 10, 24},
    {"model.layers.0.mlp.experts.w2", 5, 1, 24, 10},
    {"model.layers.1.mlp.experts.gate_up_proj", 1, 1, 20, 24},
    {"model.layers.1.mlp.experts.w2", 1, 5, 24, 10},
};
static const pair_row mixed_rows[] = {
    /* a side is shared by one slice of two: stored apart */
    {"model.layers.0.mlp.experts.w1", 1, 5, 10, 24},
    {"model.layers.0.mlp.experts.3.up_proj", 0, 0, 10, 24},
    {"model.layers.1.mlp.experts.w3", 5, 1, 10, 24},
};

typedef struct {
    const char *name;
    int model; /* -1: dense, else an fx_moe_kind */
    const pair_row *rows;
    size_t n;
} subject;

#define ROWS(list) list, sizeof(list) / sizeof *(list)
static const subject subjects[] = {
    {"dense", -1, ROWS(dense_rows)},
    {"vocabulary", -1, ROWS(vocabulary_rows)},
    {"gated experts", FX_QWEN_MOE, ROWS(gated_rows)},
    {"plain experts", FX_NEMOTRON, ROWS(plain_rows)},
    {"shared outer", FX_QWEN_MOE, ROWS(shared_rows)},
    {"shared by some", FX_QWEN_MOE, ROWS(mixed_rows)},
};
enum { N_SUBJECTS = sizeof subjects / sizeof *subjects };

static const qv_layout *layout_of(const subject *s)
{
    static qv_model_config config;
    static qv_layout layout;
    const char *text =
        s->model < 0 ? fx_config_text(false) : fx_moe_model((fx_moe_kind)s->model).config;
    cr_assert_eq(qv_model_config_parse(text, strlen(text), NULL, 0, "test", &config), QV_OK, "%s",
                 qv_error());
    cr_assert_eq(qv_layout_init(&layout, &config, 0, 1), QV_OK);
    return &layout;
}

/* The subject's adapter at one rank; every other pair has one less, if it can. */
static qv_adapter *new_adapter(const subject *s, const qv_layout *layout, int64_t rank,
                               int32_t max_rank, uint64_t seed)
{
    fx_file file = {.n = 0};
    qv_rng rng = qv_rng_seed(seed);
    char config[4096] = "{\"peft_type\": \"LORA\", \"r\": 1, \"lora_alpha\": 8, "
                        "\"rank_pattern\": {";
    for (size_t i = 0; i < s->n; i++) {
        const pair_row *row = &s->rows[i];
        int64_t r = i % 2 == 1 && rank > 1 ? rank - 1 : rank;
        char name[128];
        bool embedding = strcmp(row->module, "model.embed_tokens") == 0;
        snprintf(name, sizeof name, "%s.lora_%s", row->module,
                 embedding ? "embedding_A" : "A.weight");
        fx_add_random(&file, name, QV_F32, row->n_a > 0 ? 3 : 2,
                      row->n_a > 0 ? (int64_t[]){row->n_a, r, row->cols}
                                   : (int64_t[]){r, row->cols},
                      &rng, 0.3f);
        snprintf(name, sizeof name, "%s.lora_%s", row->module,
                 embedding ? "embedding_B" : "B.weight");
        fx_add_random(&file, name, QV_F32, row->n_a > 0 ? 3 : 2,
                      row->n_a > 0 ? (int64_t[]){row->n_b, row->rows, r}
                                   : (int64_t[]){row->rows, r},
                      &rng, 0.3f);
        sprintf(config + strlen(config), "%s\"%s\": %d", i > 0 ? ", " : "", row->module, (int)r);
    }
    strcat(config, "}}");
    size_t size;
    uint8_t *bytes = fx_bytes(&file, &size);
    qv_adapter_spec spec = {.layout = layout, .max_rank = max_rank, .dtype = QV_F32};
    qv_adapter *adapter;
    cr_assert_eq(qv_adapter_read_memory(&spec, config, strlen(config), bytes, size, &adapter),
                 QV_OK, "%s: %s", s->name, qv_error());
    free(bytes);
    fx_free(&file);
    return adapter;
}

/* --- A pass over all sites -------------------------------------------------------------------- */

typedef struct {
    qv_backend *be;
    const qv_layout *layout;
    qv_lora_pool *pool;
    int32_t max_rank;
    float fill; /* of intermediates before they are used */
} bench;

static bench new_bench(qv_backend *be, const qv_layout *layout, int32_t max_rank)
{
    bench b = {.be = be, .layout = layout, .max_rank = max_rank, .fill = NAN};
    cr_assert_eq(qv_lora_pool_new(be, layout, N_SLOTS, max_rank, UINT64_MAX, &b.pool), QV_OK);
    return b;
}

/* Tokens with their own data, whatever the batch: token i is `id[i]`, and its adapter's slot. */
typedef struct {
    int n;
    int32_t id[MAX_T], slot[MAX_T];
    int32_t seg_start[MAX_T + 1], seg_slot[MAX_T], n_segs;
} batch;

static batch new_batch(int n, const int32_t *id, const int32_t *slot)
{
    batch b = {.n = n};
    for (int i = 0; i < n; i++) {
        b.id[i] = id[i], b.slot[i] = slot[i];
        if (i == 0 || slot[i] != slot[i - 1])
            b.seg_start[b.n_segs] = i, b.seg_slot[b.n_segs++] = slot[i];
    }
    b.seg_start[b.n_segs] = n;
    return b;
}

/* What each site gave: [tokens, cols]. */
typedef struct {
    struct {
        int64_t layer;
        int proj; /* QV_PROJ_COUNT: the embedding */
        int64_t cols;
        float *y;
    } blocks[MAX_BLOCKS];
    int n;
} result;

static void free_result(result *r)
{
    for (int i = 0; i < r->n; i++)
        free(r->blocks[i].y);
}

static float *add_block(result *r, int64_t layer, int proj, int64_t cols, int n)
{
    cr_assert_lt(r->n, MAX_BLOCKS);
    float *y = calloc((size_t)(cols * n), sizeof *y);
    r->blocks[r->n].layer = layer, r->blocks[r->n].proj = proj;
    r->blocks[r->n].cols = cols, r->blocks[r->n++].y = y;
    return y;
}

/* Row `which` of a token at a site: `side` 0 is what it reads, 1 what stands there before. */
static void token_row(int64_t layer, int proj, int side, int32_t id, int which, float *x, int64_t n)
{
    qv_rng rng =
        qv_rng_seed((uint64_t)((((layer + 2) * 32 + proj) * 2 + side) * 512 + id * 8 + which));
    qv_fill_normal(&rng, x, n, 1);
}

static int32_t expert_of(const bench *b, int32_t id, int j)
{
    return (int32_t)((id * 3 + j * 2) % b->layout->config->n_experts);
}

static float weight_of(int32_t id, int j)
{
    return 0.25f + 0.125f * (float)((id + j) % 3);
}

static float *filled(const bench *b, int64_t n)
{
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++)
        x[i] = b->fill;
    return x;
}

static void run_site(const bench *b, const batch *t, int64_t layer, int proj, result *out)
{
    const qv_lora_site *site = qv_lora_pool_site(b->pool, layer, (qv_proj)proj);
    if (site == NULL)
        return;
    float *y = add_block(out, layer, proj, site->n_out, t->n);
    float *x = calloc((size_t)(t->n * site->n_in), sizeof *x);
    for (int i = 0; i < t->n; i++) {
        token_row(layer, proj, 0, t->id[i], 0, x + i * site->n_in, site->n_in);
        token_row(layer, proj, 1, t->id[i], 0, y + i * site->n_out, site->n_out);
    }
    float *scratch = filled(b, (int64_t)t->n * site->n_slices * site->max_rank);
    cr_assert_eq(qv_op_lora(b->be, site, t->n_segs, t->seg_start, t->seg_slot,
                            qv_tensor_2d(x, QV_F32, t->n, site->n_in),
                            qv_tensor_3d(scratch, QV_F32, t->n, site->n_slices, site->max_rank),
                            qv_tensor_2d(y, QV_F32, t->n, site->n_out)),
                 QV_OK, "%s", qv_error());
    free(x), free(scratch);
}

/* Both projections of a layer's experts, each on rows of its own. */
static void run_experts(const bench *b, const batch *t, int64_t layer, result *out)
{
    const qv_lora_parts *parts = qv_lora_pool_parts(b->pool);
    if (b->layout->config->n_experts == 0 || !qv_layout_has(b->layout, layer, QV_PROJ_EXPERT_IN))
        return;
    int64_t n_pairs = t->n * TOP_K;
    int32_t n_experts = (int32_t)b->layout->config->n_experts, ids[MAX_T * TOP_K];
    float weights[MAX_T * TOP_K];
    for (int p = 0; p < n_pairs; p++) {
        ids[p] = expert_of(b, t->id[p / TOP_K], p % TOP_K);
        weights[p] = weight_of(t->id[p / TOP_K], p % TOP_K);
    }
    qv_moe_list list;
    void *memory = malloc(qv_moe_list_bytes(n_experts, TOP_K, MAX_T));
    cr_assert_eq(qv_moe_list_init(&list, n_experts, TOP_K, MAX_T, memory), QV_OK);
    cr_assert_eq(qv_op_moe_route(b->be, qv_tensor_2d(ids, QV_I32, t->n, TOP_K), t->n_segs,
                                 t->seg_start, t->seg_slot, &list),
                 QV_OK);
    for (int proj = QV_PROJ_EXPERT_IN; proj <= QV_PROJ_EXPERT_OUT; proj++) {
        const qv_moe_lora_site *site = qv_lora_parts_experts(parts, layer, (qv_proj)proj);
        bool in = proj == QV_PROJ_EXPERT_IN;
        float *x = calloc((size_t)(n_pairs * site->n_in), sizeof *x);
        float *o = calloc((size_t)(n_pairs * site->n_out), sizeof *o);
        for (int place = 0; place < n_pairs; place++) {
            int pair = list.pair[place], token = pair / TOP_K;
            token_row(layer, proj, 1, t->id[token], pair % TOP_K, o + place * site->n_out,
                      site->n_out);
            if (in)
                token_row(layer, proj, 0, t->id[token], 0, x + token * site->n_in, site->n_in);
            else
                token_row(layer, proj, 0, t->id[token], pair % TOP_K, x + place * site->n_in,
                          site->n_in);
        }
        float *scratch = filled(b, n_pairs * site->n_slices * site->max_rank);
        qv_tensor rows = qv_tensor_2d(o, QV_F32, n_pairs, site->n_out);
        qv_tensor x1 = qv_tensor_3d(scratch, QV_F32, n_pairs, site->n_slices, site->max_rank);
        cr_assert_eq(qv_op_moe_lora(b->be, site, &list,
                                    qv_tensor_2d(x, QV_F32, in ? t->n : n_pairs, site->n_in),
                                    in ? QV_MOE_TOKENS : QV_MOE_PAIRS, x1, rows),
                     QV_OK, "%s", qv_error());
        float *y = add_block(out, layer, proj, in ? TOP_K * site->n_out : site->n_out, t->n);
        if (in) {
            for (int p = 0; p < n_pairs; p++)
                memcpy(y + p * site->n_out, o + list.place[p] * site->n_out,
                       (size_t)site->n_out * sizeof *y);
        } else {
            cr_assert_eq(qv_op_moe_combine(b->be, &list, qv_tensor_2d(weights, QV_F32, t->n, TOP_K),
                                           rows, site, x1,
                                           qv_tensor_2d(y, QV_F32, t->n, site->n_out)),
                         QV_OK, "%s", qv_error());
        }
        free(x), free(o), free(scratch);
    }
    free(memory);
}

static void run_embedding(const bench *b, const batch *t, result *out)
{
    const qv_embed_lora_site *site = qv_lora_parts_embedding(qv_lora_pool_parts(b->pool));
    float *y = add_block(out, QV_GLOBAL, QV_PROJ_COUNT, site->n_out, t->n);
    for (int i = 0; i < t->n; i++)
        token_row(QV_GLOBAL, QV_PROJ_COUNT, 1, t->id[i], 0, y + i * site->n_out, site->n_out);
    cr_assert_eq(qv_op_embed_lora(b->be, site, t->n_segs, t->seg_start, t->seg_slot, t->id,
                                  qv_tensor_2d(y, QV_F32, t->n, site->n_out)),
                 QV_OK, "%s", qv_error());
}

static result run(const bench *b, const batch *t)
{
    result r = {.n = 0};
    for (int64_t layer = QV_GLOBAL; layer < b->layout->config->n_layers; layer++) {
        for (int p = 0; p < QV_PROJ_COUNT; p++)
            run_site(b, t, layer, p, &r);
        if (layer >= 0)
            run_experts(b, t, layer, &r);
    }
    run_embedding(b, t, &r);
    return r;
}

/* Token `i` of one result is token `k` of another, bit for bit. */
static void expect_same(const char *what, const result *x, int i, const result *y, int k)
{
    cr_assert_eq(x->n, y->n);
    for (int n = 0; n < x->n; n++) {
        int64_t cols = x->blocks[n].cols;
        cr_expect_arr_eq(x->blocks[n].y + i * cols, y->blocks[n].y + k * cols,
                         (size_t)cols * sizeof(float), "%s: layer %d, projection %d", what,
                         (int)x->blocks[n].layer, x->blocks[n].proj);
    }
}

/* --- In double -------------------------------------------------------------------------------- */

/* y [n_out] += the adapter's delta of x, for one expert (0 without experts). */
static void add_delta(const bench *b, const qv_adapter *adapter, int64_t layer, int proj,
                      int32_t expert, int32_t id, const float *x, double *y)
{
    for (size_t n = 0; n < qv_adapter_n_items(adapter); n++) {
        const qv_lora_item *item = qv_adapter_item(adapter, n);
        int of = item->embedding ? QV_PROJ_COUNT : (int)item->target.proj;
        if (item->layer != layer || of != proj || (item->expert >= 0 && item->expert != expert))
            continue;
        int64_t in = item->target.n_in, rows = item->target.n_rows, rank = item->rank;
        const float *a = (const float *)item->a + (item->n_a > 1 ? expert * rank * in : 0);
        const float *w = (const float *)item->b + (item->n_b > 1 ? expert * rows * rank : 0);
        int64_t first =
            item->embedding ? 0 : b->layout->proj[proj].slices[item->target.first].dst_row;
        for (int64_t k = 0; k < rank; k++) {
            double sum = item->embedding ? a[k * in + id] : 0;
            for (int64_t i = 0; i < in && !item->embedding; i++)
                sum += (double)a[k * in + i] * x[i];
            for (int64_t i = 0; i < rows; i++)
                y[first + i] += (double)item->scale * w[i * rank + k] * sum;
        }
    }
}

/* What token `id` should have at a block. */
static void expected(const bench *b, const qv_adapter *adapter, int64_t layer, int proj,
                     int64_t cols, int32_t id, double *out)
{
    float x[256], y[256];
    bool experts = proj != QV_PROJ_COUNT && b->layout->proj[proj].experts;
    bool sums = experts && proj == QV_PROJ_EXPERT_OUT;
    int64_t in = proj == QV_PROJ_COUNT ? 0 : b->layout->proj[proj].n_in;
    int64_t n = experts && !sums ? cols / TOP_K : cols;
    memset(out, 0, (size_t)cols * sizeof *out);
    for (int j = 0; j < (experts ? TOP_K : 1); j++) {
        double row[256];
        token_row(layer, proj, 0, id, sums ? j : 0, x, in);
        token_row(layer, proj, 1, id, j, y, n);
        for (int64_t i = 0; i < n; i++)
            row[i] = y[i];
        add_delta(b, adapter, layer, proj, experts ? expert_of(b, id, j) : 0, id, x, row);
        for (int64_t i = 0; i < n; i++)
            out[(experts && !sums ? j * n : 0) + i] +=
                sums ? (double)weight_of(id, j) * row[i] : row[i];
    }
}

static void expect_merged(const char *what, const bench *b, const qv_adapter *adapter,
                          const result *r, const batch *t)
{
    for (int n = 0; n < r->n; n++) {
        int64_t cols = r->blocks[n].cols;
        for (int i = 0; i < t->n; i++) {
            double want[512];
            float narrow[512];
            expected(b, adapter, r->blocks[n].layer, r->blocks[n].proj, cols, t->id[i], want);
            for (int64_t c = 0; c < cols; c++)
                narrow[c] = (float)want[c];
            cr_expect(qv_close_f32(what, r->blocks[n].y + i * cols, narrow, cols, 2e-5),
                      "layer %d, projection %d, token %d", (int)r->blocks[n].layer,
                      r->blocks[n].proj, i);
        }
    }
}

/* --- The tests -------------------------------------------------------------------------------- */

static const int32_t ids[MAX_T] = {7, 0, 49, 12, 5, 33, 21, 4};

static batch all_in(int32_t slot)
{
    int32_t slots[MAX_T];
    for (int i = 0; i < MAX_T; i++)
        slots[i] = slot;
    return new_batch(MAX_T, ids, slots);
}

static void install(const bench *b, int32_t slot, const qv_adapter *adapter)
{
    cr_assert_eq(qv_lora_pool_install(b->pool, slot, adapter), QV_OK, "%s", qv_error());
}

/* NaN into all memory of all slots that there is now, and entries out of range. */
static void poison(const bench *b)
{
    for (int64_t layer = QV_GLOBAL; layer < b->layout->config->n_layers; layer++) {
        for (int p = 0; p < QV_PROJ_COUNT; p++) {
            const qv_lora_site *site = qv_lora_pool_site(b->pool, layer, (qv_proj)p);
            if (site == NULL)
                continue;
            memset(site->a.data, 0xFF, (size_t)(N_SLOTS * site->a.stride[0]) * 4);
            memset(site->b.data, 0xFF, (size_t)(N_SLOTS * site->b.stride[0]) * 4);
            memset(site->slices, 0xFF, (size_t)(N_SLOTS * site->n_slices) * sizeof *site->slices);
        }
        for (int p = QV_PROJ_EXPERT_IN; p <= QV_PROJ_EXPERT_OUT && layer >= 0; p++) {
            const qv_moe_lora_site *site =
                qv_lora_parts_experts(qv_lora_pool_parts(b->pool), layer, (qv_proj)p);
            if (site != NULL)
                memset(site->slots, 0xFF, N_SLOTS * sizeof *site->slots);
        }
    }
    memset(qv_lora_parts_embedding(qv_lora_pool_parts(b->pool))->slots, 0xFF,
           N_SLOTS * sizeof(qv_embed_lora_slot));
}

/* A subject, a pool and a rank around half and all of the pool's. */
typedef struct {
    const subject *s;
    int64_t rank;
    int32_t max_rank;
} rank_case;

enum { N_CASES = N_SUBJECTS * 3 * 8 };

static rank_case case_at(int i)
{
    static const int32_t pools[] = {8, 16, 64};
    int64_t most = pools[i / 8 % 3];
    const int64_t ranks[8] = {1, 2, 3, most / 2 - 1, most / 2, most / 2 + 1, most - 1, most};
    return (rank_case){.s = &subjects[i / 24], .rank = ranks[i % 8], .max_rank = (int32_t)most};
}

Test(lora_layout, every_rank_in_every_pool_agrees_with_the_merged_delta, .timeout = 60)
{
    qv_backend *be = fx_backend();
    for (int n = 0; n < N_CASES; n++) {
        rank_case c = case_at(n);
        bench b = new_bench(be, layout_of(c.s), c.max_rank);
        qv_adapter *adapter = new_adapter(c.s, b.layout, c.rank, b.max_rank, 1);
        install(&b, 2, adapter);
        batch t = all_in(2);
        result r = run(&b, &t);
        char what[64];
        snprintf(what, sizeof what, "%s, rank %d of %d", c.s->name, (int)c.rank, c.max_rank);
        expect_merged(what, &b, adapter, &r, &t);
        free_result(&r);
        qv_adapter_close(adapter);
        qv_lora_pool_free(b.pool);
    }
    qv_backend_close(be);
}

Test(lora_layout, what_was_in_a_pool_and_in_intermediates_is_never_seen, .timeout = 60)
{
    qv_backend *be = fx_backend();
    for (int n = 0; n < N_CASES; n++) {
        rank_case c = case_at(n);
        bench clean = new_bench(be, layout_of(c.s), c.max_rank);
        bench dirty = new_bench(be, clean.layout, c.max_rank);
        clean.fill = 0;
        qv_adapter *adapter = new_adapter(c.s, clean.layout, c.rank, c.max_rank, 2);
        poison(&dirty);
        install(&clean, 1, adapter);
        install(&dirty, 1, adapter);
        batch t = all_in(1);
        result x = run(&clean, &t), y = run(&dirty, &t);
        for (int i = 0; i < t.n; i++)
            expect_same(c.s->name, &x, i, &y, i);
        free_result(&x), free_result(&y);
        qv_adapter_close(adapter);
        qv_lora_pool_free(clean.pool);
        qv_lora_pool_free(dirty.pool);
    }
    qv_backend_close(be);
}

Test(lora_layout, a_slot_forgets_the_adapter_before)
{
    qv_backend *be = fx_backend();
    for (int s = 0; s < N_SUBJECTS; s++) {
        bench fresh = new_bench(be, layout_of(&subjects[s]), 16);
        bench used = new_bench(be, fresh.layout, 16);
        qv_adapter *large = new_adapter(&subjects[s], fresh.layout, 16, 16, 3);
        qv_adapter *small = new_adapter(&subjects[s], fresh.layout, 3, 16, 4);
        install(&used, 0, large);
        install(&used, 0, small);
        install(&fresh, 0, small);
        batch t = all_in(0);
        result x = run(&fresh, &t), y = run(&used, &t);
        for (int i = 0; i < t.n; i++)
            expect_same(subjects[s].name, &x, i, &y, i);
        free_result(&x), free_result(&y);

        /* A slot that was cleared is as one that never had an adapter, and has given back its
         * memory. */
        cr_assert_eq(qv_lora_pool_clear(used.pool, 0), QV_OK);
        cr_expect_eq(qv_lora_parts_used(qv_lora_pool_parts(used.pool)), 0);
        batch none = all_in(3);
        x = run(&fresh, &none), y = run(&used, &t);
        for (int i = 0; i < t.n; i++)
            expect_same(subjects[s].name, &x, i, &y, i);
        free_result(&x), free_result(&y);
        qv_adapter_close(large), qv_adapter_close(small);
        qv_lora_pool_free(fresh.pool), qv_lora_pool_free(used.pool);
    }
    qv_backend_close(be);
}

Test(lora_layout, adapters_in_one_batch_change_no_bit_of_each_other)
{
    qv_backend *be = fx_backend();
    for (int s = 0; s < N_SUBJECTS; s++) {
        bench b = new_bench(be, layout_of(&subjects[s]), 16);
        qv_adapter *one = new_adapter(&subjects[s], b.layout, 5, 16, 5);
        qv_adapter *two = new_adapter(&subjects[s], b.layout, 16, 16, 6);
        install(&b, 0, one), install(&b, 3, two);
        static const int32_t slots[MAX_T] = {-1, -1, 0, 0, 0, 2, 3, 3};
        batch mixed = new_batch(MAX_T, ids, slots);
        result together = run(&b, &mixed);
        for (int i = 0; i < MAX_T; i++) {
            batch alone = new_batch(1, ids + i, slots + i);
            result r = run(&b, &alone);
            expect_same(subjects[s].name, &together, i, &r, 0);
            free_result(&r);
        }
        free_result(&together);
        qv_adapter_close(one), qv_adapter_close(two);
        qv_lora_pool_free(b.pool);
    }
    qv_backend_close(be);
}

Test(lora_layout, a_larger_pool_gives_the_same_bits)
{
    qv_backend *be = fx_backend();
    for (int s = 0; s < N_SUBJECTS; s++) {
        static const int32_t ranks[] = {2, 7, 16};
        for (int i = 0; i < 3; i++) {
            bench tight = new_bench(be, layout_of(&subjects[s]), ranks[i]);
            bench wide = new_bench(be, tight.layout, 4 * ranks[i]);
            qv_adapter *adapter = new_adapter(&subjects[s], tight.layout, ranks[i], ranks[i], 7);
            install(&tight, 1, adapter), install(&wide, 1, adapter);
            batch t = all_in(1);
            result x = run(&tight, &t), y = run(&wide, &t);
            for (int k = 0; k < t.n; k++)
                expect_same(subjects[s].name, &x, k, &y, k);
            free_result(&x), free_result(&y);
            qv_adapter_close(adapter);
            qv_lora_pool_free(tight.pool), qv_lora_pool_free(wide.pool);
        }
    }
    qv_backend_close(be);
}

/* Every entry of a slot that has a rank gets the largest there can be. */
static void unmask(const bench *b, int32_t slot)
{
    for (int64_t layer = QV_GLOBAL; layer < b->layout->config->n_layers; layer++) {
        for (int p = 0; p < QV_PROJ_COUNT; p++) {
            const qv_lora_site *site = qv_lora_pool_site(b->pool, layer, (qv_proj)p);
            for (int32_t i = 0; site != NULL && i < site->n_slices; i++) {
                qv_lora_slice *slice = &site->slices[slot * site->n_slices + i];
                slice->rank = slice->rank > 0 ? site->max_rank : 0;
            }
        }
        for (int p = QV_PROJ_EXPERT_IN; p <= QV_PROJ_EXPERT_OUT && layer >= 0; p++) {
            const qv_moe_lora_site *site =
                qv_lora_parts_experts(qv_lora_pool_parts(b->pool), layer, (qv_proj)p);
            if (site == NULL || !site->slot_active[slot])
                continue;
            qv_moe_lora_slot *part = &site->slots[slot];
            for (int32_t i = 0; i < site->n_experts * site->n_slices; i++)
                part->slices[i].rank = part->slices[i].rank > 0 ? part->max_rank : 0;
        }
    }
}

Test(lora_layout, loops_that_run_to_the_end_of_a_plane_give_the_same)
{
    qv_backend *be = fx_backend();
    for (int s = 0; s < N_SUBJECTS; s++) {
        bench b = new_bench(be, layout_of(&subjects[s]), 16);
        qv_adapter *adapter = new_adapter(&subjects[s], b.layout, 6, 16, 8);
        poison(&b);
        install(&b, 1, adapter);
        batch t = all_in(1);
        result x = run(&b, &t);
        unmask(&b, 1);
        result y = run(&b, &t);
        for (int n = 0; n < x.n; n++)
            for (int64_t i = 0; i < x.blocks[n].cols * t.n; i++)
                cr_expect_eq(x.blocks[n].y[i], y.blocks[n].y[i], "%s", subjects[s].name);
        free_result(&x), free_result(&y);
        qv_adapter_close(adapter);
        qv_lora_pool_free(b.pool);
    }
    qv_backend_close(be);
}

/* --- Memory on demand ------------------------------------------------------------------------- */

Test(lora_layout, slots_get_what_their_adapter_needs_within_a_bound)
{
    qv_backend *be = fx_backend();
    const subject *s = &subjects[2], *shared = &subjects[4];
    const qv_layout *layout = layout_of(s);
    qv_adapter *one = new_adapter(s, layout, 3, 16, 9);
    qv_adapter *large = new_adapter(s, layout, 16, 16, 9);
    qv_adapter *outer = new_adapter(shared, layout, 16, 16, 9);
    uint64_t bytes = qv_lora_parts_bytes(layout, one, QV_F32);
    uint64_t large_bytes = qv_lora_parts_bytes(layout, large, QV_F32);
    /* Layer 0: planes of 3 of 2 slices of 24, B of 20 rows, entries; planes of 3 of 10, B of 24.
     * Layer 1: up and down of one expert each, planes of 2 and 3. */
    uint64_t want = 0;
    const int64_t parts[][3] = {{5 * 2 * 3 * 24 * 4, 5 * 20 * 3 * 4, 5 * 2 * 16},
                                {5 * 3 * 10 * 4, 5 * 24 * 3 * 4, 5 * 16},
                                {5 * 2 * 2 * 24 * 4, 5 * 20 * 2 * 4, 5 * 2 * 16},
                                {5 * 3 * 10 * 4, 5 * 24 * 3 * 4, 5 * 16}};
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 3; k++)
            want += (uint64_t)(parts[i][k] + 63) / 64 * 64;
    cr_expect_eq(bytes, want, "%d, not %d", (int)bytes, (int)want);
    cr_expect_lt(qv_lora_parts_bytes(layout, outer, QV_F32), large_bytes);
    cr_expect_leq(large_bytes, qv_lora_parts_most(layout, 16, QV_F32));

    qv_lora_pool *pool;
    cr_assert_eq(qv_lora_pool_new(be, layout, N_SLOTS, 16, bytes + large_bytes, &pool), QV_OK);
    const qv_lora_parts *held = qv_lora_pool_parts(pool);
    cr_assert_eq(qv_lora_pool_install(pool, 0, one), QV_OK);
    cr_assert_eq(qv_lora_pool_install(pool, 1, large), QV_OK);
    cr_expect_eq(qv_lora_parts_used(held), bytes + large_bytes);
    cr_expect_eq(qv_lora_pool_install(pool, 2, one), QV_ERR_LIMIT);
    cr_expect_not_null(strstr(qv_error(), "adapter-memory"), "%s", qv_error());
    cr_expect_eq(qv_lora_parts_used(held), bytes + large_bytes);
    cr_expect_eq(qv_lora_parts_experts(held, 0, QV_PROJ_EXPERT_IN)->slot_active[2], 0);
    cr_assert_eq(qv_lora_pool_install(pool, 1, one), QV_OK); /* the slot's own memory is free */
    cr_assert_eq(qv_lora_pool_install(pool, 2, one), QV_OK);
    cr_expect_eq(qv_lora_parts_used(held), 3 * bytes);
    for (int32_t slot = 0; slot < 3; slot++)
        cr_assert_eq(qv_lora_pool_clear(pool, slot), QV_OK);
    cr_expect_eq(qv_lora_parts_used(held), 0);
    qv_lora_pool_free(pool);
    qv_adapter_close(one), qv_adapter_close(large), qv_adapter_close(outer);
    qv_backend_close(be);
}
