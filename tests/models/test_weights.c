/* Loading checkpoints: spellings that are the same model, and what stops a load. */
#include "models/weights.h"
#include "tests/models/fixtures_moe.h"

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

/* --- Experts and Nemotron-3 ------------------------------------------------------------------- */

/* Logits of a family's model, after `change`, if any, to its checkpoint. The caller frees. */
static float *family_logits(fx_family family, const char *config, const char *prefix,
                            fx_experts experts, qv_dtype dtype, void (*change)(fx_file *))
{
    fx_file file = {.n = 0};
    char *own = config ? NULL : fx_family_config(family, VOCAB);
    fx_family_model(&file, family, prefix, experts, dtype, VOCAB, 11);
    if (change != NULL)
        change(&file);
    float *logits = logits_of(fx_write_model(config ? config : own, &file));
    fx_free(&file);
    free(own);
    return logits;
}

Test(weights, experts_in_every_form_are_the_same_model)
{
    static const fx_family families[] = {FX_MOE, FX_NANO, FX_SUPER};
    for (size_t i = 0; i < 3; i++) {
        float *fused = family_logits(families[i], NULL, NULL, FX_FUSED, QV_BF16, NULL);
        for (int form = FX_ONE_BY_ONE; form <= FX_BY_LAYER; form++) {
            float *other = family_logits(families[i], NULL, NULL, form, QV_BF16, NULL);
            cr_expect_arr_eq(fused, other, N * VOCAB * sizeof *fused, "%s, form %d",
                             fx_family_name(families[i]), form);
            free(other);
        }
        free(fused);
    }
}

static void add_prediction_and_vision(fx_file *f)
{
    fx_add(f, "model.visual.blocks.0.attn.qkv.weight", QV_BF16, 1, (int64_t[]){1}, (float[]){0});
    fx_add(f, "mtp.layers.0.mlp.experts.gate_up_proj", QV_BF16, 1, (int64_t[]){1}, (float[]){0});
    fx_add(f, "mtp.fc.weight", QV_F32, 1, (int64_t[]){1}, (float[]){0});
}
static void add_nemotron_prediction(fx_file *f)
{
    fx_add(f, "mtp.layers.0.eh_proj.weight", QV_BF16, 1, (int64_t[]){1}, (float[]){0});
    fx_add(f, "mtp.layers.1.mixer.experts.0.up_proj.weight", QV_F8_E4M3, 1, (int64_t[]){1},
           (float[]){0});
}
static void singular_embedding(fx_file *f)
{
    fx_rename(f, "backbone.embeddings.weight", "backbone.embedding.weight");
}
static void singular_model_embedding(fx_file *f)
{
    fx_rename(f, "model.embeddings.weight", "model.embedding.weight");
}

Test(weights, every_spelling_is_the_same_model)
{
    char *moe = fx_family_config(FX_MOE, VOCAB), *nested = NULL;
    cr_assert_gt(asprintf(&nested,
                          "{\"model_type\": \"qwen3_5_moe\", \"vision_config\": {\"depth\": 1},"
                          " \"text_config\": %s}",
                          moe),
                 0);
    const struct {
        const char *what;
        fx_family family;
        const char *config, *prefix;
        void (*change)(fx_file *);
    } rows[] = {
        {"nested", FX_MOE, nested, "model.language_model.", NULL},
        {"nested, text names", FX_MOE, nested, "model.", NULL},
        {"with vision and prediction", FX_MOE, nested, "model.language_model.",
         add_prediction_and_vision},
        {"model.", FX_NANO, NULL, "model.", NULL},
        {"embedding.weight", FX_NANO, NULL, "backbone.", singular_embedding},
        {"model.embedding.weight", FX_SUPER, NULL, "model.", singular_model_embedding},
        {"with prediction", FX_SUPER, NULL, "backbone.", add_nemotron_prediction},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        float *plain = family_logits(rows[i].family, NULL, NULL, FX_FUSED, QV_BF16, NULL);
        float *other = family_logits(rows[i].family, rows[i].config, rows[i].prefix, FX_FUSED,
                                     QV_BF16, rows[i].change);
        cr_expect_arr_eq(plain, other, N * VOCAB * sizeof *plain, "%s", rows[i].what);
        free(plain);
        free(other);
    }
    free(moe);
    free(nested);
}

