/* inspect_model: what Quiver makes of a model directory - its layers, the table of projections,
 * LoRA targets, memory - and whether adapters would load. config.json alone is enough; weights,
 * when they are there, are checked by name, dtype and shape without being loaded. */
#include "common/options.h"
#include "models/arch.h"
#include "models/lora.h"
#include "models/lora_pool.h"
#include "models/state.h"
#include "models/tensor_list.h"
#include "models/weights.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- Options ---------------------------------------------------------------------------------- */

typedef struct {
    qv_string_list adapters;
    const char *backend;
    int64_t running, context, step_tokens, page_tokens, adapter_slots, rank;
    bool tensors;
} settings;

static const qv_option table[] = {
    QV_OPTION(settings, adapters, LIST, "adapter", "DIR", NULL,
              "Say what this adapter covers and whether it would load. May be repeated."),
    QV_OPTION(settings, tensors, FLAG, "tensors", NULL, "no",
              "List every tensor that a checkpoint of this model holds, experts as released."),
    QV_OPTION(settings, rank, INT, "rank", "R", "64", "Rank of the adapter slots.", .min = 1,
              .max = 4096),
    QV_OPTION(settings, adapter_slots, INT, "adapter-slots", "N", "8", "Adapter slots.",
              .section = "Memory plan", .max = 65536),
    QV_OPTION(settings, running, INT, "running", "N", "16", "Sequences that run at once.",
              .section = "Memory plan", .min = 1, .max = 65536),
    QV_OPTION(settings, context, INT, "context", "TOKENS", "4096",
              "Tokens of each sequence, at most what the model was made for.",
              .section = "Memory plan", .min = 1, .max = 1 << 24),
    QV_OPTION(settings, step_tokens, INT, "step-tokens", "N", "512", "Tokens of one step.",
              .section = "Memory plan", .min = 1, .max = 1 << 20),
    QV_OPTION(settings, page_tokens, INT, "page-tokens", "N", "16", "Tokens of one KV page.",
              .section = "Memory plan", .min = 1, .max = 4096),
    QV_OPTION(settings, backend, STRING, "backend", "NAME", "cpu", "Whose memory is planned.",
              .section = "Memory plan"),
};

static const qv_program program = {
    .name = "inspect_model",
    .summary =
        "Prints what Quiver makes of a Hugging Face model directory: layers, projections, LoRA "
        "targets, memory. config.json alone is enough. Exits with 1 when the model, its "
        "weights or an adapter would not load.",
    .args = "DIR",
    .epilog = "  inspect_model demo/tiny-qwen3.5 --adapter demo/tiny-qwen3.5/adapters/json\n"
              "  inspect_model bench/configs/qwen3.5-35b-a3b --tensors\n",
    .max_args = 1,
};

/* --- Text ------------------------------------------------------------------------------------- */

/* "1.5 GiB" into buf. Returns buf. */
static const char *size_text(uint64_t bytes, char *buf, size_t size)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    int unit = 0;
    for (; value >= 1024 && unit < 4; unit++)
        value /= 1024;
    snprintf(buf, size, unit ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return buf;
}

/* Numbers as ranges: "0-2, 4" of the layers for which has[layer]. */
static void print_layers(const uint8_t *has, int64_t n_layers)
{
    const char *comma = "";
    for (int64_t i = 0; i < n_layers; i++) {
        if (!has[i])
            continue;
        int64_t last = i;
        while (last + 1 < n_layers && has[last + 1])
            last++;
        printf(last > i ? "%s%" PRId64 "-%" PRId64 : "%s%" PRId64, comma, i, last);
        comma = ", ";
        i = last;
    }
}

/* --- The model -------------------------------------------------------------------------------- */

static const struct {
    qv_part part;
    const char *name;
} parts[] = {
    {QV_PART_ATTENTION, "attention"}, {QV_PART_GDN, "Gated DeltaNet"},
    {QV_PART_SSM, "Mamba-2"},         {QV_PART_MLP, "MLP"},
    {QV_PART_MOE, "experts"},
};

static bool has_part(const qv_model_config *c, qv_part part)
{
    return qv_model_config_count(c, part) > 0;
}

