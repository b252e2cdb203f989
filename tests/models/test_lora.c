/* Adapters: what they do to the model, how they may be spelled, and what is refused. */
#include "models/lora.h"
#include "models/lora_pool.h"
#include "models/weights.h"
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 11, VOCAB = 50, HIDDEN = 24, POOL_RANK = 16 };
static const int32_t tokens[N] = {3, 41, 5, 9, 0, 49, 7, 7, 12, 30, 2};

/* Every matrix of the test model that adapters may target, and ranks of all sorts. */
static const struct {
    const char *name; /* below "model." or the top */
    int64_t rows, cols;
    int64_t rank;
} modules[] = {
    {"model.layers.0.linear_attn.in_proj_qkv", 92, HIDDEN, 3},
    {"model.layers.0.linear_attn.in_proj_z", 60, HIDDEN, 16},
    {"model.layers.0.linear_attn.in_proj_b", 6, HIDDEN, 1},
    {"model.layers.0.linear_attn.in_proj_a", 6, HIDDEN, 2},
    {"model.layers.0.linear_attn.out_proj", HIDDEN, 60, 5},
    {"model.layers.0.mlp.gate_proj", 40, HIDDEN, 15},
    {"model.layers.0.mlp.down_proj", HIDDEN, 40, 4},
    {"model.layers.1.self_attn.q_proj", 96, HIDDEN, 8},
    {"model.layers.1.self_attn.k_proj", 24, HIDDEN, 7},
    {"model.layers.1.self_attn.v_proj", 24, HIDDEN, 9},
    {"model.layers.1.self_attn.o_proj", HIDDEN, 48, 6},
    {"model.layers.1.mlp.up_proj", 40, HIDDEN, 2},
    {"model.layers.2.linear_attn.in_proj_z", 60, HIDDEN, 3},
    {"lm_head", VOCAB, HIDDEN, 12},
};
enum { N_MODULES = sizeof modules / sizeof *modules };

/* --- Adapters written on the spot ------------------------------------------------------------- */

typedef struct {
    fx_file file;
    char config[4096];
} draft;

static void add_pair(draft *d, const char *module, int64_t rows, int64_t cols, int64_t rank,
                     uint64_t seed)
{
    qv_rng rng = qv_rng_seed(seed);
    char name[200];
    snprintf(name, sizeof name, "base_model.model.%s.lora_A.weight", module);
    fx_add_random(&d->file, name, QV_F32, 2, (int64_t[]){rank, cols}, &rng, 0.2f);
    snprintf(name, sizeof name, "base_model.model.%s.lora_B.weight", module);
    fx_add_random(&d->file, name, QV_F32, 2, (int64_t[]){rows, rank}, &rng, 0.2f);
}

/* An adapter of every module, each with its own rank and scale alpha / rank = 1.5. */
static draft full_draft(void)
{
    draft d = {.file = {.n = 0}};
    char ranks[2048] = "", alphas[2048] = "";
    for (int i = 0; i < N_MODULES; i++) {
        add_pair(&d, modules[i].name, modules[i].rows, modules[i].cols, modules[i].rank,
                 (uint64_t)i + 1);
        sprintf(ranks + strlen(ranks), "%s\"%s\": %d", i ? ", " : "", modules[i].name,
                (int)modules[i].rank);
        sprintf(alphas + strlen(alphas), "%s\"%s\": %g", i ? ", " : "", modules[i].name,
                1.5 * (double)modules[i].rank);
    }
    snprintf(d.config, sizeof d.config,
             "{\"peft_type\": \"LORA\", \"r\": 99, \"lora_alpha\": 7, \"bias\": \"none\","
             " \"rank_pattern\": {%s}, \"alpha_pattern\": {%s}}",
             ranks, alphas);
    return d;
}

/* One pair of rank 4 on up_proj of layer 1: what the tables below edit. */
static const char small_module[] = "model.layers.1.mlp.up_proj";
static const char small_a[] = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight";
static const char small_b[] = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";

static draft small_draft(void)
{
    draft d = {.file = {.n = 0}};
    add_pair(&d, small_module, 40, HIDDEN, 4, 77);
    strcpy(d.config, "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8}");
    return d;
}

static const char *write_draft(const draft *d)
{
    const char *dir = qv_temp_dir();
    qv_write_text(qv_path(dir, "adapter_config.json"), d->config);
    fx_write(&d->file, qv_path(dir, "adapter_model.safetensors"));
    return dir;
}

/* A layout of the test model, alive for the process. */
static const qv_layout *layout_of(bool tied)
{
    static qv_model_config config;
    static qv_layout layout;
    const char *text = fx_config_text(tied);
    cr_assert_eq(qv_model_config_parse(text, strlen(text), NULL, 0, "test", &config), QV_OK, "%s",
                 qv_error());
    cr_assert_eq(qv_layout_init(&layout, &config, 0, 1), QV_OK);
    return &layout;
}

static qv_adapter_spec spec_of(bool tied)
{
    return (qv_adapter_spec){.layout = layout_of(tied), .max_rank = POOL_RANK, .dtype = QV_F32};
}

static qv_status read_draft(const draft *d, qv_adapter **out)
{
    qv_adapter_spec spec = spec_of(false);
    return qv_adapter_read(&spec, write_draft(d), out);
}

/* --- What adapters do ------------------------------------------------------------------------- */

/* W += scale * B A for the pair of `module` in the draft. */
static void merge(fx_file *model, draft *d, const char *module, const char *weight, float scale)
{
    char name[200];
    snprintf(name, sizeof name, "base_model.model.%s.lora_A.weight", module);
    const fx_tensor *a = fx_find(&d->file, name);
    snprintf(name, sizeof name, "base_model.model.%s.lora_B.weight", module);
    const fx_tensor *b = fx_find(&d->file, name);
    fx_tensor *w = fx_find(model, weight);
    int64_t rank = a->shape[0], cols = a->shape[1], rows = b->shape[0];
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) {
            double sum = 0;
            for (int64_t k = 0; k < rank; k++)
                sum += (double)((float *)b->data)[i * rank + k] * ((float *)a->data)[k * cols + j];
            ((float *)w->data)[i * cols + j] += (float)(scale * sum);
        }
    }
}