static void widen_scan(fx_file *f)
{
    fx_retype(f, "A_log", QV_F32);
    fx_retype(f, "dt_bias", QV_F32);
    fx_retype(f, "mixer.D", QV_F32);
    fx_retype(f, "mixer.gate.weight", QV_F32);
    fx_retype(f, "mixer.norm.weight", QV_F32);
}
static void widen_gdn(fx_file *f)
{
    fx_retype(f, "A_log", QV_F32);
    fx_retype(f, "linear_attn.norm.weight", QV_F32);
    fx_retype(f, "mlp.gate.weight", QV_F32);
}
static void widen_some_experts(fx_file *f)
{
    fx_retype(f, "experts.3.up_proj.weight", QV_F32);
    fx_retype(f, "experts.1.down_proj.weight", QV_F32);
}
static void widen_everything(fx_file *f)
{
    fx_retype(f, "", QV_F32);
}
static void narrow_bias(fx_file *f) /* as some fine-tunes have it */
{
    fx_retype(f, "e_score_correction_bias", QV_BF16);
}
static void narrow_and_widen_bias(fx_file *f)
{
    narrow_bias(f);
    fx_retype(f, "e_score_correction_bias", QV_F32);
}

/* Numbers that BF16 holds are the same model in a wider dtype, whichever tensors have it. */
Test(weights, mixed_dtypes_are_the_same_model)
{
    static const struct {
        const char *what;
        fx_family family;
        void (*change)(fx_file *), (*as)(fx_file *);
    } rows[] = {
        {"float32 scan and router", FX_NANO, widen_scan, NULL},
        {"float32 A_log and norm", FX_MOE, widen_gdn, NULL},
        {"float32 experts among others", FX_NANO, widen_some_experts, NULL},
        {"float32 experts among others", FX_MOE, widen_some_experts, NULL},
        {"all float32", FX_SUPER, widen_everything, NULL},
        {"all float32", FX_MOE, widen_everything, NULL},
        {"bf16 correction bias", FX_SUPER, narrow_bias, narrow_and_widen_bias},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        float *plain =
            family_logits(rows[i].family, NULL, NULL, FX_ONE_BY_ONE, QV_BF16, rows[i].as);
        float *other =
            family_logits(rows[i].family, NULL, NULL, FX_ONE_BY_ONE, QV_BF16, rows[i].change);
        cr_expect_arr_eq(plain, other, N * VOCAB * sizeof *plain, "%s: %s",
                         fx_family_name(rows[i].family), rows[i].what);
        free(plain);
        free(other);
    }
}

Test(weights, loads_shards_of_experts_as_the_same_model)
{
    static const fx_family families[] = {FX_MOE, FX_NANO, FX_SUPER};
    for (size_t k = 0; k < 3; k++) {
        float *whole = family_logits(families[k], NULL, NULL, FX_BY_LAYER, QV_BF16, NULL);
        fx_file all = {.n = 0}, part[3] = {{.n = 0}};
        fx_family_model(&all, families[k], NULL, FX_BY_LAYER, QV_BF16, VOCAB, 11);
        char *index = strdup("{\"metadata\": {\"total_size\": 1}, \"weight_map\": {");
        for (int i = 0; i < all.n; i++) { /* the experts of one layer lie in different files */
            char *longer;
            part[i % 3].tensors[part[i % 3].n++] = all.tensors[i];
            cr_assert_gt(asprintf(&longer, "%s%s\"%s\": \"model-0000%d-of-00003.safetensors\"",
                                  index, i ? ", " : "", all.tensors[i].name, i % 3 + 1),
                         0);
            free(index);
            index = longer;
        }
        char *text, *config = fx_family_config(families[k], VOCAB);
        cr_assert_gt(asprintf(&text, "%s}}", index), 0);
        const char *dir = qv_temp_dir();
        qv_write_text(qv_path(dir, "config.json"), config);
        qv_write_text(qv_path(dir, "model.safetensors.index.json"), text);
        for (int i = 0; i < 3; i++)
            fx_write(&part[i], qv_path(dir, "model-0000%d-of-00003.safetensors", i + 1));
        float *sharded = logits_of(dir);
        cr_expect_arr_eq(whole, sharded, N * VOCAB * sizeof *whole, "%s",
                         fx_family_name(families[k]));
        free(whole), free(sharded), free(text), free(index), free(config);
        fx_free(&all);
    }
}

