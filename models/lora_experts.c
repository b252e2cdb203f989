/* Pairs of parameters that hold all experts, as PEFT wraps them. The experts' module is wrapped
 * once for each parameter that is targeted, in the order of the model: the wrapper inside another,
 * named base_layer, is that of the in-projection; the outermost is that of the out-projection,
 * unless it is the only one.
 *
 * A pair is flat: A [experts x rank, p] with the experts one after the other, B [q, rank x experts]
 * with the experts side by side. In the standard layout p is the matrix's input and q its output;
 * in the swapped one, which older versions wrote, the other way round, and the pair is that of the
 * transposed matrix. */
#include "models/lora_reader.h"

#include <inttypes.h>
#include <string.h>

static const char *parameter_of(const qv_lora_reader *r, qv_proj proj)
{
    return r->spec->layout->proj[proj].slices[0].row->fused;
}

/* "…experts.gate_up_proj", as target_parameters and the patterns know it. */
static void name_parameter(const qv_lora_reader *r, const qv_lora_pair *pair, qv_proj proj,
                           char *buf, size_t size)
{
    qv_lora_key key = qv_lora_key_parse(pair->a->name);
    size_t n = key.size - (pair->place.inner ? strlen(".base_layer") : 0);
    snprintf(buf, size, "%.*s.%s", (int)n, key.module, parameter_of(r, proj));
}

static bool is_targeted(const qv_lora_reader *r, const qv_lora_pair *pair, qv_proj proj)
{
    char name[512];
    name_parameter(r, pair, proj, name, sizeof name);
    return qv_lora_config_targets(&r->config, name);
}

/* --- Orientation ------------------------------------------------------------------------------ */

typedef struct {
    bool standard, swapped; /* whether the shapes fit */
} fit;

static fit fit_of(const qv_lora_reader *r, const qv_lora_pair *pair, qv_proj proj)
{
    const qv_proj_shape *shape = &r->spec->layout->proj[proj];
    int64_t p = pair->a->shape[1], q = pair->b->shape[0];
    return (fit){.standard = p == shape->n_in && q == shape->n_out,
                 .swapped = p == shape->n_out && q == shape->n_in};
}

/* Which of the layouts that fit is meant. */
static qv_status choose_layout(const qv_lora_reader *r, const qv_lora_pair *pair, qv_proj proj,
                               bool *swapped)
{
    const qv_proj_shape *shape = &r->spec->layout->proj[proj];
    qv_expert_layout wanted = r->config.expert_layout;
    fit f = fit_of(r, pair, proj);
    char a[128], b[128];
    qv_stored_tensor_describe(pair->a, a, sizeof a);
    qv_stored_tensor_describe(pair->b, b, sizeof b);
    if (!f.standard && !f.swapped)
        return qv_fail(QV_ERR_SHAPE,
                       "%s: %.200s is %s and its lora_B is %s; for %s of %" PRId64
                       " experts the model makes them [rank x experts, %" PRId64 "] and [%" PRId64
                       ", rank x experts], or with the sizes swapped",
                       r->where, pair->a->name, a, b, parameter_of(r, proj),
                       r->spec->layout->config->n_experts, shape->n_in, shape->n_out);
    if ((wanted == QV_EXPERT_LAYOUT_STANDARD && !f.standard) ||
        (wanted == QV_EXPERT_LAYOUT_SWAPPED && !f.swapped))
        return qv_fail(QV_ERR_FORMAT,
                       "%s: expert_layout is %s, but %.200s is %s and its lora_B is %s",
                       r->config_where, f.standard ? "swapped" : "standard", pair->a->name, a, b);
    if (f.standard && f.swapped && wanted == QV_EXPERT_LAYOUT_UNSAID && !r->config.knows_standard)
        return qv_fail(QV_ERR_FORMAT,
                       "%s: %.200s is %s and its lora_B is %s, which fits two layouts, and no "
                       "peft_version of 0.19.1 or later says which: set expert_layout to "
                       "\"standard\" or \"swapped\"",
                       r->config_where, pair->a->name, a, b);
    *swapped = !f.standard || (f.swapped && wanted == QV_EXPERT_LAYOUT_SWAPPED);
    return QV_OK;
}

/* --- Which matrix ----------------------------------------------------------------------------- */

/* The only wrapper of its experts: target_parameters says which matrix it wraps, else the shapes
 * must leave one. */