static float *logits_with(const char *model_dir, const char *adapter_dir, int32_t slot)
{
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, model_dir, &limits);
    if (adapter_dir != NULL) {
        qv_adapter *adapter;
        cr_assert_eq(qv_adapter_open(model, adapter_dir, &adapter), QV_OK, "%s", qv_error());
        cr_assert_eq(qv_model_adapter_install(model, slot, adapter), QV_OK);
        qv_adapter_close(adapter);
    }
    float *logits = fx_run(model, tokens, N, 0, slot, 0, 0);
    qv_model_close(model);
    qv_backend_close(be);
    return logits;
}

Test(lora, an_adapter_equals_merged_weights)
{
    for (int tied = 0; tied < 2; tied++) {
        fx_file model = {.n = 0};
        fx_random_model(&model, "model.", tied, QV_F32, 11);
        draft d = full_draft();
        float *adapted =
            logits_with(fx_write_model(fx_config_text(tied), &model), write_draft(&d), 2);

        /* A tied head with a pair is no longer the embedding: merged, the model is untied. */
        if (tied)
            fx_add(&model, "lm_head.weight", QV_F32, 2, (int64_t[]){VOCAB, HIDDEN},
                   fx_find(&model, "model.embed_tokens.weight")->data);
        for (int i = 0; i < N_MODULES; i++) {
            char weight[160];
            snprintf(weight, sizeof weight, "%s.weight", modules[i].name);
            merge(&model, &d, modules[i].name, weight, 1.5f);
        }
        float *merged = logits_with(fx_write_model(fx_config_text(false), &model), NULL, -1);
        cr_expect(qv_close_f32(tied ? "tied" : "untied", adapted, merged, N * VOCAB, 5e-5));
        free(adapted), free(merged);
        fx_free(&model), fx_free(&d.file);
    }
}

Test(lora, merged_names_mean_their_parts)
{
    /* One pair over several slices equals pairs of the parts that share A. */
    static const struct {
        const char *whole;
        int64_t rows;
        const char *parts[4];
        int64_t part_rows[4];
    } rows[] = {
        {"layers.1.self_attn.qkv_proj",
         144,
         {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
         {96, 24, 24}},
        {"layers.1.mlp.gate_up_proj", 80, {"mlp.gate_proj", "mlp.up_proj"}, {40, 40}},
        {"layers.0.linear_attn.in_proj_qkvz",
         152,
         {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z"},
         {92, 60}},
        {"layers.0.linear_attn.in_proj_ba",
         12,
         {"linear_attn.in_proj_b", "linear_attn.in_proj_a"},
         {6, 6}},
        {"layers.0.linear_attn.in_proj_qkv",
         92,
         {"linear_attn.in_proj_q", "linear_attn.in_proj_k", "linear_attn.in_proj_v"},
         {16, 16, 60}},
    };
    fx_file model = {.n = 0};
    fx_random_model(&model, "model.", false, QV_F32, 12);
    const char *model_dir = fx_write_model(fx_config_text(false), &model);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        draft whole = {.file = {.n = 0}}, parts = {.file = {.n = 0}};
        strcpy(whole.config, "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8}");
        strcpy(parts.config, whole.config);
        add_pair(&whole, rows[i].whole, rows[i].rows, HIDDEN, 4, 5);
        const float *a = whole.file.tensors[0].data, *b = whole.file.tensors[1].data;
        for (int p = 0; p < 4 && rows[i].parts[p] != NULL; p++) {
            char name[200];
            snprintf(name, sizeof name, "%.9s%s.lora_A.weight", rows[i].whole, rows[i].parts[p]);
            fx_add(&parts.file, name, QV_F32, 2, (int64_t[]){4, HIDDEN}, a);
            snprintf(name, sizeof name, "%.9s%s.lora_B.weight", rows[i].whole, rows[i].parts[p]);
            fx_add(&parts.file, name, QV_F32, 2, (int64_t[]){rows[i].part_rows[p], 4}, b);
            b += rows[i].part_rows[p] * 4;
        }
        float *x = logits_with(model_dir, write_draft(&whole), 0);
        float *y = logits_with(model_dir, write_draft(&parts), 0);
        cr_expect_arr_eq(x, y, N * VOCAB * sizeof *x, "%s", rows[i].whole);
        free(x), free(y);
        fx_free(&whole.file), fx_free(&parts.file);
    }
    fx_free(&model);
}

Test(lora, a_pair_whose_b_is_zero_changes_no_bit)
{
    fx_file model = {.n = 0};
    fx_random_model(&model, "model.", false, QV_F32, 13);
    const char *dir = fx_write_model(fx_config_text(false), &model);
    draft d = small_draft();
    memset(fx_find(&d.file, small_b)->data, 0, 40 * 4 * sizeof(float));
    float *base = logits_with(dir, NULL, -1), *adapted = logits_with(dir, write_draft(&d), 0);
    cr_expect_arr_eq(base, adapted, N * VOCAB * sizeof *base);
    free(base), free(adapted);
    fx_free(&model), fx_free(&d.file);
}

/* --- Slots ------------------------------------------------------------------------------------ */

/* All bytes of one slot: A, B and slice entries of every site. The caller frees. */
static uint8_t *slot_bytes(qv_backend *be, const qv_lora_pool *pool, int32_t slot, bool poison,
                           size_t *size)
{
    uint8_t *out = NULL;
    *size = 0;
    for (int64_t layer = QV_GLOBAL; layer < 3; layer++) {
        for (int p = 0; p < QV_PROJ_COUNT; p++) {
            const qv_lora_site *site = qv_lora_pool_site(pool, layer, (qv_proj)p);
            if (site == NULL)
                continue;
            const struct {
                char *data;
                size_t bytes;
            } parts[] = {
                {site->a.data, (size_t)site->a.stride[0] * 4},
                {site->b.data, (size_t)site->b.stride[0] * 4},
                {(char *)site->slices, (size_t)site->n_slices * sizeof *site->slices},
            };
            for (int i = 0; i < 3; i++) {
                char *device = parts[i].data + (size_t)slot * parts[i].bytes;
                out = realloc(out, *size + parts[i].bytes);
                if (poison) { /* NaN, and ranks and planes out of range */
                    memset(out + *size, 0xFF, parts[i].bytes);
                    cr_assert_eq(qv_backend_upload(be, device, out + *size, parts[i].bytes), QV_OK);
                } else {
                    cr_assert_eq(qv_backend_download(be, out + *size, device, parts[i].bytes),
                                 QV_OK);
                }
                *size += parts[i].bytes;
            }
        }
    }
    return out;
}

Test(lora, installing_leaves_nothing_of_what_the_slot_held)
{
    static const int64_t ranks[] = {1, 2, 3, 7, 8, 9, 15, 16};
    qv_backend *be = fx_backend();
    const qv_layout *layout = layout_of(false);
    for (size_t r = 0; r < sizeof ranks / sizeof *ranks; r++) {
        draft d = {.file = {.n = 0}};
        snprintf(d.config, sizeof d.config,
                 "{\"peft_type\": \"LORA\", \"r\": %d, \"lora_alpha\": 8}", (int)ranks[r]);
        for (int i = 0; i < N_MODULES; i += 1 + (int)r % 3)
            add_pair(&d, modules[i].name, modules[i].rows, modules[i].cols, ranks[r], 3);
        qv_adapter *adapter;
        cr_assert_eq(read_draft(&d, &adapter), QV_OK, "%s", qv_error());

        qv_lora_pool *fresh, *used;
        cr_assert_eq(qv_lora_pool_new(be, layout, 3, POOL_RANK, UINT64_MAX, &fresh), QV_OK);
        cr_assert_eq(qv_lora_pool_new(be, layout, 3, POOL_RANK, UINT64_MAX, &used), QV_OK);
        size_t size, other_size;
        uint8_t *poison = NULL;
        for (int32_t slot = 0; slot < 3; slot++) {
            free(poison);
            poison = slot_bytes(be, used, slot, true, &size);
        }
        cr_assert_eq(qv_lora_pool_install(fresh, 1, adapter), QV_OK);
        cr_assert_eq(qv_lora_pool_install(used, 1, adapter), QV_OK);
        uint8_t *want = slot_bytes(be, fresh, 1, false, &size);
        uint8_t *got = slot_bytes(be, used, 1, false, &other_size);
        cr_expect(size == other_size && memcmp(want, got, size) == 0, "rank %d", (int)ranks[r]);
        for (int32_t slot = 0; slot < 3; slot += 2) { /* the neighbours are untouched */
            uint8_t *neighbour = slot_bytes(be, used, slot, false, &other_size);
            cr_expect_arr_eq(neighbour, poison, size, "slot %d", slot);
            free(neighbour);
        }
        cr_assert_eq(qv_lora_pool_clear(used, 1), QV_OK);
        uint8_t *cleared = slot_bytes(be, used, 1, false, &size);
        memset(want, 0, size);
        cr_expect_arr_eq(cleared, want, size);
        free(poison), free(want), free(got), free(cleared);
        qv_lora_pool_free(fresh);
        qv_lora_pool_free(used);
        qv_adapter_close(adapter);
        fx_free(&d.file);
    }
    qv_backend_close(be);
}

Test(lora, a_reused_slot_answers_as_a_fresh_one)
{
    fx_file model_file = {.n = 0};
    fx_random_model(&model_file, "model.", true, QV_BF16, 14);
    const char *dir = fx_write_model(fx_config_text(true), &model_file);
    draft large = full_draft(), small = small_draft();
    const char *small_dir = write_draft(&small);
    float *fresh = logits_with(dir, small_dir, 0);

    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, dir, &limits);
    const char *dirs[] = {write_draft(&large), small_dir};
    for (int i = 0; i < 2; i++) {
        qv_adapter *adapter;
        cr_assert_eq(qv_adapter_open(model, dirs[i], &adapter), QV_OK, "%s", qv_error());
        cr_assert_eq(qv_model_adapter_install(model, 0, adapter), QV_OK);
        qv_adapter_close(adapter);
    }
    float *reused = fx_run(model, tokens, N, 0, 0, 0, 0);
    cr_expect_arr_eq(fresh, reused, N * VOCAB * sizeof *fresh);
    float *base = fx_run(model, tokens, N, 0, -1, 0, 0);
    cr_assert_eq(qv_model_adapter_clear(model, 0), QV_OK);
    float *cleared = fx_run(model, tokens, N, 0, 0, 0, 0);
    cr_expect_arr_eq(base, cleared, N * VOCAB * sizeof *base);
    cr_expect_eq(qv_model_adapter_clear(model, limits.n_adapter_slots), QV_ERR_ARG);
    cr_expect_eq(qv_model_adapter_clear(model, -1), QV_ERR_ARG);
    free(fresh), free(reused), free(base), free(cleared);
    qv_model_close(model);
    qv_backend_close(be);
    fx_free(&model_file), fx_free(&large.file), fx_free(&small.file);
}

