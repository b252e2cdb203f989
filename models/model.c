#include "models/model.h"

#include "models/arch.h"
#include "models/blocks.h"
#include "models/lora.h"
#include "models/lora_cut.h"
#include "models/lora_pool.h"
#include "models/ranks.h"
#include "models/sampling.h"
#include "models/state.h"
#include "models/weights.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* A rank's part of the model. */
enum { MAX_RECORDED = 20 };

typedef struct {
    qv_backend *be; /* borrowed */
    qv_layout layout;
    qv_model_config config; /* as its forward pass sees it */
    qv_weights weights;
    qv_state state;
    qv_buffers buffers;
    qv_lora_pool *lora;                      /* NULL: no adapters */
    qv_recording *recorded[2][MAX_RECORDED]; /* [with adapters][size] decode steps; NULL: none */
    int n_recorded;
    qv_tensor recorded_part; /* of the largest: where they all leave their logits */
} model_rank;

struct qv_model {
    qv_model_config config;
    qv_model_limits limits;
    qv_layout layout; /* of the whole model: what adapters are read against */
    char *dir;
    int32_t n_ranks;
    model_rank *ranks; /* [n_ranks] */
    qv_comm *comm;     /* NULL: one rank */
    qv_ranks *threads;
    /* Held by a step of several ranks until all of it is enqueued, and by an install: allocating on
     * a device waits for it, and while one rank waits for another in a collective, that may be for
     * ever. */
    pthread_mutex_t running;
    int64_t n_steps, break_rank, break_step; /* step 0: none is to fail */
    qv_sampling sampling;                    /* of several ranks */
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
        .weights = qv_weights_bytes(layout, be),
        .activations = qv_buffers_bytes(layout, limits, activation),
        .kv_page = qv_state_page_bytes(layout, limits->page_tokens, qv_backend_kv_dtype(be)),
        .state_slot = qv_state_slot_bytes(layout, activation),
    };
    if (limits->n_adapter_slots > 0) {
        qv_dtype dtype = qv_backend_lora_dtype(be);
        out->adapter_slot = qv_lora_slot_bytes(layout, limits->max_lora_rank, dtype);
        out->adapter_parts = qv_lora_parts_most(layout, limits->max_lora_rank, dtype);
        out->adapter_memory = limits->adapter_memory > 0
                                  ? limits->adapter_memory
                                  : out->adapter_parts * (uint64_t)limits->n_adapter_slots;
    }
    out->kv = out->kv_page * (uint64_t)limits->n_pages;
    out->state = out->state_slot * (uint64_t)limits->n_state_slots;
    out->adapters = out->adapter_slot * (uint64_t)limits->n_adapter_slots + out->adapter_memory;
    out->total = out->weights + out->kv + out->state + out->adapters + out->activations;
}

static qv_status plan_shard(const qv_model_config *config, const qv_shard *shard,
                            const qv_backend *be, const qv_model_limits *limits,
                            qv_memory_plan *out)
{
    QV_TRY(check_limits(limits));
    qv_layout layout;
    QV_TRY(qv_layout_init_shard(&layout, config, shard));
    plan_memory(&layout, be, limits, out);
    return QV_OK;
}

qv_status qv_model_plan_rank(const qv_model_config *config, const qv_model_ranks *ranks,
                             int32_t rank, const qv_model_limits *limits, qv_memory_plan *out)
{
    qv_shard shard = {
        .rank = rank, .n_ranks = ranks->n_ranks, .expert_groups = ranks->expert_groups};
    return plan_shard(config, &shard, ranks->backends[rank], limits, out);
}

qv_status qv_model_plan(const qv_model_config *config, const qv_backend *be,
                        const qv_model_limits *limits, qv_memory_plan *out)
{
    return plan_shard(config, &(qv_shard){.n_ranks = 1, .expert_groups = 1}, be, limits, out);
}

/* --- One pass --------------------------------------------------------------------------------- */