static void print_mixers(const qv_model_config *c)
{
    if (has_part(c, QV_PART_ATTENTION)) {
        printf("  attention: %" PRId64 " heads of %" PRId64 ", %" PRId64 " KV heads, ", c->n_heads,
               c->head_dim, c->n_kv_heads);
        if (c->rotary_dim > 0)
            printf("%" PRId64 " dimensions rotate (theta %g)\n", c->rotary_dim, c->rope_theta);
        else
            printf("no positions\n");
    }
    if (has_part(c, QV_PART_GDN))
        printf("  Gated DeltaNet: %" PRId64 " key heads of %" PRId64 ", %" PRId64
               " value heads of %" PRId64 ", convolution of %" PRId64 "\n",
               c->gdn_k_heads, c->gdn_k_dim, c->gdn_v_heads, c->gdn_v_dim, c->conv_kernel);
    if (has_part(c, QV_PART_SSM))
        printf("  Mamba-2: %" PRId64 " heads of %" PRId64 " in %" PRId64
               " groups, state of %" PRId64 ", convolution of %" PRId64 "%s\n",
               c->ssm_heads, c->ssm_head_dim, c->ssm_groups, c->ssm_state, c->conv_kernel,
               has_part(c, QV_PART_CONV_BIAS) ? " with bias" : "");
}

static void print_ffn(const qv_model_config *c)
{
    if (has_part(c, QV_PART_MLP))
        printf("  MLP: %" PRId64 " wide\n", c->ffn);
    if (!has_part(c, QV_PART_MOE))
        return;
    printf("  experts: %" PRId64 " of %" PRId64 " for each token, %" PRId64 " wide", c->moe_top_k,
           c->n_experts, c->moe_ffn);
    if (c->moe_latent > 0)
        printf(", behind a projection to %" PRId64, c->moe_latent);
    if (c->router_groups > 1)
        printf(", from %" PRId64 " of %" PRId64 " groups", c->router_topk_groups, c->router_groups);
    if (c->router_scale != 1)
        printf(", times %g", c->router_scale);
    if (c->shared_ffn > 0)
        printf("; shared: %" PRId64 " wide", c->shared_ffn);
    printf("\n");
}

static void print_kinds(const qv_model_config *c)
{
    printf("\n%" PRId64 " layers\n", c->n_layers);
    for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) {
        uint8_t has[QV_MAX_LAYERS];
        for (int64_t i = 0; i < c->n_layers; i++)
            has[i] = (c->layer_parts[i] & parts[p].part) != 0;
        if (!has_part(c, parts[p].part))
            continue;
        printf("  %-16s ", parts[p].name);
        print_layers(has, c->n_layers);
        printf("\n");
    }
}

static void print_config(const char *dir, const qv_layout *layout)
{
    const qv_model_config *c = layout->config;
    printf("%s: %s (%s), %s\n", dir, c->arch->name, c->model_type, qv_dtype_name(c->dtype));
    printf("  %" PRId64 " parameters in %" PRId64 " tensors\n", qv_layout_params(layout),
           qv_layout_tensors(layout, layout->config->arch->fused_experts));
    printf("  vocabulary %" PRId64 ", hidden %" PRId64 ", up to %" PRId64 " positions, %s head\n",
           c->vocab, c->hidden, c->max_positions, c->tied_head ? "tied" : "separate");
    print_mixers(c);
    print_ffn(c);
    printf("  an answer ends at");
    for (int32_t i = 0; i < c->n_eos; i++)
        printf("%s %d", i ? " or" : " token", c->eos[i]);
    printf(c->n_eos ? "\n" : " no token\n");
    print_kinds(c);
}

static void print_slice(const qv_proj_slice *slice)
{
    static const char *const splits[] = {"none", "column", "row"};
    const qv_proj_row *row = slice->row;
    char module[128];
    snprintf(module, sizeof module, "%s%s%s", row->experts ? row->experts : "",
             row->experts ? ".*." : "", row->module);
    printf("    %-30s %8" PRId64 " %8" PRId64 "  %-24s %-7s %-26s %s\n", module, slice->dst_row,
           slice->n_rows, qv_dim_text(row->out), splits[row->split],
           row->split == QV_SPLIT_NONE ? "-" : qv_dim_text(row->unit), row->lora ? "yes" : "no");
}