Test(lora, made_up_adapters_act_in_every_slot_until_they_are_cleared)
{
    fx_file model_file = {.n = 0};
    fx_random_model(&model_file, "model.", true, QV_BF16, 14);
    const char *dir = fx_write_model(fx_config_text(true), &model_file);
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, dir, &limits);
    float *base = fx_run(model, tokens, N, 0, -1, 0, 0);
    cr_assert_eq(qv_model_make_up_adapters(model, limits.max_lora_rank), QV_OK, "%s", qv_error());
    for (int32_t slot = 0; slot < limits.n_adapter_slots; slot++) {
        float *with = fx_run(model, tokens, N, 0, slot, 0, 0);
        cr_expect_arr_neq(base, with, N * VOCAB * sizeof *base, "slot %d", slot);
        cr_assert_eq(qv_model_adapter_clear(model, slot), QV_OK);
        float *cleared = fx_run(model, tokens, N, 0, slot, 0, 0);
        cr_expect_arr_eq(base, cleared, N * VOCAB * sizeof *base, "slot %d", slot);
        free(with), free(cleared);
    }
    cr_expect_eq(qv_model_make_up_adapters(model, limits.max_lora_rank + 1), QV_ERR_LIMIT);
    free(base);
    qv_model_close(model);
    qv_backend_close(be);
    fx_free(&model_file);
}