static qv_status choose_matrix(const qv_lora_reader *r, const qv_lora_pair *pair, qv_proj *proj)
{
    bool in = is_targeted(r, pair, QV_PROJ_EXPERT_IN);
    bool out = is_targeted(r, pair, QV_PROJ_EXPERT_OUT);
    if (!in && !out) {
        fit fits_in = fit_of(r, pair, QV_PROJ_EXPERT_IN);
        fit fits_out = fit_of(r, pair, QV_PROJ_EXPERT_OUT);
        in = fits_in.standard || fits_in.swapped;
        out = fits_out.standard || fits_out.swapped;
    }
    *proj = out && !in ? QV_PROJ_EXPERT_OUT : QV_PROJ_EXPERT_IN;
    return in && out ? qv_fail(QV_ERR_FORMAT,
                               "%s: %.200s is the only pair of its experts, and may be of %s or of "
                               "%s: let target_parameters name the one",
                               r->config_where, pair->a->name, parameter_of(r, QV_PROJ_EXPERT_IN),
                               parameter_of(r, QV_PROJ_EXPERT_OUT))
                     : QV_OK;
}

/* Two wrappers: the order of the model decides, and target_parameters may not say otherwise. */
static qv_status check_both(const qv_lora_reader *r, const qv_lora_pair *pair, qv_proj proj)
{
    if (r->config.target_parameters != NULL && !is_targeted(r, pair, proj))
        return qv_fail(QV_ERR_FORMAT, "%s: target_parameters does not name %s, of which %.200s is",
                       r->config_where, parameter_of(r, proj), pair->a->name);
    return QV_OK;
}

/* --- Views ------------------------------------------------------------------------------------ */

static qv_status resolve(qv_lora_reader *r, qv_lora_pair *pair, qv_proj proj)
{
    int64_t n_experts = r->spec->layout->config->n_experts, rows = pair->a->shape[0];
    bool swapped = false;
    QV_TRY(choose_layout(r, pair, proj, &swapped));
    char text[128];
    qv_stored_tensor_describe(pair->a, text, sizeof text);
    if (rows % n_experts != 0)
        return qv_fail(QV_ERR_SHAPE,
                       "%s: %.200s is %s; the model makes it [rank x %" PRId64 " experts, %" PRId64
                       "]",
                       r->where, pair->a->name, text, n_experts, pair->a->shape[1]);
    qv_stored_tensor_describe(pair->b, text, sizeof text);
    if (pair->b->shape[1] != rows)
        return qv_fail(QV_ERR_SHAPE,
                       "%s: %.200s is %s, but its lora_A has rank x experts = %" PRId64, r->where,
                       pair->b->name, text, rows);
    int64_t p = pair->a->shape[1], q = pair->b->shape[0], rank = rows / n_experts;
    qv_lora_view a = qv_lora_view_plain(pair->a, n_experts, rank, p);
    qv_lora_view b = {.tensor = pair->b, .n = n_experts, .rows = q, .cols = rank};
    b.stride[0] = r->config.grouped_b ? rank : 1;
    b.stride[1] = rank * n_experts;
    b.stride[2] = r->config.grouped_b ? 1 : n_experts;
    pair->a_view = swapped ? qv_lora_view_transpose(b) : a;
    pair->b_view = swapped ? qv_lora_view_transpose(a) : b;
    pair->place.target = qv_layout_whole_target(r->spec->layout, proj);
    return QV_OK;
}

/* The wrapper around `pair`'s, or inside it; NULL if there is none. */
static const qv_lora_pair *find_other(const qv_lora_reader *r, const qv_lora_pair *pair)
{
    for (size_t i = 0; i < r->n_pairs; i++) {
        const qv_lora_place *place = &r->pairs[i]->place;
        if (place->kind == QV_PLACE_WRAPPER && place->layer == pair->place.layer &&
            place->inner != pair->place.inner)
            return r->pairs[i];
    }
    return NULL;
}

qv_status qv_lora_resolve_wrappers(qv_lora_reader *r)
{
    for (size_t i = 0; i < r->n_pairs; i++) {
        qv_lora_pair *pair = r->pairs[i];
        if (pair->place.kind != QV_PLACE_WRAPPER)
            continue;
        QV_TRY(qv_lora_check_dims(r, pair->a, 2, "[rank x experts, size]"));
        QV_TRY(qv_lora_check_dims(r, pair->b, 2, "[size, rank x experts]"));
        qv_proj proj = pair->place.inner ? QV_PROJ_EXPERT_IN : QV_PROJ_EXPERT_OUT;
        bool both = find_other(r, pair) != NULL;
        if (pair->place.inner && !both)
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s stands inside another pair, which is missing",
                           r->where, pair->a->name);
        QV_TRY(both ? check_both(r, pair, proj) : choose_matrix(r, pair, &proj));
        QV_TRY(resolve(r, pair, proj));
    }
    return QV_OK;
}
