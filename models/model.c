#include "models/model.h"

#include "models/arch.h"
#include "models/blocks.h"
#include "models/lora.h"
#include "models/lora_pool.h"
#include "models/state.h"
#include "models/weights.h"

#include <stdlib.h>
#include <string.h>

struct qv_model {
    qv_model_config config;
    qv_model_limits limits;
    qv_layout layout;
    qv_backend *be; /* borrowed */
    char *dir;
    qv_weights weights;
    qv_state state;
    qv_buffers buffers;
    qv_lora_pool *lora; /* NULL: no adapters */
    qv_probe_fn *probe;
    void *probe_user;
};

/* --- Plan ------------------------------------------------------------------------------------- */

static qv_status check_limits(const qv_model_limits *limits)
{
    const struct {
        const char *name;
        int32_t value, min, max;
    } rows[] = {
        {"max_tokens", limits->max_tokens, 1, 1 << 20},
        {"max_seqs", limits->max_seqs, 1, 1 << 20},
        {"max_logits", limits->max_logits, 1, 1 << 20},
        {"page_tokens", limits->page_tokens, 1, 1 << 16},
        {"n_pages", limits->n_pages, 1, INT32_MAX},
        {"n_state_slots", limits->n_state_slots, 1, 1 << 20},
        {"n_adapter_slots", limits->n_adapter_slots, 0, 1 << 16},
        {"max_lora_rank", limits->max_lora_rank, limits->n_adapter_slots > 0, 4096},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (rows[i].value < rows[i].min || rows[i].value > rows[i].max)
            return qv_fail(QV_ERR_LIMIT, "%s is %d, which is not between %d and %d", rows[i].name,
                           rows[i].value, rows[i].min, rows[i].max);
    }
    return QV_OK;
}

static void plan_memory(const qv_layout *layout, const qv_backend *be,
                        const qv_model_limits *limits, qv_memory_plan *out)
{
    qv_dtype activation = qv_backend_activation_dtype(be);
    *out = (qv_memory_plan){
        .weights = qv_weights_bytes(layout),
        .activations = qv_buffers_bytes(layout, limits, activation),
        .kv_page = qv_state_page_bytes(layout, limits->page_tokens, qv_backend_kv_dtype(be)),
        .state_slot = qv_state_slot_bytes(layout, activation),
    };
    if (limits->n_adapter_slots > 0)
        out->adapter_slot =
            qv_lora_slot_bytes(layout, limits->max_lora_rank, qv_backend_lora_dtype(be));
    out->kv = out->kv_page * (uint64_t)limits->n_pages;
    out->state = out->state_slot * (uint64_t)limits->n_state_slots;
    out->adapters = out->adapter_slot * (uint64_t)limits->n_adapter_slots;
    out->total = out->weights + out->kv + out->state + out->adapters + out->activations;
}

qv_status qv_model_plan(const qv_model_config *config, const qv_backend *be,
                        const qv_model_limits *limits, qv_memory_plan *out)
{
    QV_TRY(check_limits(limits));
    qv_layout layout;
    QV_TRY(qv_layout_init(&layout, config, 0, 1));
    plan_memory(&layout, be, limits, out);
    return QV_OK;
}

/* --- Life ------------------------------------------------------------------------------------- */

static qv_status load_weights(qv_model *model, qv_progress_fn *progress, void *user)
{
    qv_safetensors *st;
    QV_TRY(qv_safetensors_open_dir(model->dir, &st));
    qv_status status =
        qv_weights_load(&model->weights, model->be, &model->layout, st, progress, user);
    qv_safetensors_close(st);
    return status == QV_OK ? QV_OK : qv_fail_prefix(status, "%s", model->dir);
}

static qv_status open_parts(qv_model *model, qv_progress_fn *progress, void *user)
{
    const qv_model_limits *limits = &model->limits;
    QV_TRY(qv_model_config_load(model->dir, &model->config));
    QV_TRY(qv_layout_init(&model->layout, &model->config, 0, 1));
    QV_TRY(load_weights(model, progress, user));
    QV_TRY(qv_state_init(&model->state, model->be, &model->layout, limits));
    QV_TRY(qv_buffers_init(&model->buffers, model->be, &model->layout, limits));
    if (limits->n_adapter_slots > 0)
        QV_TRY(qv_lora_pool_new(model->be, &model->layout, limits->n_adapter_slots,
                                limits->max_lora_rank, &model->lora));
    return qv_backend_reserve(model->be,
                              &(qv_backend_limits){.max_tokens = limits->max_tokens,
                                                   .max_logits = limits->max_logits,
                                                   .n_vocab = (int32_t)model->config.vocab});
}