Test(lora, each_slice_has_its_own_rank_and_planes_of_a_module_are_shared)
{
    qv_backend *be = fx_backend();
    draft d = full_draft();
    qv_adapter *adapter;
    cr_assert_eq(read_draft(&d, &adapter), QV_OK, "%s", qv_error());
    qv_lora_pool *pool;
    cr_assert_eq(qv_lora_pool_new(be, layout_of(false), 2, POOL_RANK, UINT64_MAX, &pool), QV_OK);
    cr_assert_eq(qv_lora_pool_install(pool, 1, adapter), QV_OK);
    const qv_lora_site *site = qv_lora_pool_site(pool, 0, QV_PROJ_GDN_IN);
    static const int32_t ranks[] = {3, 3, 3, 16, 1, 2}, planes[] = {0, 0, 0, 3, 4, 5};
    for (int32_t i = 0; i < 6; i++) {
        const qv_lora_slice *slice = &site->slices[6 + i];
        cr_expect_eq(slice->rank, ranks[i], "slice %d", i);
        cr_expect_eq(slice->plane, planes[i], "slice %d", i);
        cr_expect_eq(slice->scale, 1.5f, "slice %d", i);
    }
    cr_expect_eq(site->slot_active[1], 1);
    cr_expect_eq(site->slot_active[0], 0);
    cr_expect_eq(qv_lora_pool_site(pool, 2, QV_PROJ_MLP_OUT)->slot_active[1], 0);
    cr_expect_null(qv_lora_pool_site(pool, 0, QV_PROJ_ATTN_IN));
    qv_lora_pool_free(pool);
    qv_adapter_close(adapter);
    qv_backend_close(be);
    fx_free(&d.file);
}

/* --- Spellings -------------------------------------------------------------------------------- */

/* Rename "base_model.model.model.X.lora_Y.weight" of every tensor to `start` X `end` with %c for Y.
 */
static void respell(fx_file *file, const char *start, const char *end)
{
    for (int i = 0; i < file->n; i++) {
        const char *name = file->tensors[i].name;
        const char *path = name + strlen("base_model.model.model."), *tail = strstr(path, ".lora_");
        char fresh[240];
        int n = snprintf(fresh, sizeof fresh, "%s%.*s", start, (int)(tail - path), path);
        snprintf(fresh + n, sizeof fresh - (size_t)n, end, tail[6]);
        free((char *)name);
        file->tensors[i].name = strdup(fresh);
    }
}

Test(lora, sites_name_the_next_one_of_a_step_and_the_last_the_first)
{
    qv_backend *be = fx_backend();
    qv_lora_pool *pool;
    const qv_layout *layout = layout_of(false);
    cr_assert_eq(qv_lora_pool_new(be, layout, 1, POOL_RANK, UINT64_MAX, &pool), QV_OK);
    const qv_lora_site *first = NULL, *last = NULL;
    for (int64_t layer = 0; layer < layout->config->n_layers; layer++)
        for (int p = 0; p < QV_PROJ_COUNT; p++) {
            const qv_lora_site *site = qv_lora_pool_site(pool, layer, (qv_proj)p);
            if (site == NULL)
                continue;
            cr_expect(last == NULL || last->next == site, "layer %d, %d", (int)layer, p);
            first = first == NULL ? site : first;
            last = site;
        }
    cr_assert(first != NULL && first != last && last->next == first);
    qv_lora_pool_free(pool);
    qv_backend_close(be);
}

Test(lora, every_spelling_is_the_same_adapter)
{
    static const struct {
        const char *start, *end;
    } rows[] = {
        {"base_model.model.model.", ".lora_%c.weight"},
        {"base_model.model.model.language_model.", ".lora_%c.weight"},
        {"base_model.model.language_model.model.", ".lora_%c.weight"},
        {"base_model.model.language_model.", ".lora_%c.weight"},
        {"base_model.model.model.", ".lora_%c.default.weight"},
        {"base_model.model.", ".lora_%c.weight"},
        {"model.", ".lora_%c.weight"},
        {"", ".lora_%c.weight"},
        {"backbone.", ".lora_%c.default.weight"},
    };
    char digest[33] = "";
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        draft d = small_draft();
        respell(&d.file, rows[i].start, rows[i].end);
        qv_adapter *adapter;
        cr_assert_eq(read_draft(&d, &adapter), QV_OK, "%s: %s", rows[i].start, qv_error());
        cr_expect_eq(qv_adapter_n_items(adapter), 1);
        if (i == 0)
            strcpy(digest, qv_adapter_digest(adapter));
        cr_expect_str_eq(qv_adapter_digest(adapter), digest, "%s", rows[i].start);
        qv_adapter_close(adapter);
        fx_free(&d.file);
    }
    cr_expect_eq(strlen(digest), 32);
}

Test(lora, the_head_has_several_names)
{
    static const char *const names[] = {
        "lm_head.lora_%c.weight", "lm_head.lora_embedding_%c", "model.lm_head.lora_%c.weight",
        "unembed_tokens.lora_%c.weight", "output.lora_%c.default.weight"};
    char digest[33] = "";
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        draft d = {.file = {.n = 0}};
        strcpy(d.config, "{\"peft_type\": \"lora\", \"r\": 4, \"lora_alpha\": 8}");
        add_pair(&d, "model.x", VOCAB, HIDDEN, 4, 5);
        for (int t = 0; t < 2; t++) {
            char fresh[100];
            snprintf(fresh, sizeof fresh, names[i], t ? 'B' : 'A');
            free((char *)d.file.tensors[t].name);
            d.file.tensors[t].name = strdup(fresh);
        }
        qv_adapter *adapter;
        cr_assert_eq(read_draft(&d, &adapter), QV_OK, "%s: %s", names[i], qv_error());
        cr_expect_eq(qv_adapter_item(adapter, 0)->layer, QV_GLOBAL);
        if (i == 0)
            strcpy(digest, qv_adapter_digest(adapter));
        cr_expect_str_eq(qv_adapter_digest(adapter), digest);
        qv_adapter_close(adapter);
        fx_free(&d.file);
    }
}

Test(lora, the_digest_follows_the_content_not_the_file)
{
    static const qv_dtype dtypes[] = {QV_F32, QV_BF16, QV_F16};
    char digest[4][33];
    for (int i = 0; i < 4; i++) {
        draft d = small_draft();
        for (int t = 0; t < 2; t++) { /* numbers that every dtype holds exactly */
            fx_tensor *x = &d.file.tensors[t];
            float values[200];
            int64_t n = x->shape[0] * x->shape[1];
            for (int64_t k = 0; k < n; k++)
                values[k] = (float)(k % 7) / 4 + (i == 3 && k == 0 ? 1 : 0);
            free(x->data);
            x->data = malloc(sizeof values);
            x->dtype = dtypes[i % 3];
            cr_assert_eq(qv_dtype_from_f32(x->dtype, values, x->data, n), QV_OK);
        }
        qv_adapter *adapter;
        cr_assert_eq(read_draft(&d, &adapter), QV_OK, "%s", qv_error());
        strcpy(digest[i], qv_adapter_digest(adapter));
        qv_adapter_close(adapter);
        fx_free(&d.file);
    }
    cr_expect_str_eq(digest[0], digest[1]);
    cr_expect_str_eq(digest[0], digest[2]);
    cr_expect_str_neq(digest[0], digest[3]);
}