static void print_tables(const qv_layout *layout)
{
    printf("\nProjections (rows of the fused weight; how ranks share it)\n");
    printf("    %-30s %8s %8s  %-24s %-7s %-26s %s\n", "module", "row", "rows", "", "split", "unit",
           "LoRA");
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        const qv_proj_shape *shape = &layout->proj[p];
        if (shape->n_slices == 0)
            continue;
        printf("  %s [%" PRId64 ", %" PRId64 "] x %" PRId64, qv_proj_name((qv_proj)p), shape->n_out,
               shape->n_in, qv_layout_part_count(layout, shape->part));
        if (shape->experts)
            printf(" x %" PRId64 " experts", layout->config->n_experts);
        printf("\n");
        for (int32_t i = 0; i < shape->n_slices; i++)
            print_slice(&shape->slices[i]);
    }
    printf("\nOther tensors\n");
    for (int v = 0; v < QV_VEC_COUNT; v++) {
        const qv_vec_shape *shape = &layout->vec[v];
        if (shape->n_slices == 0)
            continue;
        printf("  %-11s %-36s [", qv_vec_name((qv_vec)v), shape->tensor);
        for (int32_t i = 0; i < shape->n_dims; i++)
            printf("%s%" PRId64, i ? ", " : "", shape->shape[i]);
        printf("] x %" PRId64 "\n", qv_layout_part_count(layout, shape->part));
    }
}

static void print_tensor(const char *name, int32_t n_dims, const int64_t *shape, void *user)
{
    (void)user;
    printf("  %s [", name);
    for (int32_t i = 0; i < n_dims; i++)
        printf("%s%" PRId64, i ? ", " : "", shape[i]);
    printf("]\n");
}

static void print_tensors(const qv_layout *layout)
{
    const qv_arch *arch = layout->config->arch;
    printf("\nTensors of the checkpoint\n");
    for (int64_t layer = -1; layer < layout->config->n_layers; layer++)
        qv_layout_list(layout, arch->prefixes[0], layer, arch->fused_experts, print_tensor, NULL);
}

static qv_status print_memory(const settings *s, const qv_layout *layout, const qv_backend *be)
{
    const qv_model_config *config = layout->config;
    int64_t context = s->context < config->max_positions ? s->context : config->max_positions;
    int64_t pages = s->running * ((context + s->page_tokens - 1) / s->page_tokens);
    qv_model_limits limits = {.max_tokens = (int32_t)s->step_tokens,
                              .max_seqs = (int32_t)s->running,
                              .max_logits = (int32_t)s->running,
                              .page_tokens = (int32_t)s->page_tokens,
                              .n_pages = pages < INT32_MAX ? (int32_t)pages : INT32_MAX,
                              .n_state_slots = (int32_t)s->running,
                              .n_adapter_slots = (int32_t)s->adapter_slots,
                              .max_lora_rank = (int32_t)s->rank};
    qv_memory_plan plan;
    QV_TRY(qv_model_plan(config, be, &limits, &plan));
    char text[32];
    printf("\nMemory (%s)\n", qv_backend_describe(be));
    printf("  weights       %10s\n", size_text(plan.weights, text, sizeof text));
    printf("  KV pages      %10s", size_text(plan.kv, text, sizeof text));
    printf("  %" PRId64 " sequences of %" PRId64 " tokens, %" PRIu64 " bytes a token\n", s->running,
           context, plan.kv_page / (uint64_t)s->page_tokens);
    printf("  states        %10s", size_text(plan.state, text, sizeof text));
    printf("  %" PRId64 " slots of %s\n", s->running,
           size_text(plan.state_slot, text, sizeof text));
    printf("  adapters      %10s", size_text(plan.adapters, text, sizeof text));
    printf("  %" PRId64 " slots of %s, rank %" PRId64 "\n", s->adapter_slots,
           size_text(plan.adapter_slot, text, sizeof text), s->rank);
    printf("                            each up to %s more for experts and the embedding\n",
           size_text(plan.adapter_parts, text, sizeof text));
    printf("  intermediates %10s", size_text(plan.activations, text, sizeof text));
    printf("  %" PRId64 " tokens a step\n", s->step_tokens);
    printf("  total         %10s\n", size_text(plan.total, text, sizeof text));
    return QV_OK;
}

