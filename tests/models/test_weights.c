/* Loading checkpoints: spellings that are the same model, and what stops a load. */
#include "models/weights.h"
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 9, VOCAB = 50 };
static const int32_t tokens[N] = {3, 41, 5, 9, 0, 49, 7, 7, 12};

/* Logits of the tokens by the model in `dir`. The caller frees. */
static float *logits_of(const char *dir)
{
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, dir, &limits);
    float *logits = fx_run(model, tokens, N, 0, -1, 0, 0);
    qv_model_close(model);
    qv_backend_close(be);
    return logits;
}

/* fx_config_text nested as multimodal releases are. The caller frees. */
static char *nested_config(bool tied)
{
    char *text = NULL;
    cr_assert_gt(
        asprintf(&text, "{\"model_type\": \"qwen3_5\", \"text_config\": %s}", fx_config_text(tied)),
        0);
    return text;
}

Test(weights, loads_the_multimodal_spelling_as_the_same_model)
{
    fx_file plain = {.n = 0}, nested = {.n = 0};
    qv_rng rng = qv_rng_seed(9);
    fx_random_model(&plain, "model.", false, QV_BF16, 1);
    fx_random_model(&nested, "model.language_model.", false, QV_BF16, 1);
    fx_add_random(&nested, "model.visual.patch.weight", QV_BF16, 1, (int64_t[]){5}, &rng, 1);
    fx_add_random(&nested, "mtp.fc.weight", QV_F16, 1, (int64_t[]){5}, &rng, 1);
    char *config = nested_config(false);
    float *a = logits_of(fx_write_model(fx_config_text(false), &plain));
    float *b = logits_of(fx_write_model(config, &nested));
    cr_assert_arr_eq(a, b, N * VOCAB * sizeof *a);
    free(a), free(b), free(config);
    fx_free(&plain), fx_free(&nested);
}

Test(weights, loads_shards_as_the_same_model)
{
    fx_file all = {.n = 0};
    fx_random_model(&all, "model.", true, QV_BF16, 2);
    float *a = logits_of(fx_write_model(fx_config_text(true), &all));

    const char *dir = qv_temp_dir();
    qv_write_text(qv_path(dir, "config.json"), fx_config_text(true));
    fx_file part[2] = {{.n = 0}, {.n = 0}};
    char index[16384] = "{\"weight_map\": {";
    for (int i = 0; i < all.n; i++) {
        part[i % 2].tensors[part[i % 2].n++] = all.tensors[i];
        sprintf(index + strlen(index), "%s\"%s\": \"%d.safetensors\"", i ? ", " : "",
                all.tensors[i].name, i % 2);
    }
    qv_write_text(qv_path(dir, "model.safetensors.index.json"), strcat(index, "}}"));
    fx_write(&part[0], qv_path(dir, "0.safetensors"));
    fx_write(&part[1], qv_path(dir, "1.safetensors"));
    float *b = logits_of(dir);
    cr_assert_arr_eq(a, b, N * VOCAB * sizeof *a);
    free(a), free(b);
    fx_free(&all);
}

Test(weights, a_tied_head_is_the_embedding_even_beside_a_stored_head)
{
    fx_file tied = {.n = 0}, stored = {.n = 0}, untied = {.n = 0};
    qv_rng rng = qv_rng_seed(3);
    fx_random_model(&tied, "model.", true, QV_F32, 3);
    fx_random_model(&stored, "model.", true, QV_F32, 3);
    fx_add_random(&stored, "lm_head.weight", QV_F32, 2, (int64_t[]){VOCAB, 24}, &rng, 1);
    fx_random_model(&untied, "model.", true, QV_F32, 3);
    fx_add(&untied, "lm_head.weight", QV_F32, 2, (int64_t[]){VOCAB, 24},
           fx_find(&untied, "model.embed_tokens.weight")->data);
    float *a = logits_of(fx_write_model(fx_config_text(true), &tied));
    float *b = logits_of(fx_write_model(fx_config_text(true), &stored));
    float *c = logits_of(fx_write_model(fx_config_text(false), &untied));
    cr_expect_arr_eq(a, b, N * VOCAB * sizeof *a);
    cr_expect_arr_eq(a, c, N * VOCAB * sizeof *a);
    free(a), free(b), free(c);
    fx_free(&tied), fx_free(&stored), fx_free(&untied);
}

Test(weights, takes_f16_and_f32_checkpoints)
{
    /* The same numbers, exact in every dtype, must give the same bits. */
    static const qv_dtype dtypes[] = {QV_BF16, QV_F16, QV_F32};
    float *logits[3];
    for (int d = 0; d < 3; d++) {
        fx_file file = {.n = 0};
        fx_random_model(&file, "model.", false, QV_F32, 4);
        for (int i = 0; i < file.n; i++) {
            fx_tensor *t = &file.tensors[i];
            int64_t n =
                t->shape[0] * (t->n_dims > 1 ? t->shape[1] : 1) * (t->n_dims > 2 ? t->shape[2] : 1);
            float *values = t->data;
            for (int64_t k = 0; k < n; k++)
                values[k] = roundf(values[k] * 64) / 64;
            void *converted = malloc((size_t)n * 4);
            cr_assert_eq(qv_dtype_from_f32(dtypes[d], values, converted, n), QV_OK);
            free(t->data);
            t->data = converted;
            t->dtype = dtypes[d];
        }
        logits[d] = logits_of(fx_write_model(fx_config_text(false), &file));
        fx_free(&file);
    }
    cr_expect_arr_eq(logits[0], logits[1], N * VOCAB * sizeof *logits[0]);
    cr_expect_arr_eq(logits[0], logits[2], N * VOCAB * sizeof *logits[0]);
    for (int d = 0; d < 3; d++)
        free(logits[d]);
}