#define MOE_LAYER  "model.layers.2.mlp."
#define NANO_LAYER "backbone.layers.1.mixer."

static void drop_expert(fx_file *f)
{
    fx_remove(f, MOE_LAYER "experts.3.up_proj.weight");
}
static void drop_nano_expert(fx_file *f)
{
    fx_remove(f, NANO_LAYER "experts.4.down_proj.weight");
}
static void one_expert_more(fx_file *f)
{
    fx_add(f, NANO_LAYER "experts.6.up_proj.weight", QV_BF16, 1, (int64_t[]){1}, (float[]){0});
}
static void both_forms(fx_file *f)
{
    fx_add(f, MOE_LAYER "experts.0.up_proj.weight", QV_BF16, 1, (int64_t[]){1}, (float[]){0});
}
static void transpose_expert(fx_file *f)
{
    fx_tensor *t = fx_find(f, NANO_LAYER "experts.3.up_proj.weight");
    t->shape[0] = 24, t->shape[1] = 10;
}
static void too_few_experts(fx_file *f)
{
    fx_find(f, MOE_LAYER "experts.gate_up_proj")->shape[0] = 5;
}
static void transpose_fused(fx_file *f)
{
    fx_tensor *t = fx_find(f, MOE_LAYER "experts.down_proj");
    t->shape[1] = 10, t->shape[2] = 24;
}
static void integer_expert(fx_file *f)
{
    fx_find(f, NANO_LAYER "experts.2.down_proj.weight")->dtype = QV_I16;
}
static void quantised_expert(fx_file *f)
{
    fx_find(f, MOE_LAYER "experts.2.down_proj.weight")->dtype = QV_F8_E4M3;
}
static void scaled_expert(fx_file *f)
{
    fx_add(f, MOE_LAYER "experts.2.down_proj.weight_scale_inv", QV_BF16, 1, (int64_t[]){1},
           (float[]){0});
}
static void nan_in_fused(fx_file *f) /* element 7 of expert 4 */
{
    ((uint16_t *)fx_find(f, MOE_LAYER "experts.gate_up_proj")->data)[4 * 20 * 24 + 7] = 0x7FC0;
}
static void drop_bias(fx_file *f)
{
    fx_remove(f, NANO_LAYER "gate.e_score_correction_bias");
}
static void drop_conv_bias(fx_file *f)
{
    fx_remove(f, "backbone.layers.0.mixer.conv1d.bias");
}
static void drop_shared_gate(fx_file *f)
{
    fx_remove(f, MOE_LAYER "shared_expert_gate.weight");
}
static void drop_latent(fx_file *f)
{
    fx_remove(f, NANO_LAYER "fc1_latent_proj.weight");
}
static void short_in_proj(fx_file *f)
{
    fx_find(f, "backbone.layers.0.mixer.in_proj.weight")->shape[0] = 157;
}
static void wrong_prefix(fx_file *f)
{
    fx_rename(f, "backbone.embeddings.weight", "transformer.embeddings.weight");
}
static void dense_layer(fx_file *f)
{
    fx_add(f, MOE_LAYER "gate_proj.weight", QV_BF16, 1, (int64_t[]){1}, (float[]){0});
}