qv_status qv_model_open(const char *dir, qv_backend *be, const qv_model_limits *limits,
                        qv_progress_fn *progress, void *user, qv_model **out)
{
    QV_TRY(check_limits(limits));
    qv_model *model = calloc(1, sizeof *model);
    if (model == NULL || (model->dir = strdup(dir)) == NULL) {
        free(model);
        return qv_fail(QV_ERR_NOMEM, "no memory for a model");
    }
    model->be = be;
    model->limits = *limits;
    qv_status status = open_parts(model, progress, user);
    if (status != QV_OK) {
        qv_model_close(model);
        return status;
    }
    *out = model;
    return QV_OK;
}

void qv_model_close(qv_model *model)
{
    if (model == NULL)
        return;
    qv_lora_pool_free(model->lora);
    qv_buffers_deinit(&model->buffers);
    qv_state_deinit(&model->state);
    qv_weights_deinit(&model->weights);
    free(model->dir);
    free(model);
}

const qv_model_config *qv_model_get_config(const qv_model *model)
{
    return &model->config;
}

const qv_model_limits *qv_model_get_limits(const qv_model *model)
{
    return &model->limits;
}

void qv_model_set_probe(qv_model *model, qv_probe_fn *probe, void *user)
{
    model->probe = probe;
    model->probe_user = user;
}

/* --- Forward ---------------------------------------------------------------------------------- */

static qv_status check_batch(const qv_model_limits *limits, const qv_batch *batch)
{
    const struct {
        const char *what;
        int32_t n, max;
    } rows[] = {
        {"tokens", batch->n_tokens, limits->max_tokens},
        {"sequences", batch->n_seqs, limits->max_seqs},
        {"rows of logits", batch->n_logits, limits->max_logits},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (rows[i].n < 0 || rows[i].n > rows[i].max)
            return qv_fail(QV_ERR_LIMIT, "a step of %d %s; the model was opened for %d", rows[i].n,
                           rows[i].what, rows[i].max);
    }
    if (batch->n_tokens == 0 || batch->n_seqs == 0)
        return qv_fail(QV_ERR_SHAPE, "a step without tokens");
    return QV_OK;
}

qv_status qv_model_forward(qv_model *model, const qv_batch *batch, qv_tensor *logits)
{
    QV_TRY(check_batch(&model->limits, batch));
    qv_pass pass = {.be = model->be,
                    .config = &model->config,
                    .layout = &model->layout,
                    .weights = &model->weights,
                    .lora = model->lora,
                    .state = &model->state,
                    .buffers = &model->buffers,
                    .list = &model->buffers.list,
                    .batch = batch,
                    .probe = model->probe,
                    .probe_user = model->probe_user};
    QV_TRY(model->config.arch->forward(&pass));
    *logits = pass.logits;
    return QV_OK;
}

/* --- Sequence state --------------------------------------------------------------------------- */

size_t qv_model_state_bytes(const qv_model *model, int32_t n_pages)
{
    return qv_state_slot_bytes(&model->layout, qv_backend_activation_dtype(model->be)) +
           (size_t)n_pages * qv_state_page_bytes(&model->layout, model->limits.page_tokens,
                                                 qv_backend_kv_dtype(model->be));
}

qv_status qv_model_state_save(qv_model *model, const int32_t *pages, int32_t n_pages, int32_t slot,
                              void *out)
{
    return qv_state_save(&model->state, pages, n_pages, slot, out);
}

qv_status qv_model_state_restore(qv_model *model, const int32_t *pages, int32_t n_pages,
                                 int32_t slot, const void *in)
{
    return qv_state_restore(&model->state, pages, n_pages, slot, in);
}

/* --- Adapters --------------------------------------------------------------------------------- */

qv_status qv_adapter_open(const qv_model *model, const char *dir, qv_adapter **out)
{
    qv_adapter_spec spec = {.layout = &model->layout,
                            .max_rank = model->limits.max_lora_rank,
                            .dtype = qv_backend_lora_dtype(model->be),
                            .max_bytes = model->limits.max_adapter_bytes,
                            .model_dir = model->dir};
    if (model->lora == NULL)
        return qv_fail(QV_ERR_LIMIT, "%s: the model was opened without adapter slots", dir);
    return qv_adapter_read(&spec, dir, out);
}

static qv_status check_slot(const qv_model *model, int32_t slot)
{
    if (slot < 0 || slot >= model->limits.n_adapter_slots)
        return qv_fail(QV_ERR_ARG, "adapter slot %d of %d", slot, model->limits.n_adapter_slots);
    return QV_OK;
}

qv_status qv_model_adapter_install(qv_model *model, int32_t slot, const qv_adapter *adapter)
{
    QV_TRY(check_slot(model, slot));
    return qv_lora_pool_install(model->lora, slot, adapter);
}

qv_status qv_model_adapter_clear(qv_model *model, int32_t slot)
{
    QV_TRY(check_slot(model, slot));
    return qv_lora_pool_clear(model->lora, slot);
}