/* --- What stops a load ------------------------------------------------------------------------ */

static const char q_name[] = "model.layers.1.self_attn.q_proj.weight";
static const char norm_name[] = "model.layers.2.linear_attn.norm.weight";

static void drop_q(fx_file *f)
{
    fx_remove(f, q_name);
}
static void drop_many(fx_file *f)
{
    fx_remove(f, q_name);
    fx_remove(f, norm_name);
}
static void drop_head(fx_file *f)
{
    fx_remove(f, "lm_head.weight");
}
static void drop_embed(fx_file *f)
{
    fx_remove(f, "model.embed_tokens.weight");
}
static void extra(fx_file *f)
{
    fx_add(f, "model.layers.1.self_attn.q_proj.bias", QV_BF16, 1, (int64_t[]){1}, (float[]){0});
}
static void extra_layer(fx_file *f)
{
    fx_add(f, "model.layers.3.input_layernorm.weight", QV_BF16, 1, (int64_t[]){1}, (float[]){0});
}
static void transpose_q(fx_file *f)
{
    fx_tensor *t = fx_find(f, q_name);
    t->shape[0] = 24, t->shape[1] = 96;
}
static void flatten_q(fx_file *f)
{
    fx_tensor *t = fx_find(f, q_name);
    t->n_dims = 1, t->shape[0] = 24 * 96;
}
static void integer_norm(fx_file *f)
{
    fx_find(f, norm_name)->dtype = QV_I16;
}
static void quantised_q(fx_file *f)
{
    fx_tensor *t = fx_find(f, q_name);
    t->dtype = QV_F8_E4M3;
}
static void nan_norm(fx_file *f)
{
    ((uint16_t *)fx_find(f, norm_name)->data)[3] = 0x7FC0;
}
static void nan_q(fx_file *f)
{
    ((uint16_t *)fx_find(f, q_name)->data)[100] = 0xFF80;
}

Test(weights, stops_at_what_does_not_fit_and_names_it)
{
    static const struct {
        const char *what;
        void (*spoil)(fx_file *);
        qv_status status;
        const char *says;
    } rows[] = {
        {"missing", drop_q, QV_ERR_FORMAT,
         "lacks model.layers.1.self_attn.q_proj.weight (1 missing"},
        {"two missing", drop_many, QV_ERR_FORMAT, "2 missing"},
        {"no head", drop_head, QV_ERR_FORMAT, "lacks lm_head.weight"},
        {"no embedding", drop_embed, QV_ERR_FORMAT, "model.embed_tokens.weight"},
        {"unexpected", extra, QV_ERR_FORMAT, "q_proj.bias has no place"},
        {"one layer too many", extra_layer, QV_ERR_FORMAT, "model.layers.3.input_layernorm.weight"},
        {"transposed", transpose_q, QV_ERR_SHAPE,
         "BF16[24, 96]; config.json makes it BF16[96, 24]"},
        {"flat", flatten_q, QV_ERR_SHAPE, "q_proj.weight is BF16[2304]"},
        {"integers", integer_norm, QV_ERR_UNSUPPORTED, "norm.weight is I16[10]"},
        {"quantised", quantised_q, QV_ERR_UNSUPPORTED, "q_proj.weight is F8_E4M3"},
        {"NaN in a norm", nan_norm, QV_ERR_FORMAT, "norm.weight: element 3 is NaN"},
        {"infinity in a matrix", nan_q, QV_ERR_FORMAT, "q_proj.weight: element 100 is infinite"},
    };
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        fx_file file = {.n = 0};
        fx_random_model(&file, "model.", false, QV_BF16, 5);
        rows[i].spoil(&file);
        const char *dir = fx_write_model(fx_config_text(false), &file);
        qv_model *model;
        cr_expect_eq(qv_model_open(dir, be, &limits, NULL, NULL, &model), rows[i].status, "%s",
                     rows[i].what);
        cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s: %s", rows[i].what, qv_error());
        fx_free(&file);
    }
    qv_backend_close(be);
}

static void watch(uint64_t done, uint64_t total, void *user)
{
    uint64_t *last = user;
    cr_expect(done > *last && done <= total);
    *last = done;
    if (done == total)
        last[1]++;
}

Test(weights, reports_progress_up_to_the_last_byte)
{
    fx_file file = {.n = 0};
    fx_random_model(&file, "model.", true, QV_BF16, 6);
    const char *dir = fx_write_model(fx_config_text(true), &file);
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model;
    uint64_t seen[2] = {0, 0};
    cr_assert_eq(qv_model_open(dir, be, &limits, watch, seen, &model), QV_OK, "%s", qv_error());
    cr_expect_eq(seen[1], 1, "the end was reported %d times", (int)seen[1]);
    qv_model_close(model);
    qv_backend_close(be);
    fx_free(&file);
}

Test(weights, refuses_limits_out_of_range_before_reading_anything)
{
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    limits.max_lora_rank = 0;
    qv_model *model;
    cr_expect_eq(qv_model_open("/nonexistent", be, &limits, NULL, NULL, &model), QV_ERR_LIMIT);
    limits = fx_limits();
    cr_expect_eq(qv_model_open("/nonexistent", be, &limits, NULL, NULL, &model), QV_ERR_NOT_FOUND);
    qv_backend_close(be);
}