/* `batch` is where the backend reads it; *part becomes this rank's part of the logits. */
static qv_status forward(qv_model *model, int32_t rank, const qv_batch *batch, qv_lora_pool *lora,
                         qv_tensor *part)
{
    model_rank *r = &model->ranks[rank];
    qv_pass pass = {.be = r->be,
                    .config = &r->config,
                    .layout = &r->layout,
                    .weights = &r->weights,
                    .lora = lora,
                    .state = &r->state,
                    .buffers = &r->buffers,
                    .list = &r->buffers.list,
                    .batch = batch,
                    .probe = rank == 0 ? model->probe : NULL,
                    .probe_user = model->probe_user};
    QV_TRY(model->config.arch->forward(&pass));
    *part = pass.part;
    return QV_OK;
}

/* --- Recorded decode steps -------------------------------------------------------------------- */

/* Sizes that are recorded: what is shorter runs in the next one. */
static const int32_t recorded_sizes[MAX_RECORDED] = {1,  2,  4,  8,  12,  16,  24,  32,  40,  48,
                                                     56, 64, 80, 96, 112, 128, 160, 192, 224, 256};

typedef struct {
    qv_model *model;
    int32_t rank;
    bool with_adapters;
} recording;

static qv_status record_step(void *ctx, const qv_batch *batch)
{
    recording *rec = ctx;
    model_rank *r = &rec->model->ranks[rec->rank];
    return forward(rec->model, rec->rank, batch, rec->with_adapters ? r->lora : NULL,
                   &r->recorded_part);
}

/* Record the decode steps of one rank, without and with adapters. */
static qv_status record_rank(int32_t rank, void *ctx)
{
    qv_model *model = ctx;
    model_rank *r = &model->ranks[rank];
    const qv_model_limits *limits = &model->limits;
    int32_t most =
        limits->max_recorded < limits->max_seqs ? limits->max_recorded : limits->max_seqs;
    most = most < limits->max_logits ? most : limits->max_logits;
    if (!qv_backend_can_record(r->be) || limits->max_seq_pages < 1)
        return QV_OK;
    for (int i = 0; i < MAX_RECORDED && recorded_sizes[i] <= most; i++) {
        for (int with = 0; with <= (r->lora != NULL); with++) {
            recording rec = {.model = model, .rank = rank, .with_adapters = with};
            int32_t n = recorded_sizes[i], slots = limits->n_adapter_slots + 1;
            qv_recording_shape shape = {.n_seqs = n,
                                        .n_segs = with ? (n < slots ? n : slots) : 0,
                                        .page_stride = limits->max_seq_pages};
            QV_TRY(qv_backend_record(r->be, &shape, record_step, &rec, &r->recorded[with][i]));
        }
        r->n_recorded = i + 1;
    }
    return QV_OK;
}

/* A step of the base model alone costs nothing for adapters. `b` is in host memory. */
static bool has_adapters(const qv_batch *b)
{
    return b->n_segs > 1 || (b->n_segs == 1 && b->seg_slot[0] >= 0);
}

/* The recording that can stand in for a step; NULL: run it op by op. */
static qv_recording *find_recording(const qv_model *model, const model_rank *r, const qv_batch *b)
{
    if (r->n_recorded == 0 || !qv_backend_can_record(r->be) || model->probe != NULL ||
        b->n_tokens != b->n_seqs || b->n_logits != b->n_seqs ||
        b->page_stride > model->limits.max_seq_pages)
        return NULL;
    bool with = has_adapters(b);
    for (int i = 0; i < r->n_recorded; i++)
        if (recorded_sizes[i] >= b->n_seqs)
            return r->recorded[with && r->lora != NULL][i];
    return NULL;
}

/* --- Life ------------------------------------------------------------------------------------- */

/* What the ranks share while a model opens. */
typedef struct {
    qv_model *model;
    const qv_safetensors *st;
    qv_progress_fn *progress;
    void *user;
} opening;

/* Load and allocate one rank's part. Only rank 0 tells progress: the others load as much beside it.
 */