Test(lora, the_scale_follows_alpha_rank_and_patterns)
{
    static const struct {
        const char *config;
        double scale;
    } rows[] = {
        {"\"r\": 4, \"lora_alpha\": 8", 2},
        {"\"r\": 4, \"lora_alpha\": 0.5", 0.125},
        {"\"r\": 4, \"lora_alpha\": 8, \"use_rslora\": true", 4},
        {"\"r\": 9, \"lora_alpha\": 8, \"rank_pattern\": {\"up_proj\": 4}", 2},
        {"\"r\": 9, \"lora_alpha\": 8, \"rank_pattern\": {\"mlp.up_proj\": 4}", 2},
        {"\"r\": 9, \"lora_alpha\": 8, \"rank_pattern\": {\"layers\\\\.1\\\\..*\": 4}", 2},
        {"\"r\": 9, \"lora_alpha\": 8, \"rank_pattern\": {\"^model.layers.1.mlp.up_proj\": 4}", 2},
        {"\"r\": 9, \"lora_alpha\": 8, \"target_parameters\": [\"up_proj.weight\"],"
         " \"rank_pattern\": {\"up_proj.weight\": 4}",
         2},
        {"\"r\": 4, \"lora_alpha\": 8, \"alpha_pattern\": {\"up_proj\": 2}", 0.5},
        {"\"r\": 4, \"lora_alpha\": 8, \"alpha_pattern\": {\"p_proj\": 2, \"up_proj\": 6}", 1.5},
        {"\"r\": 4, \"lora_alpha\": 8, \"alpha_pattern\": {\".*_proj\": 12, \"up_proj\": 6}", 3},
        {"\"r\": 9, \"lora_alpha\": 8, \"rank_pattern\": {\"up_proj\": 4},"
         " \"alpha_pattern\": {\"up_proj\": 16}, \"use_rslora\": true",
         8},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        draft d = small_draft();
        snprintf(d.config, sizeof d.config, "{\"peft_type\": \"LORA\", %s}", rows[i].config);
        qv_adapter *adapter;
        cr_assert_eq(read_draft(&d, &adapter), QV_OK, "%s: %s", rows[i].config, qv_error());
        cr_expect_eq(qv_adapter_item(adapter, 0)->scale, (float)rows[i].scale, "%s: %g",
                     rows[i].config, qv_adapter_item(adapter, 0)->scale);
        qv_adapter_close(adapter);
        fx_free(&d.file);
    }
}

Test(lora, notes_say_what_was_passed_over)
{
    draft d = small_draft();
    strcpy(d.config,
           "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"new_field\": 3,"
           " \"loftq_config\": {}, \"modules_to_save\": null, \"init_lora_weights\": true,"
           " \"target_modules\": [\"up_proj\", \"q_proj\"]}");
    fx_add(&d.file, "base_model.model.model.visual.x.lora_A.weight", QV_F32, 1, (int64_t[]){1},
           (float[]){5});
    fx_add(&d.file, "base_model.model.model.visual.x.lora_B.weight", QV_F32, 1, (int64_t[]){1},
           (float[]){0});
    fx_add(&d.file, "base_model.model.nothing.lora_A.weight", QV_F32, 2, (int64_t[]){0, 5},
           (float[]){0});
    qv_adapter *adapter;
    cr_assert_eq(read_draft(&d, &adapter), QV_OK, "%s", qv_error());
    const char *notes = qv_adapter_notes(adapter);
    cr_expect_not_null(strstr(notes, "new_field"), "%s", notes);
    cr_expect_not_null(strstr(notes, "target_modules names q_proj"), "%s", notes);
    cr_expect_not_null(strstr(notes, "2 tensors of parts that are not served"), "%s", notes);
    cr_expect_not_null(strstr(notes, "1 tensors without elements"), "%s", notes);
    cr_expect_eq(qv_adapter_max_rank(adapter), 4);
    cr_expect_eq(qv_adapter_bytes(adapter), (4 * HIDDEN + 40 * 4) * 4);
    qv_adapter_close(adapter);
    fx_free(&d.file);
}

/* --- What is refused -------------------------------------------------------------------------- */