Test(weights, stops_at_experts_that_do_not_fit_and_names_them)
{
    static const struct {
        const char *what;
        fx_family family;
        fx_experts experts;
        void (*spoil)(fx_file *);
        qv_status status;
        const char *says;
    } rows[] = {
        {"an expert in the middle", FX_MOE, FX_ONE_BY_ONE, drop_expert, QV_ERR_FORMAT,
         "lacks " MOE_LAYER "experts.3.up_proj.weight (1 missing"},
        {"an expert in the middle", FX_NANO, FX_ONE_BY_ONE, drop_nano_expert, QV_ERR_FORMAT,
         "lacks " NANO_LAYER "experts.4.down_proj.weight"},
        {"an expert too many", FX_NANO, FX_ONE_BY_ONE, one_expert_more, QV_ERR_FORMAT,
         NANO_LAYER "experts.6.up_proj.weight has no place"},
        {"both forms at once", FX_MOE, FX_FUSED, both_forms, QV_ERR_FORMAT,
         MOE_LAYER "experts.0.up_proj.weight has no place"},
        {"a transposed expert", FX_NANO, FX_ONE_BY_ONE, transpose_expert, QV_ERR_SHAPE,
         "experts.3.up_proj.weight is BF16[24, 10]; config.json makes it BF16[10, 24]"},
        {"too few experts in one tensor", FX_MOE, FX_FUSED, too_few_experts, QV_ERR_SHAPE,
         "experts.gate_up_proj is BF16[5, 20, 24]; config.json makes it BF16[6, 20, 24]"},
        {"a transposed tensor of experts", FX_MOE, FX_FUSED, transpose_fused, QV_ERR_SHAPE,
         "experts.down_proj is BF16[6, 10, 24]; config.json makes it BF16[6, 24, 10]"},
        {"an expert of integers", FX_NANO, FX_ONE_BY_ONE, integer_expert, QV_ERR_UNSUPPORTED,
         "experts.2.down_proj.weight is I16[24, 10]"},
        {"a quantised expert", FX_MOE, FX_ONE_BY_ONE, quantised_expert, QV_ERR_UNSUPPORTED,
         "experts.2.down_proj.weight is F8_E4M3"},
        {"scales of a quantised expert", FX_MOE, FX_ONE_BY_ONE, scaled_expert, QV_ERR_FORMAT,
         "experts.2.down_proj.weight_scale_inv has no place"},
        {"NaN in one tensor of experts", FX_MOE, FX_FUSED, nan_in_fused, QV_ERR_FORMAT,
         "experts.gate_up_proj: element 1927 is NaN"},
        {"no correction bias", FX_NANO, FX_ONE_BY_ONE, drop_bias, QV_ERR_FORMAT,
         "lacks " NANO_LAYER "gate.e_score_correction_bias"},
        {"no convolution bias", FX_NANO, FX_ONE_BY_ONE, drop_conv_bias, QV_ERR_FORMAT,
         "conv1d.bias"},
        {"no gate of the shared expert", FX_MOE, FX_FUSED, drop_shared_gate, QV_ERR_FORMAT,
         "lacks " MOE_LAYER "shared_expert_gate.weight"},
        {"no latent projection", FX_SUPER, FX_ONE_BY_ONE, drop_latent, QV_ERR_FORMAT,
         "lacks " NANO_LAYER "fc1_latent_proj.weight"},
        {"a short in_proj", FX_NANO, FX_ONE_BY_ONE, short_in_proj, QV_ERR_SHAPE,
         "in_proj.weight is BF16[157, 24]; config.json makes it BF16[158, 24]"},
        {"another prefix", FX_NANO, FX_ONE_BY_ONE, wrong_prefix, QV_ERR_FORMAT,
         "has no backbone.embeddings.weight or model.embeddings.weight"},
        {"a dense MLP where experts are", FX_MOE, FX_FUSED, dense_layer, QV_ERR_FORMAT,
         MOE_LAYER "gate_proj.weight has no place"},
    };
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        fx_file file = {.n = 0};
        fx_family_model(&file, rows[i].family, NULL, rows[i].experts, QV_BF16, VOCAB, 11);
        rows[i].spoil(&file);
        char *config = fx_family_config(rows[i].family, VOCAB);
        const char *dir = fx_write_model(config, &file);
        qv_model *model;
        cr_expect_eq(qv_model_open(dir, be, &limits, NULL, NULL, &model), rows[i].status, "%s",
                     rows[i].what);
        cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s: %s", rows[i].what, qv_error());
        free(config);
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