static qv_status open_rank(int32_t rank, void *ctx)
{
    opening *o = ctx;
    const qv_model_limits *limits = &o->model->limits;
    model_rank *r = &o->model->ranks[rank];
    QV_TRY(qv_backend_connect(r->be));
    if (limits->made_up_weights)
        QV_TRY(qv_weights_make_up(&r->weights, r->be, &r->layout));
    else
        QV_TRY(qv_weights_load(&r->weights, r->be, &r->layout, o->st,
                               rank == 0 ? o->progress : NULL, o->user));
    QV_TRY(qv_state_init(&r->state, r->be, &r->layout, limits));
    QV_TRY(qv_buffers_init(&r->buffers, r->be, &r->layout, limits));
    if (limits->n_adapter_slots > 0) {
        qv_memory_plan plan;
        plan_memory(&r->layout, r->be, limits, &plan);
        QV_TRY(qv_lora_pool_new(r->be, &r->layout, limits->n_adapter_slots, limits->max_lora_rank,
                                plan.adapter_memory, &r->lora));
    }
    return qv_backend_reserve(r->be,
                              &(qv_backend_limits){.max_tokens = limits->max_tokens,
                                                   .max_logits = limits->max_logits,
                                                   .n_vocab = (int32_t)o->model->config.vocab});
}