Test(lora, refuses_configs_that_it_cannot_honour)
{
    static const struct {
        const char *config;
        qv_status status;
        const char *says;
    } rows[] = {
        {"[]", QV_ERR_FORMAT, "not a JSON object"},
        {"{", QV_ERR_FORMAT, ""},
        {"{\"r\": 4, \"lora_alpha\": 8}", QV_ERR_FORMAT, "peft_type"},
        {"{\"peft_type\": \"LOHA\", \"r\": 4, \"lora_alpha\": 8}", QV_ERR_UNSUPPORTED, "\"LOHA\""},
        {"{\"peft_type\": \"LORA\", \"lora_alpha\": 8}", QV_ERR_FORMAT, "r"},
        {"{\"peft_type\": \"LORA\", \"r\": 0, \"lora_alpha\": 8}", QV_ERR_FORMAT, "r is 0"},
        {"{\"peft_type\": \"LORA\", \"r\": 4.5, \"lora_alpha\": 8}", QV_ERR_FORMAT, "r"},
        {"{\"peft_type\": \"LORA\", \"r\": 4}", QV_ERR_FORMAT, "lora_alpha"},
        {"{\"peft_type\": \"LORA\", \"r\": 8, \"lora_alpha\": 8}", QV_ERR_FORMAT,
         "model.layers.1.mlp.up_proj has rank 4, but the file says rank 8"},
#define FIELD(text) "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, " text "}"
        {FIELD("\"use_dora\": true"), QV_ERR_UNSUPPORTED, "use_dora is true"},
        {FIELD("\"lora_bias\": true"), QV_ERR_UNSUPPORTED, "lora_bias"},
        {FIELD("\"bias\": \"all\""), QV_ERR_UNSUPPORTED, "bias is \"all\""},
        {FIELD("\"fan_in_fan_out\": true"), QV_ERR_UNSUPPORTED, "fan_in_fan_out"},
        {FIELD("\"modules_to_save\": [\"lm_head\"]"), QV_ERR_UNSUPPORTED, "modules_to_save"},
        {FIELD("\"target_parameters\": \"experts.down_proj\""), QV_ERR_FORMAT,
         "target_parameters is not a list"},
        {FIELD("\"target_parameters\": [\"down_proj\", 3]"), QV_ERR_FORMAT,
         "target_parameters[1] is not a string"},
        {FIELD("\"expert_layout\": \"transposed\""), QV_ERR_FORMAT,
         "expert_layout is \"transposed\", not standard or swapped"},
        {FIELD("\"expert_b_packing\": \"rows\""), QV_ERR_FORMAT,
         "expert_b_packing is \"rows\", not peft or grouped"},
        {FIELD("\"layer_replication\": [[0, 2]]"), QV_ERR_UNSUPPORTED, "layer_replication"},
        {FIELD("\"alora_invocation_tokens\": [1]"), QV_ERR_UNSUPPORTED, "alora_invocation_tokens"},
        {FIELD("\"trainable_token_indices\": [1]"), QV_ERR_UNSUPPORTED, "trainable_token_indices"},
        {FIELD("\"use_qalora\": true"), QV_ERR_UNSUPPORTED, "use_qalora"},
        {FIELD("\"use_bdlora\": {\"x\": 1}"), QV_ERR_UNSUPPORTED, "use_bdlora"},
        {FIELD("\"init_lora_weights\": \"pissa\""), QV_ERR_UNSUPPORTED, "\"pissa\""},
        {FIELD("\"init_lora_weights\": 3"), QV_ERR_UNSUPPORTED, "init_lora_weights"},
        {FIELD("\"target_modules\": 3"), QV_ERR_FORMAT, "target_modules"},
        {FIELD("\"use_rslora\": \"yes\""), QV_ERR_FORMAT, "use_rslora"},
        {FIELD("\"rank_pattern\": []"), QV_ERR_FORMAT, "rank_pattern"},
        {FIELD("\"rank_pattern\": {\"up_proj\": \"4\"}"), QV_ERR_FORMAT, "rank_pattern"},
        {FIELD("\"rank_pattern\": {\"up_proj\": 5}"), QV_ERR_FORMAT, "says rank 5"},
        {FIELD("\"alpha_pattern\": {\"(\": 4}"), QV_ERR_FORMAT, "not a pattern"},
        {FIELD("\"alpha_pattern\": {\"(.|..)*[xz]\": 4}"), QV_ERR_LIMIT, "takes too much"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        draft d = small_draft();
        snprintf(d.config, sizeof d.config, "%s", rows[i].config);
        qv_adapter *adapter;
        cr_expect_eq(read_draft(&d, &adapter), rows[i].status, "%s", rows[i].config);
        cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s says: %s", rows[i].config,
                           qv_error());
        fx_free(&d.file);
    }
}

static void add_zero(draft *d, const char *name, int64_t rows, int64_t cols)
{
    float zeros[4096] = {0};
    fx_add(&d->file, name, QV_F32, 2, (int64_t[]){rows, cols}, zeros);
}

