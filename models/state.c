#include "models/state.h"

#include <stdlib.h>

/* --- Sizes ------------------------------------------------------------------------------------ */

uint64_t qv_state_page_bytes(const qv_layout *layout, int32_t page_tokens, qv_dtype kv_dtype)
{
    qv_model_config config = qv_layout_rank_config(layout);
    uint64_t row = (uint64_t)(config.n_kv_heads * config.head_dim) * qv_dtype_size(kv_dtype);
    return 2 * row * (uint64_t)page_tokens *
           (uint64_t)qv_model_config_count(&config, QV_PART_ATTENTION);
}

/* A layer's convolution tails and recurrent states without memory; both empty where it has none. */
static void recurrent_shapes(const qv_layout *layout, const qv_model_config *c, uint32_t parts,
                             int32_t n_slots, qv_dtype conv_dtype, qv_tensor *conv,
                             qv_tensor *recurrent)
{
    *conv = *recurrent = (qv_tensor){.data = NULL};
    if ((parts & (QV_PART_GDN | QV_PART_SSM)) == 0)
        return;
    *conv = qv_tensor_3d(NULL, conv_dtype, n_slots, layout->vec[QV_VEC_CONV].n_rows,
                         c->conv_kernel - 1);
    if (parts & QV_PART_GDN)
        *recurrent =
            qv_tensor_4d(NULL, QV_F32, n_slots, c->gdn_v_heads, c->gdn_k_dim, c->gdn_v_dim);
    else
        *recurrent =
            qv_tensor_4d(NULL, QV_F32, n_slots, c->ssm_heads, c->ssm_head_dim, c->ssm_state);
}

static uint64_t tensor_bytes(const qv_tensor *t)
{
    return t->n_dims > 0 ? (uint64_t)qv_tensor_count(t) * qv_dtype_size(t->dtype) : 0;
}

uint64_t qv_state_slot_bytes(const qv_layout *layout, qv_dtype conv_dtype)
{
    qv_model_config config = qv_layout_rank_config(layout);
    uint64_t total = 0;
    for (int64_t layer = 0; layer < config.n_layers; layer++) {
        qv_tensor conv, recurrent;
        recurrent_shapes(layout, &config, config.layer_parts[layer], 1, conv_dtype, &conv,
                         &recurrent);
        total += tensor_bytes(&conv) + tensor_bytes(&recurrent);
    }
    return total;
}

/* --- Life ------------------------------------------------------------------------------------- */

static qv_status new_tensor(qv_backend *be, qv_tensor shape, qv_tensor *out)
{
    *out = shape;
    return shape.n_dims > 0 ? qv_backend_alloc(be, tensor_bytes(&shape), &out->data) : QV_OK;
}

static qv_status init_layer(qv_state *state, const qv_layout *layout, const qv_model_config *config,
                            const qv_model_limits *limits, int64_t layer)
{
    qv_layer_state *out = &state->layers[layer];
    qv_backend *be = state->be;
    qv_tensor conv, recurrent;
    if (config->layer_parts[layer] & QV_PART_ATTENTION) {
        qv_tensor pages = qv_tensor_4d(NULL, qv_backend_kv_dtype(be), limits->n_pages,
                                       limits->page_tokens, config->n_kv_heads, config->head_dim);
        out->kv.page_tokens = limits->page_tokens;
        QV_TRY(new_tensor(be, pages, &out->kv.k));
        QV_TRY(new_tensor(be, pages, &out->kv.v));
    }
    recurrent_shapes(layout, config, config->layer_parts[layer], limits->n_state_slots,
                     qv_backend_activation_dtype(be), &conv, &recurrent);
    QV_TRY(new_tensor(be, conv, &out->conv));
    return new_tensor(be, recurrent, &out->recurrent);
}

qv_status qv_state_init(qv_state *state, qv_backend *be, const qv_layout *layout,
                        const qv_model_limits *limits)
{
    *state = (qv_state){.be = be, .n_layers = layout->config->n_layers};
    state->layers = calloc((size_t)state->n_layers, sizeof *state->layers);
    if (state->layers == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the states of layers");
    qv_model_config config = qv_layout_rank_config(layout);
    for (int64_t layer = 0; layer < state->n_layers; layer++)
        QV_TRY(init_layer(state, layout, &config, limits, layer));
    return QV_OK;
}

void qv_state_deinit(qv_state *state)
{
    for (int64_t i = 0; i < state->n_layers && state->layers != NULL; i++) {
        qv_layer_state *layer = &state->layers[i];
        qv_backend_free(state->be, layer->kv.k.data);
        qv_backend_free(state->be, layer->kv.v.data);
        qv_backend_free(state->be, layer->conv.data);
        qv_backend_free(state->be, layer->recurrent.data);
    }
    free(state->layers);
    *state = (qv_state){.be = NULL};
}

/* --- Save and restore ------------------------------------------------------------------------- */

typedef struct {
    qv_backend *be;
    uint8_t *host; /* what comes next on the host */
    bool save;
} transfer;

/* Move entry `i` of dimension 0 of a tensor; a tensor that the layer does not have is skipped. */
static qv_status move_entry(transfer *t, const qv_tensor *tensor, int32_t i)
{
    if (tensor->data == NULL)
        return QV_OK;
    size_t bytes = (size_t)tensor->stride[0] * qv_dtype_size(tensor->dtype);
    uint8_t *device = (uint8_t *)tensor->data + (size_t)i * bytes;
    QV_TRY(t->save ? qv_backend_download(t->be, t->host, device, bytes)
                   : qv_backend_upload(t->be, device, t->host, bytes));
    t->host += bytes;
    return QV_OK;
}

static qv_status move_sequence(const qv_state *state, transfer *t, const int32_t *pages,
                               int32_t n_pages, int32_t slot)
{
    for (int64_t i = 0; i < state->n_layers; i++) {
        const qv_layer_state *layer = &state->layers[i];
        for (int32_t page = 0; page < n_pages; page++) {
            QV_TRY(move_entry(t, &layer->kv.k, pages[page]));
            QV_TRY(move_entry(t, &layer->kv.v, pages[page]));
        }
        QV_TRY(move_entry(t, &layer->conv, slot));
        QV_TRY(move_entry(t, &layer->recurrent, slot));
    }
    return QV_OK;
}

qv_status qv_state_save(const qv_state *state, const int32_t *pages, int32_t n_pages, int32_t slot,
                        void *out)
{
    transfer t = {.be = state->be, .host = out, .save = true};
    return move_sequence(state, &t, pages, n_pages, slot);
}

qv_status qv_state_restore(const qv_state *state, const int32_t *pages, int32_t n_pages,
                           int32_t slot, const void *in)
{
    transfer t = {.be = state->be, .host = (uint8_t *)in, .save = false};
    return move_sequence(state, &t, pages, n_pages, slot);
}

static qv_status copy_entry(qv_backend *be, const qv_tensor *tensor, int32_t from, int32_t to)
{
    if (tensor->data == NULL)
        return QV_OK;
    size_t bytes = (size_t)tensor->stride[0] * qv_dtype_size(tensor->dtype);
    uint8_t *data = tensor->data;
    return qv_backend_copy(be, data + (size_t)to * bytes, data + (size_t)from * bytes, bytes);
}

qv_status qv_state_copy_slot(const qv_state *state, int32_t from, int32_t to)
{
    for (int64_t i = 0; i < state->n_layers; i++) {
        QV_TRY(copy_entry(state->be, &state->layers[i].conv, from, to));
        QV_TRY(copy_entry(state->be, &state->layers[i].recurrent, from, to));
    }
    return QV_OK;
}
