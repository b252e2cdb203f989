/* The tables, resolved: shapes, places in fused weights, LoRA targets, shares of ranks. */
#include "models/proj.h"
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <string.h>

/* The dimensions of Qwen3.5-27B. */
static qv_model_config config_27b(void)
{
    static const char text[] =
        "{\"model_type\": \"qwen3_5_text\", \"vocab_size\": 248320, \"hidden_size\": 5120,"
        "\"intermediate_size\": 17408, \"num_hidden_layers\": 64, \"num_attention_heads\": 24,"
        "\"num_key_value_heads\": 4, \"head_dim\": 256, \"linear_num_key_heads\": 16,"
        "\"linear_num_value_heads\": 48, \"linear_key_head_dim\": 128,"
        "\"linear_value_head_dim\": 128, \"rope_theta\": 10000000}";
    qv_model_config config;
    cr_assert_eq(qv_model_config_parse(text, strlen(text), NULL, 0, "27B", &config), QV_OK, "%s",
                 qv_error());
    return config;
}

Test(proj, fuses_slices_in_order_and_reads_modules_whole)
{
    qv_model_config config = config_27b();
    qv_layout layout;
    cr_assert_eq(qv_layout_init(&layout, &config, 0, 1), QV_OK, "%s", qv_error());
    static const struct {
        qv_proj proj;
        int32_t slice;
        int64_t rows, dst_row, src_row, module_rows;
        int32_t plane;
    } rows[] = {
        {QV_PROJ_ATTN_IN, 0, 12288, 0, 0, 12288, 0},
        {QV_PROJ_ATTN_IN, 1, 1024, 12288, 0, 1024, 1},
        {QV_PROJ_ATTN_IN, 2, 1024, 13312, 0, 1024, 2},
        {QV_PROJ_GDN_IN, 0, 2048, 0, 0, 10240, 0},
        {QV_PROJ_GDN_IN, 1, 2048, 2048, 2048, 10240, 0},
        {QV_PROJ_GDN_IN, 2, 6144, 4096, 4096, 10240, 0},
        {QV_PROJ_GDN_IN, 3, 6144, 10240, 0, 6144, 3},
        {QV_PROJ_GDN_IN, 4, 48, 16384, 0, 48, 4},
        {QV_PROJ_GDN_IN, 5, 48, 16432, 0, 48, 5},
        {QV_PROJ_MLP_IN, 1, 17408, 17408, 0, 17408, 1},
        {QV_PROJ_LM_HEAD, 0, 248320, 0, 0, 248320, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const qv_proj_slice *slice = &layout.proj[rows[i].proj].slices[rows[i].slice];
        cr_expect_eq(slice->n_rows, rows[i].rows, "row %zu", i);
        cr_expect_eq(slice->dst_row, rows[i].dst_row, "row %zu", i);
        cr_expect_eq(slice->src_row, rows[i].src_row, "row %zu", i);
        cr_expect_eq(slice->module_rows, rows[i].module_rows, "row %zu", i);
        cr_expect_eq(slice->plane, rows[i].plane, "row %zu", i);
    }
    cr_expect_eq(layout.proj[QV_PROJ_ATTN_IN].n_out, 14336);
    cr_expect_eq(layout.proj[QV_PROJ_GDN_IN].n_out, 16384 + 96);
    cr_expect_eq(layout.proj[QV_PROJ_GDN_OUT].n_in, 6144);
    const qv_vec_shape *conv = &layout.vec[QV_VEC_CONV];
    cr_expect(conv->n_dims == 3 && conv->shape[0] == 10240 && conv->shape[1] == 1 &&
              conv->shape[2] == 4);
}

Test(proj, finds_lora_targets_by_module_and_by_alias)
{
    qv_model_config config = config_27b();
    qv_layout layout;
    cr_assert_eq(qv_layout_init(&layout, &config, 0, 1), QV_OK);
    static const struct {
        const char *module;
        qv_proj proj;
        int32_t first, n;
        int64_t n_rows;
    } rows[] = {
        {"self_attn.q_proj", QV_PROJ_ATTN_IN, 0, 1, 12288},
        {"self_attn.qkv_proj", QV_PROJ_ATTN_IN, 0, 3, 14336},
        {"self_attn.o_proj", QV_PROJ_ATTN_OUT, 0, 1, 5120},
        {"linear_attn.in_proj_qkv", QV_PROJ_GDN_IN, 0, 3, 10240},
        {"linear_attn.in_proj_qkvz", QV_PROJ_GDN_IN, 0, 4, 16384},
        {"linear_attn.in_proj_v", QV_PROJ_GDN_IN, 2, 1, 6144},
        {"linear_attn.in_proj_z", QV_PROJ_GDN_IN, 3, 1, 6144},
        {"linear_attn.in_proj_ba", QV_PROJ_GDN_IN, 4, 2, 96},
        {"linear_attn.in_proj_a", QV_PROJ_GDN_IN, 5, 1, 48},
        {"mlp.gate_up_proj", QV_PROJ_MLP_IN, 0, 2, 34816},
        {"mlp.down_proj", QV_PROJ_MLP_OUT, 0, 1, 5120},
        {"lm_head", QV_PROJ_LM_HEAD, 0, 1, 248320},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_lora_target target;
        cr_assert(qv_layout_find_target(&layout, rows[i].module, strlen(rows[i].module), &target),
                  "%s", rows[i].module);
        cr_expect_eq(target.proj, rows[i].proj, "%s", rows[i].module);
        cr_expect_eq(target.first, rows[i].first, "%s", rows[i].module);
        cr_expect_eq(target.n, rows[i].n, "%s", rows[i].module);
        cr_expect_eq(target.n_rows, rows[i].n_rows, "%s", rows[i].module);
        cr_expect(target.lora, "%s", rows[i].module);
    }
    static const char *const unknown[] = {"self_attn.q_pro", "self_attn.q_proj.x", "q_proj",
                                          "linear_attn.conv1d", ""};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        qv_lora_target target;
        cr_expect_not(qv_layout_find_target(&layout, unknown[i], strlen(unknown[i]), &target), "%s",
                      unknown[i]);
    }
}