/* Who the ranks are and what each has, before anything is loaded. */
static qv_status init_ranks(qv_model *model, const qv_model_ranks *ranks)
{
    model->n_ranks = ranks->n_ranks;
    model->ranks = calloc((size_t)ranks->n_ranks, sizeof *model->ranks);
    if (model->ranks == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a model");
    if (ranks->n_ranks > 1)
        QV_TRY(qv_comm_new(ranks->n_ranks, &model->comm));
    for (int32_t i = 0; i < ranks->n_ranks; i++) {
        model_rank *r = &model->ranks[i];
        r->be = ranks->backends[i];
        qv_shard shard = {
            .rank = i, .n_ranks = ranks->n_ranks, .expert_groups = ranks->expert_groups};
        QV_TRY(qv_layout_init_shard(&r->layout, &model->config, &shard));
        r->config = qv_layout_rank_config(&r->layout);
        if (model->comm != NULL)
            qv_backend_join(r->be, model->comm, i);
    }
    if (model->comm != NULL)
        QV_TRY(qv_sampling_init(&model->sampling, model->limits.max_logits));
    return qv_ranks_new(model->comm, &model->threads);
}

static qv_status open_parts(qv_model *model, const qv_model_ranks *ranks, qv_progress_fn *progress,
                            void *user)
{
    QV_TRY(qv_model_config_load(model->dir, &model->config));
    QV_TRY(qv_layout_init(&model->layout, &model->config, 0, 1));
    QV_TRY(init_ranks(model, ranks));
    qv_safetensors *st = NULL;
    if (!model->limits.made_up_weights)
        QV_TRY(qv_safetensors_open_dir(model->dir, &st));
    opening o = {.model = model, .st = st, .progress = progress, .user = user};
    qv_status status = qv_ranks_run(model->threads, open_rank, &o);
    qv_safetensors_close(st);
    if (status == QV_OK)
        status = qv_ranks_run(model->threads, record_rank, model);
    return status == QV_OK ? QV_OK : qv_fail_prefix(status, "%s", model->dir);
}

qv_status qv_model_open_ranks(const char *dir, const qv_model_ranks *ranks,
                              const qv_model_limits *limits, qv_progress_fn *progress, void *user,
                              qv_model **out)
{
    QV_TRY(check_limits(limits));
    if (ranks->n_ranks < 1 || ranks->n_ranks > QV_MAX_RANKS)
        return qv_fail(QV_ERR_ARG, "%d ranks: between 1 and %d are possible", ranks->n_ranks,
                       QV_MAX_RANKS);
    qv_model *model = calloc(1, sizeof *model);
    if (model == NULL || (model->dir = strdup(dir)) == NULL) {
        free(model);
        return qv_fail(QV_ERR_NOMEM, "no memory for a model");
    }
    model->limits = *limits;
    pthread_mutex_init(&model->running, NULL);
    qv_status status = open_parts(model, ranks, progress, user);
    if (status != QV_OK) {
        qv_model_close(model);
        return status;
    }
    *out = model;
    return QV_OK;
}

qv_status qv_model_open(const char *dir, qv_backend *be, const qv_model_limits *limits,
                        qv_progress_fn *progress, void *user, qv_model **out)
{
    qv_model_ranks alone = {.backends = &be, .n_ranks = 1, .expert_groups = 1};
    return qv_model_open_ranks(dir, &alone, limits, progress, user, out);
}

void qv_model_close(qv_model *model)
{
    if (model == NULL)
        return;
    qv_ranks_free(model->threads);
    int32_t n_ranks = model->ranks != NULL ? model->n_ranks : 0;
    for (int32_t i = 0; i < n_ranks; i++) {
        model_rank *r = &model->ranks[i];
        for (int j = 0; j < r->n_recorded; j++)
            for (int with = 0; with < 2; with++)
                qv_recording_free(r->be, r->recorded[with][j]);
    }
    /* All leave the group before anything is freed: freeing waits for a device, and a device may
     * wait for a rank that has failed. */
    for (int32_t i = 0; i < n_ranks; i++)
        if (model->ranks[i].be != NULL)
            qv_backend_leave(model->ranks[i].be);
    for (int32_t i = 0; i < n_ranks; i++) {
        model_rank *r = &model->ranks[i];
        qv_lora_pool_free(r->lora);
        qv_buffers_deinit(&r->buffers);
        qv_state_deinit(&r->state);
        qv_weights_deinit(&r->weights);
    }
    pthread_mutex_destroy(&model->running);
    qv_sampling_deinit(&model->sampling);
    qv_comm_free(model->comm);
    free(model->ranks);
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

qv_backend *qv_model_get_backend(const qv_model *model)
{
    return model->ranks[0].be;
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

typedef struct {
    qv_model *model;
    const qv_batch *batch;       /* host memory */
    bool gather;                 /* all logits on rank 0 */
    qv_tensor logits;            /* of rank 0, then */
    const qv_sampling *sampling; /* NULL: none; with one rank the caller samples */
} step;

/* All logits on rank 0, for those who want to see them. */
static qv_status gather_logits(step *s, int32_t rank, qv_tensor part)
{
    qv_model *model = s->model;
    model_rank *r = &model->ranks[rank];
    qv_tensor whole =
        qv_tensor_2d(r->buffers.data[QV_BUF_LOGITS], QV_F32, part.shape[0], model->config.vocab);
    if (part.shape[0] > 0)
        QV_TRY(qv_op_gather_cols(r->be, part, whole));
    if (rank > 0)
        return QV_OK;
    s->logits = whole;
    if (model->probe != NULL && part.shape[0] > 0)
        model->probe(QV_GLOBAL, "logits", &whole, model->probe_user);
    return QV_OK;
}

static qv_status run_step(int32_t rank, void *ctx)
{
    step *s = ctx;
    qv_model *model = s->model;
    model_rank *r = &model->ranks[rank];
    if (model->n_steps == model->break_step && rank == model->break_rank)
        return qv_fail(QV_ERR_DEVICE, "told to fail at step %" PRId64, model->n_steps);
    qv_recording *recorded = find_recording(model, r, s->batch);
    qv_tensor part;
    if (recorded != NULL) {
        QV_TRY(qv_backend_replay(r->be, recorded, s->batch));
        part = qv_tensor_rows(r->recorded_part, 0, s->batch->n_logits);
    } else {
        qv_batch batch;
        QV_TRY(qv_backend_put_batch(r->be, s->batch, &batch));
        QV_TRY(forward(model, rank, &batch, has_adapters(s->batch) ? r->lora : NULL, &part));
    }
    if (s->gather || model->probe != NULL)
        QV_TRY(gather_logits(s, rank, part));
    if (s->sampling != NULL)
        QV_TRY(qv_sampling_run(s->sampling, r->be, &r->layout, &r->buffers, part));
    /* So that a fault of another rank is found now, while the first waits for it. */
    return rank > 0 ? qv_backend_sync(r->be) : QV_OK;
}

static qv_status run_on_ranks(step *s)
{
    qv_model *model = s->model;
    model->n_steps++;
    if (model->n_ranks == 1)
        return qv_ranks_run(model->threads, run_step, s);
    pthread_mutex_lock(&model->running);
    qv_status status = qv_ranks_run(model->threads, run_step, s);
    pthread_mutex_unlock(&model->running);
    return status;
}

qv_status qv_model_forward(qv_model *model, const qv_batch *batch, qv_tensor *logits)
{
    QV_TRY(check_batch(&model->limits, batch));
    step s = {.model = model, .batch = batch, .gather = true};
    QV_TRY(run_on_ranks(&s));
    *logits = s.logits;
    return QV_OK;
}

qv_status qv_model_step(qv_model *model, const qv_batch *batch, int32_t n_valid,
                        const qv_sample_row *rows, qv_sample_result *results, qv_status *sampled)
{
    QV_TRY(check_batch(&model->limits, batch));
    bool alone = model->n_ranks == 1;
    step s = {.model = model, .batch = batch, .gather = alone};
    if (!alone && batch->n_logits > 0) {
        QV_TRY(qv_sampling_plan(&model->sampling, rows, batch->n_logits, n_valid,
                                model->config.vocab, results));
        s.sampling = &model->sampling;
    }
    QV_TRY(run_on_ranks(&s));
    *sampled = alone && batch->n_logits > 0
                   ? qv_op_sample(model->ranks[0].be, s.logits, n_valid, rows, results)
                   : qv_sample_check_results(results, batch->n_logits);
    return QV_OK;
}

qv_status qv_model_break_rank(qv_model *model, int64_t rank, int64_t at_step)
{
    if (rank < 0 || rank >= model->n_ranks || at_step < 1)
        return qv_fail(QV_ERR_ARG,
                       "rank %" PRId64 " cannot fail at step %" PRId64 ": there are %d ranks, and "
                       "steps count from 1",
                       rank, at_step, model->n_ranks);
    model->break_rank = rank;
    model->break_step = model->n_steps + at_step;
    return QV_OK;
}

/* --- Sequence state --------------------------------------------------------------------------- */

/* A sequence's bytes are those of the ranks, one after the other. */
static size_t rank_state_bytes(const qv_model *model, int32_t rank, int32_t n_pages)
{
    const model_rank *r = &model->ranks[rank];
    return qv_state_slot_bytes(&r->layout, qv_backend_activation_dtype(r->be)) +
           (size_t)n_pages * qv_state_page_bytes(&r->layout, model->limits.page_tokens,
                                                 qv_backend_kv_dtype(r->be));
}

size_t qv_model_state_bytes(const qv_model *model, int32_t n_pages)
{
    size_t total = 0;
    for (int32_t i = 0; i < model->n_ranks; i++)
        total += rank_state_bytes(model, i, n_pages);
    return total;
}

qv_status qv_model_state_save(qv_model *model, const int32_t *pages, int32_t n_pages, int32_t slot,
                              void *out)
{
    uint8_t *to = out;
    for (int32_t i = 0; i < model->n_ranks; i++) {
        QV_TRY(qv_state_save(&model->ranks[i].state, pages, n_pages, slot, to));
        to += rank_state_bytes(model, i, n_pages);
    }
    return QV_OK;
}

qv_status qv_model_state_restore(qv_model *model, const int32_t *pages, int32_t n_pages,
                                 int32_t slot, const void *in)
{
    const uint8_t *from = in;
    for (int32_t i = 0; i < model->n_ranks; i++) {
        QV_TRY(qv_state_restore(&model->ranks[i].state, pages, n_pages, slot, from));
        from += rank_state_bytes(model, i, n_pages);
    }
    return QV_OK;
}

qv_status qv_model_state_copy(qv_model *model, int32_t from, int32_t to)
{
    for (int32_t i = 0; i < model->n_ranks; i++)
        QV_TRY(qv_state_copy_slot(&model->ranks[i].state, from, to));
    return QV_OK;
}

/* --- Adapters --------------------------------------------------------------------------------- */

qv_status qv_adapter_open(const qv_model *model, const char *dir, qv_adapter **out)
{
    qv_adapter_spec spec = {.layout = &model->layout,
                            .max_rank = model->limits.max_lora_rank,
                            .dtype = qv_backend_lora_dtype(model->ranks[0].be),
                            .max_bytes = model->limits.max_adapter_bytes,
                            .model_dir = model->dir};
    if (model->limits.n_adapter_slots == 0)
        return qv_fail(QV_ERR_LIMIT, "%s: the model was opened without adapter slots", dir);
    QV_TRY(qv_adapter_read(&spec, dir, out));
    if (model->n_ranks > 1) /* a rank has less of it; installing says */
        return QV_OK;
    qv_status status = qv_lora_parts_check(qv_lora_pool_parts(model->ranks[0].lora), *out);
    if (status != QV_OK) {
        qv_adapter_close(*out);
        return qv_fail_prefix(status, "%s", dir);
    }
    return QV_OK;
}

static qv_status check_slot(const qv_model *model, int32_t slot)
{
    if (slot < 0 || slot >= model->limits.n_adapter_slots)
        return qv_fail(QV_ERR_ARG, "adapter slot %d of %d", slot, model->limits.n_adapter_slots);
    return QV_OK;
}

static qv_status install_part(qv_model *model, int32_t rank, int32_t slot,
                              const qv_adapter *adapter)
{
    const model_rank *r = &model->ranks[rank];
    qv_adapter *part;
    QV_TRY(
        qv_adapter_cut(adapter, &model->layout, &r->layout, qv_backend_lora_dtype(r->be), &part));
    qv_status status = qv_lora_pool_install(r->lora, slot, part);
    qv_adapter_close(part);
    return status;
}

qv_status qv_model_adapter_install(qv_model *model, int32_t slot, const qv_adapter *adapter)
{
    QV_TRY(check_slot(model, slot));
    if (model->n_ranks == 1)
        return qv_lora_pool_install(model->ranks[0].lora, slot, adapter);
    qv_status status = QV_OK;
    pthread_mutex_lock(&model->running);
    for (int32_t i = 0; i < model->n_ranks && status == QV_OK; i++) {
        status = install_part(model, i, slot, adapter);
        for (int32_t j = 0; j < i && status != QV_OK; j++) /* report the first failure */
            (void)qv_lora_pool_clear(model->ranks[j].lora, slot);
    }
    pthread_mutex_unlock(&model->running);
    return status;
}

qv_status qv_model_adapter_clear(qv_model *model, int32_t slot)
{
    QV_TRY(check_slot(model, slot));
    if (model->n_ranks == 1)
        return qv_lora_pool_clear(model->ranks[0].lora, slot);
    qv_status status = QV_OK;
    pthread_mutex_lock(&model->running);
    for (int32_t i = 0; i < model->n_ranks && status == QV_OK; i++)
        status = qv_lora_pool_clear(model->ranks[i].lora, slot);
    pthread_mutex_unlock(&model->running);
    return status;
}

qv_status qv_model_make_up_adapters(qv_model *model, int32_t rank)
{
    QV_TRY(check_slot(model, 0));
    for (int32_t i = 0; i < model->n_ranks; i++)
        QV_TRY(qv_lora_pool_make_up(model->ranks[i].lora, rank));
    return QV_OK;
}