/* Check the weights if there are any. */
static qv_status print_weights(const char *dir, const qv_layout *layout, bool *present)
{
    qv_safetensors *st;
    qv_status status = qv_safetensors_open_dir(dir, &st);
    *present = status == QV_OK;
    if (status == QV_ERR_NOT_FOUND) {
        printf("\nWeights: none here\n");
        return QV_OK;
    }
    QV_TRY(status);
    char text[32];
    status = qv_weights_check(layout, st);
    if (status == QV_OK)
        printf("\nWeights: %zu tensors, %s: all are as config.json says\n",
               qv_safetensors_count(st), size_text(qv_safetensors_bytes(st), text, sizeof text));
    qv_safetensors_close(st);
    return status;
}

/* --- Adapters --------------------------------------------------------------------------------- */

/* A line of the report: what all items of one target have in common. */
typedef struct {
    const qv_lora_item *item; /* the first; NULL: no line */
    uint8_t layers[QV_MAX_LAYERS];
    int32_t low, high; /* ranks */
    float least, most; /* scales */
    int64_t n_experts; /* most experts with a matrix of their own in a layer */
    int64_t n_in_layer;
    bool a_shared, b_shared;
} target_line;

static void add_to_line(target_line *line, const qv_lora_item *item)
{
    if (line->item == NULL)
        *line = (target_line){.item = item,
                              .low = item->rank,
                              .high = item->rank,
                              .least = item->scale,
                              .most = item->scale};
    line->low = item->rank < line->low ? item->rank : line->low;
    line->high = item->rank > line->high ? item->rank : line->high;
    line->least = item->scale < line->least ? item->scale : line->least;
    line->most = item->scale > line->most ? item->scale : line->most;
    line->a_shared |= item->expert < 0 && item->n_a == 1;
    line->b_shared |= item->expert < 0 && item->n_b == 1;
    if (item->layer >= 0) {
        line->n_in_layer = line->layers[item->layer] ? line->n_in_layer + 1 : 1;
        line->layers[item->layer] = 1;
        if (item->expert >= 0 && line->n_in_layer > line->n_experts)
            line->n_experts = line->n_in_layer;
    }
}

static void print_experts(const target_line *line, int64_t n_experts)
{
    if (line->n_experts > 0)
        printf(", %" PRId64 " of %" PRId64 " experts", line->n_experts, n_experts);
    if (line->a_shared || line->b_shared)
        printf(", all experts share %s", !line->b_shared ? "A" : !line->a_shared ? "B" : "A and B");
}

static void print_line(const qv_layout *layout, const target_line *line)
{
    const qv_lora_item *item = line->item;
    char name[128] = "embed_tokens";
    int64_t row = 0;
    bool experts = false;
    if (!item->embedding) {
        const qv_proj_shape *shape = &layout->proj[item->target.proj];
        const qv_proj_slice *slice = &shape->slices[item->target.first];
        experts = shape->experts;
        row = slice->dst_row;
        snprintf(name, sizeof name, "%s%s%s", experts ? slice->row->experts : "",
                 experts ? "." : "", slice->row->module);
    }
    printf("  %-26s rows %" PRId64 "-%" PRId64 ", rank %d", name, row,
           row + item->target.n_rows - 1, line->low);
    if (line->high > line->low)
        printf("-%d", line->high);
    printf(", scale %g", (double)line->least);
    if (line->most > line->least)
        printf("-%g", (double)line->most);
    if (experts)
        print_experts(line, layout->config->n_experts);
    if (item->layer >= 0)
        printf(", layers ");
    print_layers(line->layers, layout->config->n_layers);
    printf("\n");
}