/* What the ranks have of each slice must be the whole, each unit once. */
static void check_shares(const qv_model_config *config, int32_t n_ranks)
{
    qv_layout whole, share;
    cr_assert_eq(qv_layout_init(&whole, config, 0, 1), QV_OK);
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        for (int32_t i = 0; i < whole.proj[p].n_slices; i++) {
            const qv_proj_slice *all = &whole.proj[p].slices[i];
            int64_t rows = 0, cols = 0, next_row = all->src_row, next_col = 0;
            for (int32_t rank = 0; rank < n_ranks; rank++) {
                cr_assert_eq(qv_layout_init(&share, config, rank, n_ranks), QV_OK, "%s",
                             qv_error());
                const qv_proj_slice *part = &share.proj[p].slices[i];
                cr_assert_eq(part->module_rows, all->module_rows);
                rows += part->n_rows, cols += part->n_cols;
                if (all->row->split == QV_SPLIT_COLUMN)
                    cr_expect_eq(part->src_row, next_row, "%s rank %d", all->row->module, rank);
                if (all->row->split == QV_SPLIT_ROW)
                    cr_expect_eq(part->src_col, next_col, "%s rank %d", all->row->module, rank);
                next_row += part->n_rows, next_col += part->n_cols;
            }
            int64_t by_out = all->row->split == QV_SPLIT_COLUMN ? 1 : n_ranks;
            int64_t by_in = all->row->split == QV_SPLIT_ROW ? 1 : n_ranks;
            cr_expect_eq(rows, all->n_rows * by_out, "%s", all->row->module);
            cr_expect_eq(cols, all->n_cols * by_in, "%s", all->row->module);
        }
    }
}

Test(proj, shares_out_every_unit_once)
{
    qv_model_config config = config_27b();
    check_shares(&config, 2);
    check_shares(&config, 4);
}

Test(proj, repeats_kv_heads_when_there_are_more_ranks)
{
    qv_model_config config = config_27b();
    qv_layout layout;
    static const int64_t first_rows[] = {0, 0, 256, 256, 512, 512, 768, 768};
    for (int32_t rank = 0; rank < 8; rank++) {
        cr_assert_eq(qv_layout_init(&layout, &config, rank, 8), QV_OK, "%s", qv_error());
        const qv_proj_slice *k = &layout.proj[QV_PROJ_ATTN_IN].slices[1];
        cr_expect_eq(k->n_rows, 256);
        cr_expect_eq(k->src_row, first_rows[rank]);
        cr_expect_eq(layout.proj[QV_PROJ_ATTN_IN].n_out, 3 * 512 + 2 * 256);
    }
    cr_expect_eq(qv_layout_init(&layout, &config, 0, 5), QV_ERR_UNSUPPORTED);
    cr_expect_not_null(strstr(qv_error(), "self_attn.q_proj: 24 units"), "%s", qv_error());
}

Test(proj, writes_names_as_checkpoints_do)
{
    char name[128];
    cr_expect_str_eq(qv_tensor_name(name, sizeof name, "model.", 7, "mlp.up_proj", ".weight"),
                     "model.layers.7.mlp.up_proj.weight");
    cr_expect_str_eq(qv_tensor_name(name, sizeof name, "", -1, "lm_head", ".weight"),
                     "lm_head.weight");
}