static void no_b(draft *d)
{
    fx_remove(&d->file, small_b);
}
static void no_a(draft *d)
{
    fx_remove(&d->file, small_a);
}
static void nothing(draft *d)
{
    fx_free(&d->file);
}
static void only_empty(draft *d)
{
    nothing(d);
    add_zero(d, small_a, 0, HIDDEN);
}
static void other_rank(draft *d)
{
    fx_find(&d->file, small_b)->shape[1] = 2, fx_find(&d->file, small_b)->shape[0] = 40;
}
static void wide_a(draft *d)
{
    fx_find(&d->file, small_a)->shape[1] = 12;
}
static void tall_b(draft *d)
{
    fx_find(&d->file, small_b)->shape[0] = 20;
}
static void cube_a(draft *d)
{
    fx_tensor *t = fx_find(&d->file, small_a);
    t->n_dims = 3, t->shape[2] = 1;
}
static void large_rank(draft *d)
{
    nothing(d);
    add_pair(d, small_module, 40, HIDDEN, 17, 1);
}
static void nan_a(draft *d)
{
    ((float *)fx_find(&d->file, small_a)->data)[17] = NAN;
}
static void infinite_b(draft *d)
{
    ((float *)fx_find(&d->file, small_b)->data)[3] = INFINITY;
}
static void integers(draft *d)
{
    fx_find(&d->file, small_a)->dtype = QV_I32;
}
static void doubles(draft *d)
{
    fx_tensor *t = fx_find(&d->file, small_a);
    t->dtype = QV_F64, t->shape[0] = 2, t->shape[1] = HIDDEN;
}
static void no_such_layer(draft *d)
{
    add_pair(d, "model.layers.3.mlp.up_proj", 40, HIDDEN, 4, 1);
}
static void wrong_kind(draft *d)
{
    add_pair(d, "model.layers.0.self_attn.q_proj", 96, HIDDEN, 4, 1);
}
static void convolution(draft *d)
{
    add_pair(d, "model.layers.0.linear_attn.conv1d", 92, HIDDEN, 4, 1);
}
static void many_misfits(draft *d)
{
    for (int i = 0; i < 3; i++) {
        char name[64];
        snprintf(name, sizeof name, "model.layers.%d.mlp.experts.0.up_proj", i);
        add_pair(d, name, 40, HIDDEN, 4, 1);
    }
}
static void odd_layer_number(draft *d)
{
    add_pair(d, "model.layers.01.mlp.down_proj", HIDDEN, 40, 4, 1);
}
static void embedding(draft *d)
{
    add_zero(d, "base_model.model.model.embed_tokens.lora_embedding_A", 4, VOCAB - 1);
    add_zero(d, "base_model.model.model.embed_tokens.lora_embedding_B", HIDDEN, 4);
}
static void embedding_key_of_a_layer(draft *d)
{
    add_zero(d, "base_model.model.model.layers.0.mlp.up_proj.lora_embedding_A", 4, HIDDEN);
}
static void dora(draft *d)
{
    add_zero(d, "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector", 40, 1);
}
static void bias(draft *d)
{
    add_zero(d, "base_model.model.model.layers.1.mlp.up_proj.lora_B.bias", 40, 1);
}
static void saved_module(draft *d)
{
    add_zero(d, "base_model.model.lm_head.modules_to_save.weight", VOCAB, HIDDEN);
}
static void full_weight(draft *d)
{
    add_zero(d, "base_model.model.model.layers.1.mlp.up_proj.weight", 40, HIDDEN);
}
static void changed_head(draft *d)
{
    add_zero(d, "base_model.model.lm_head.base_layer.weight", VOCAB, HIDDEN);
}
static void alpha_tensor(draft *d)
{
    add_zero(d, "model.layers.1.mlp.up_proj.alpha", 1, 1);
}
static void stray(draft *d)
{
    add_zero(d, "optimizer_state", 1, 1);
}
static void other_name(draft *d)
{
    add_zero(d, "base_model.model.model.layers.1.mlp.up_proj.lora_A.tuned.weight", 4, HIDDEN);
}
static void vision_weight(draft *d)
{
    add_zero(d, "model.visual.blocks.0.weight", 4, 4);
}
static void vision(draft *d)
{
    add_pair(d, "model.visual.blocks.0.attn.qkv", 4, 4, 4, 1);
}
static void mtp(draft *d)
{
    add_pair(d, "mtp.layers.0.mlp.up_proj", 4, 4, 4, 1);
}
static void twice(draft *d)
{
    add_zero(d, "layers.1.mlp.up_proj.lora_A.weight", 4, HIDDEN);
}
static void overlapping(draft *d)
{
    add_pair(d, "model.layers.1.mlp.gate_up_proj", 80, HIDDEN, 4, 1);
}
Test(lora, refuses_tensors_that_do_not_fit_and_names_them)
{
    static const struct {
        const char *what;
        void (*spoil)(draft *);
        qv_status status;
        const char *says;
    } rows[] = {
        {"A alone", no_b, QV_ERR_FORMAT, "up_proj.lora_A.weight has no lora_B beside it"},
        {"B alone", no_a, QV_ERR_FORMAT, "up_proj.lora_B.weight has no lora_A beside it"},
        {"no tensor", nothing, QV_ERR_FORMAT, "no pair"},
        {"only placeholders", only_empty, QV_ERR_FORMAT, "no pair"},
        {"ranks differ", other_rank, QV_ERR_SHAPE, "has rank 4, but its lora_B has rank 2"},
        {"A of another width", wide_a, QV_ERR_SHAPE, "F32[4, 12]; the model makes it [rank, 24]"},
        {"B of another height", tall_b, QV_ERR_SHAPE, "F32[20, 4]; the model makes it [40, rank]"},
        {"A of 3 dimensions", cube_a, QV_ERR_SHAPE, "F32[4, 24, 1]"},
        {"rank above the pool", large_rank, QV_ERR_LIMIT,
         "rank 17; the adapter slots have room for 16"},
        {"NaN", nan_a, QV_ERR_FORMAT, "lora_A.weight: element 17 is NaN"},
        {"infinity", infinite_b, QV_ERR_FORMAT, "lora_B.weight: element 3 is infinite"},
        {"integers", integers, QV_ERR_UNSUPPORTED, "I32[4, 24]"},
        {"doubles", doubles, QV_ERR_UNSUPPORTED, "F64[2, 24]"},
        {"layer out of range", no_such_layer, QV_ERR_UNSUPPORTED,
         "layers.3.mlp.up_proj.lora_A.weight (the model has no such layer)"},
        {"layer of another kind", wrong_kind, QV_ERR_UNSUPPORTED,
         "a layer of this kind has no such module"},
        {"convolution", convolution, QV_ERR_UNSUPPORTED, "conv1d.lora_A.weight (no such module)"},
        {"many", many_misfits, QV_ERR_UNSUPPORTED, "6 tensors have no place"},
        {"layer number", odd_layer_number, QV_ERR_UNSUPPORTED, "no layer number"},
        {"embedding", embedding, QV_ERR_SHAPE, "F32[4, 49]; the model makes it [rank, 50]"},
        {"embedding key", embedding_key_of_a_layer, QV_ERR_UNSUPPORTED, "not an embedding"},
        {"DoRA", dora, QV_ERR_UNSUPPORTED, "DoRA"},
        {"bias", bias, QV_ERR_UNSUPPORTED, "trained biases"},
        {"modules_to_save", saved_module, QV_ERR_UNSUPPORTED, "modules_to_save"},
        {"a full weight", full_weight, QV_ERR_UNSUPPORTED, "full copy"},
        {"a changed head", changed_head, QV_ERR_UNSUPPORTED, "not the same as the base model's"},
        {"alpha", alpha_tensor, QV_ERR_UNSUPPORTED, "an alpha for each layer"},
        {"stray tensor", stray, QV_ERR_UNSUPPORTED,
         "optimizer_state (neither a lora_A nor a lora_B that is known)"},
        {"an adapter's name", other_name, QV_ERR_UNSUPPORTED, "that is known"},
        {"vision weight", vision_weight, QV_ERR_UNSUPPORTED, "model.visual.blocks.0.weight"},
        {"vision", vision, QV_ERR_UNSUPPORTED, "model.visual.blocks.0.attn.qkv.lora_B.weight"},
        {"prediction head", mtp, QV_ERR_UNSUPPORTED, "mtp.layers.0.mlp.up_proj.lora_B.weight"},
        {"two spellings", twice, QV_ERR_FORMAT, "the same matrix twice"},
        {"overlap", overlapping, QV_ERR_FORMAT, "change the same rows"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        draft d = small_draft();
        rows[i].spoil(&d);
        qv_adapter *adapter;
        cr_expect_eq(read_draft(&d, &adapter), rows[i].status, "%s", rows[i].what);
        cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s: %s", rows[i].what, qv_error());
        fx_free(&d.file);
    }
}

Test(lora, skips_a_copy_of_the_base_head_that_is_unchanged)
{
    for (int tied = 0; tied < 2; tied++) {
        fx_file model = {.n = 0};
        fx_random_model(&model, "model.", tied, QV_BF16, 21);
        qv_adapter_spec spec = spec_of(tied);
        spec.model_dir = fx_write_model(fx_config_text(tied), &model);
        const char *source = tied ? "model.embed_tokens.weight" : "lm_head.weight";
        float values[VOCAB * HIDDEN];
        cr_assert_eq(
            qv_dtype_to_f32(QV_BF16, fx_find(&model, source)->data, values, VOCAB * HIDDEN), QV_OK);
        for (int changed = 0; changed < 2; changed++) {
            draft d = small_draft();
            values[7] += (float)changed;
            fx_add(&d.file, "base_model.model.lm_head.base_layer.weight", QV_F32, 2,
                   (int64_t[]){VOCAB, HIDDEN}, values);
            qv_adapter *adapter;
            qv_status status = qv_adapter_read(&spec, write_draft(&d), &adapter);
            cr_expect_eq(status, changed ? QV_ERR_UNSUPPORTED : QV_OK, "%s", qv_error());
            if (status == QV_OK)
                qv_adapter_close(adapter);
            fx_free(&d.file);
        }
        fx_free(&model);
    }
}

Test(lora, says_which_file_is_missing_or_too_large)
{
    qv_adapter_spec spec = spec_of(false);
    qv_adapter *adapter;
    cr_expect_eq(qv_adapter_read(&spec, "/nonexistent", &adapter), QV_ERR_NOT_FOUND);
    cr_expect_not_null(strstr(qv_error(), "adapter_config.json"));

    draft d = small_draft();
    const char *dir = write_draft(&d);
    spec.max_bytes = 100;
    cr_expect_eq(qv_adapter_read(&spec, dir, &adapter), QV_ERR_LIMIT);
    spec.max_bytes = 0;
    qv_write_text(qv_path(dir, "added_tokens.json"), "{\"<x>\": 49}");
    cr_assert_eq(qv_adapter_read(&spec, dir, &adapter), QV_OK, "%s", qv_error());
    qv_adapter_close(adapter);
    qv_write_text(qv_path(dir, "added_tokens.json"), "{\"<x>\": 50}");
    cr_expect_eq(qv_adapter_read(&spec, dir, &adapter), QV_ERR_UNSUPPORTED);
    cr_expect_not_null(strstr(qv_error(), "token 50"), "%s", qv_error());
    remove(qv_path(dir, "added_tokens.json"));

    cr_assert_eq(
        rename(qv_path(dir, "adapter_model.safetensors"), qv_path(dir, "adapter_model.bin")), 0);
    cr_expect_eq(qv_adapter_read(&spec, dir, &adapter), QV_ERR_UNSUPPORTED);
    cr_expect_not_null(strstr(qv_error(), "adapter_model.bin"), "%s", qv_error());
    remove(qv_path(dir, "adapter_model.bin"));
    cr_expect_eq(qv_adapter_read(&spec, dir, &adapter), QV_ERR_NOT_FOUND);
    cr_expect_not_null(strstr(qv_error(), "adapter_model.safetensors"), "%s", qv_error());
    fx_free(&d.file);
}

Test(lora, reads_the_shards_of_an_index)
{
    draft d = small_draft(), parts[2] = {{.file = {.n = 0}}, {.file = {.n = 0}}};
    const char *dir = qv_temp_dir();
    qv_write_text(qv_path(dir, "adapter_config.json"), d.config);
    for (int i = 0; i < 2; i++) {
        const fx_tensor *t = &d.file.tensors[i];
        fx_add(&parts[i].file, t->name, QV_F32, 2, t->shape, t->data);
        fx_write(&parts[i].file, qv_path(dir, "adapter_model-0000%d-of-00002.safetensors", i + 1));
    }
    char index[1024];
    snprintf(index, sizeof index,
             "{\"weight_map\": {\"%s\": \"adapter_model-00001-of-00002.safetensors\","
             " \"%s\": \"adapter_model-00002-of-00002.safetensors\"}}",
             small_a, small_b);
    qv_adapter_spec spec = spec_of(false);
    qv_adapter *whole, *sharded;
    cr_expect_eq(qv_adapter_read(&spec, dir, &sharded), QV_ERR_NOT_FOUND);
    cr_expect_not_null(strstr(qv_error(), "adapter_model.safetensors.index.json"), "%s",
                       qv_error());
    qv_write_text(qv_path(dir, "adapter_model.safetensors.index.json"), index);
    cr_assert_eq(qv_adapter_read(&spec, dir, &sharded), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_adapter_read(&spec, write_draft(&d), &whole), QV_OK, "%s", qv_error());
    cr_expect_str_eq(qv_adapter_digest(whole), qv_adapter_digest(sharded));
    spec.max_bytes = 1000; /* the shards hold 384 and 640 */
    qv_adapter *none;
    cr_expect_eq(qv_adapter_read(&spec, dir, &none), QV_ERR_LIMIT);
    remove(qv_path(dir, "adapter_model-00002-of-00002.safetensors"));
    spec.max_bytes = 0;
    cr_expect_eq(qv_adapter_read(&spec, dir, &none), QV_ERR_NOT_FOUND);
    qv_adapter_close(whole), qv_adapter_close(sharded);
    fx_free(&d.file), fx_free(&parts[0].file), fx_free(&parts[1].file);
}

Test(lora, refuses_every_truncation_of_a_file)
{
    draft d = small_draft();
    size_t size;
    uint8_t *bytes = fx_bytes(&d.file, &size);
    qv_adapter_spec spec = spec_of(false);
    for (size_t n = 0; n < size; n += n < 400 ? 1 : 37) {
        uint8_t *cut = malloc(n + 1);
        memcpy(cut, bytes, n);
        qv_adapter *adapter;
        cr_expect_neq(qv_adapter_read_memory(&spec, d.config, strlen(d.config), cut, n, &adapter),
                      QV_OK);
        free(cut);
    }
    free(bytes);
    fx_free(&d.file);
}

Test(lora, reads_the_bundled_adapters)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    qv_model_config config;
    qv_layout layout;
    cr_assert_eq(qv_model_config_load(dir, &config), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_layout_init(&layout, &config, 0, 1), QV_OK);
    static const struct {
        const char *name;
        int32_t rank;
        float scale;
    } rows[] = {{"json", 8, 2}, {"french", 16, 4}, {"emoji", 8, 4}};
    for (size_t i = 0; i < 3; i++) {
        qv_adapter_spec spec = {.layout = &layout, .max_rank = 16, .dtype = QV_BF16};
        qv_adapter *adapter;
        cr_assert_eq(qv_adapter_read(&spec, qv_path(dir, "adapters/%s", rows[i].name), &adapter),
                     QV_OK, "%s", qv_error());
        cr_expect_eq(qv_adapter_max_rank(adapter), rows[i].rank);
        cr_expect_eq(qv_adapter_item(adapter, 0)->scale, rows[i].scale, "%s: %g", rows[i].name,
                     qv_adapter_item(adapter, 0)->scale);
        cr_expect_str_eq(qv_adapter_notes(adapter), "");
        qv_adapter_close(adapter);
    }
}