/* Lines by the place of their target: projection (the embedding last), first slice, slices. */
static void print_targets(const qv_layout *layout, const qv_adapter *adapter)
{
    static target_line lines[QV_PROJ_COUNT + 1][QV_MAX_SLICES][QV_MAX_SLICES + 1];
    memset(lines, 0, sizeof lines);
    for (size_t i = 0; i < qv_adapter_n_items(adapter); i++) {
        const qv_lora_item *item = qv_adapter_item(adapter, i);
        int proj = item->embedding ? QV_PROJ_COUNT : (int)item->target.proj;
        add_to_line(&lines[proj][item->target.first][item->target.n], item);
    }
    for (int p = 0; p <= QV_PROJ_COUNT; p++)
        for (int i = 0; i < QV_MAX_SLICES; i++)
            for (int n = 0; n <= QV_MAX_SLICES; n++)
                if (lines[p][i][n].item != NULL)
                    print_line(layout, &lines[p][i][n]);
}

/* False when the adapter would not load. */
static bool print_adapter(const qv_adapter_spec *spec, const char *dir)
{
    qv_adapter *adapter;
    if (qv_adapter_read(spec, dir, &adapter) != QV_OK) {
        printf("\nAdapter %s: would not load\n  %s\n", dir, qv_error());
        return false;
    }
    char text[32];
    printf("\nAdapter %s: loads\n  %zu pairs, rank up to %d, %s, digest %s\n", dir,
           qv_adapter_n_items(adapter), qv_adapter_max_rank(adapter),
           size_text(qv_adapter_bytes(adapter), text, sizeof text), qv_adapter_digest(adapter));
    print_targets(spec->layout, adapter);
    uint64_t beside = qv_lora_parts_bytes(spec->layout, adapter, spec->dtype);
    if (beside > 0)
        printf("  takes %s beside its slot\n", size_text(beside, text, sizeof text));
    fputs(qv_adapter_notes(adapter), stdout);
    qv_adapter_close(adapter);
    return true;
}

/* --- Main ------------------------------------------------------------------------------------- */

/* Print everything; *all_load becomes false when an adapter would not load. */
static qv_status inspect(const settings *s, const char *dir, qv_backend *be, bool *all_load)
{
    qv_model_config config;
    qv_layout layout;
    QV_TRY(qv_model_config_load(dir, &config));
    QV_TRY(qv_layout_init(&layout, &config, 0, 1));
    print_config(dir, &layout);
    print_tables(&layout);
    if (s->tensors)
        print_tensors(&layout);
    QV_TRY(print_memory(s, &layout, be));
    bool present;
    QV_TRY(print_weights(dir, &layout, &present));

    qv_adapter_spec spec = {.layout = &layout,
                            .max_rank = (int32_t)s->rank,
                            .dtype = qv_backend_lora_dtype(be),
                            .model_dir = present ? dir : NULL};
    for (size_t i = 0; i < s->adapters.n; i++)
        *all_load &= print_adapter(&spec, s->adapters.items[i]);
    return QV_OK;
}

int main(int argc, char **argv)
{
    settings s;
    qv_options *options;
    if (qv_options_parse(table, sizeof table / sizeof *table, &program, argc, argv, &s, &options) !=
        QV_OK) {
        fprintf(stderr, "inspect_model: %s\n", qv_error());
        return 2;
    }
    if (qv_options_printed(options)) {
        qv_options_free(options);
        return 0;
    }
    if (qv_options_args(options)->n != 1) {
        fprintf(stderr, "inspect_model: name one model directory; --help says more\n");
        qv_options_free(options);
        return 2;
    }
    qv_backend *be = NULL;
    bool all_load = true;
    qv_status status =
        qv_backend_open(&(qv_backend_options){.name = s.backend, .n_threads = 1}, &be);
    if (status == QV_OK)
        status = inspect(&s, qv_options_args(options)->items[0], be, &all_load);
    if (status != QV_OK) {
        fflush(stdout);
        fprintf(stderr, "inspect_model: %s\n", qv_error());
    }
    qv_backend_close(be);
    qv_options_free(options);
    return status == QV_OK && all_load ? 0 : 1;
}
