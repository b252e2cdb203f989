/* A job is one block with its submit in it; an attempt's number carries its slot, so that a
 * worker's delta finds its job without hashing. */
#include "broker/requests.h"

#include <stdlib.h>
#include <string.h>

#define SLOT_BITS 24
#define SLOT_MASK ((UINT64_C(1) << SLOT_BITS) - 1)

/* --- States -----------------------------------------------------------------------------------*/

#define NEVER QV_JOB_STATE_COUNT

static const unsigned char transitions[QV_JOB_STATE_COUNT][QV_JOB_EVENT_COUNT] = {
    /* DISPATCH, PROGRESS, REQUEUE, FINISH, CANCEL, FAIL, PARK, UNPARK */
    [QV_JOB_QUEUED] = {QV_JOB_DISPATCHED, NEVER, NEVER, QV_JOB_DONE, QV_JOB_CANCELLED,
                       QV_JOB_FAILED, QV_JOB_PARKED, NEVER},
    [QV_JOB_DISPATCHED] = {NEVER, QV_JOB_STREAMING, QV_JOB_QUEUED, QV_JOB_DONE, QV_JOB_CANCELLED,
                           QV_JOB_FAILED, QV_JOB_PARKED, NEVER},
    [QV_JOB_STREAMING] = {NEVER, QV_JOB_STREAMING, QV_JOB_QUEUED, QV_JOB_DONE, QV_JOB_CANCELLED,
                          QV_JOB_FAILED, QV_JOB_PARKED, NEVER},
    [QV_JOB_PARKED] = {NEVER, NEVER, NEVER, QV_JOB_DONE, QV_JOB_CANCELLED, QV_JOB_FAILED, NEVER,
                       QV_JOB_QUEUED},
    [QV_JOB_DONE] = {NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER},
    [QV_JOB_FAILED] = {NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER},
    [QV_JOB_CANCELLED] = {NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER},
};

static const char *const state_names[QV_JOB_STATE_COUNT] = {
    [QV_JOB_QUEUED] = "queued",       [QV_JOB_DISPATCHED] = "dispatched",
    [QV_JOB_STREAMING] = "streaming", [QV_JOB_PARKED] = "parked",
    [QV_JOB_DONE] = "done",           [QV_JOB_FAILED] = "failed",
    [QV_JOB_CANCELLED] = "cancelled",
};

const char *qv_job_state_name(qv_job_state state)
{
    return state_names[state];
}

bool qv_job_next(qv_job_state state, qv_job_event event, qv_job_state *next)
{
    unsigned char to = transitions[state][event];
    if (to == NEVER)
        return false;
    *next = to;
    return true;
}

static bool is_running(qv_job_state state)
{
    return state == QV_JOB_DISPATCHED || state == QV_JOB_STREAMING;
}

void qv_job_apply(qv_job *job, qv_job_event event)
{
    qv_job_state next = job->state;
    bool is_allowed = qv_job_next(job->state, event, &next);
    QV_ASSERT(is_allowed);
    int n_running = is_running(next) - is_running(job->state);
    job->requests->n_queued += (next == QV_JOB_QUEUED) - (job->state == QV_JOB_QUEUED);
    job->requests->n_running += n_running;
    int n_parked = (next == QV_JOB_PARKED) - (job->state == QV_JOB_PARKED);
    job->requests->n_parked += n_parked;
    job->tenant->n_parked += n_parked;
    if (n_running != 0)
        qv_fair_running(job, n_running);
    job->state = next;
}

/* --- Table ------------------------------------------------------------------------------------*/

static bool timer_before(const void *a, const void *b)
{
    const qv_job *x = a, *y = b;
    return x->timer_us < y->timer_us;
}

qv_status qv_requests_init(qv_requests *requests, const qv_requests_limits *limits)
{
    *requests = (qv_requests){.limits = *limits, .next_attempt = 1, .next_serial = 1};
    qv_heap_init(&requests->timers, offsetof(qv_job, timer_place), timer_before);
    qv_list_init(&requests->dead);
    qv_list_init(&requests->orphans);
    requests->by_id = qv_map_new(0);
    requests->by_name = qv_map_new(0);
    if (requests->by_id == NULL || requests->by_name == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for requests");
    return qv_fair_init(&requests->fair);
}

void qv_requests_deinit(qv_requests *requests)
{
    if (requests->by_id == NULL)
        return;
    QV_MAP_EACH(requests->by_id, entry)
    qv_job_end(entry->value, QV_JOB_FAIL, 0);
    qv_requests_bury(requests);
    QV_LIST_EACH(&requests->orphans, qv_attempt, orphan_link, attempt)
    qv_attempt_free(attempt);
    qv_heap_deinit(&requests->timers);
    qv_map_free(requests->by_id, NULL);
    qv_map_free(requests->by_name, NULL);
    qv_fair_deinit(&requests->fair);
    for (uint32_t i = 0; i < requests->n_slots; i++)
        free(requests->attempts[i]);
    free(requests->attempts);
    free(requests->free_slots);
    *requests = (qv_requests){0};
}

/* --- Accepting --------------------------------------------------------------------------------*/

typedef struct {
    unsigned char bytes[sizeof(uint64_t) + QV_JOB_ID_MAX];
    size_t size;
} id_key;

static id_key make_key(uint64_t serial, const char *id, size_t size)
{
    id_key key;
    size_t n = size < QV_JOB_ID_MAX ? size : QV_JOB_ID_MAX;
    memcpy(key.bytes, &serial, sizeof serial);
    memcpy(key.bytes + sizeof serial, id, n);
    key.size = sizeof serial + n;
    return key;
}

/* Jobs without a client may have the same id: there their own serial stands for it. */
static id_key job_key(const qv_job *job, const qv_caller *caller)
{
    return caller->serial != 0 ? make_key(caller->serial, job->id, job->id_size)
                               : make_key(0, (const char *)&job->serial, sizeof job->serial);
}

qv_job_name qv_job_name_of(qv_str tenant, qv_str id)
{
    qv_job_name key;
    size_t n = tenant.size < QV_TENANT_MAX_NAME ? tenant.size : QV_TENANT_MAX_NAME;
    size_t m = id.size < QV_JOB_ID_MAX ? id.size : QV_JOB_ID_MAX;
    if (n > 0)
        memcpy(key.bytes, tenant.data, n);
    key.bytes[n] = '\0';
    memcpy(key.bytes + n + 1, id.data, m);
    key.size = n + 1 + m;
    return key;
}

static qv_job_name job_name(const qv_job *job)
{
    return qv_job_name_of((qv_str){job->owner, job->owner_size}, (qv_str){job->id, job->id_size});
}

/* Errors: NOMEM. */
static qv_status link_name(qv_job *job)
{
    qv_job_name key = job_name(job);
    qv_map_entry *entry = qv_map_require(job->requests->by_name, key.bytes, key.size);
    if (entry == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a request");
    job->name_next = entry->value;
    if (job->name_next != NULL)
        job->name_next->name_prev = job;
    entry->value = job;
    return QV_OK;
}

static void unlink_name(qv_job *job)
{
    if (job->name_next != NULL)
        job->name_next->name_prev = job->name_prev;
    if (job->name_prev != NULL) {
        job->name_prev->name_next = job->name_next;
        return;
    }
    qv_job_name key = job_name(job);
    qv_map_entry *entry = qv_map_find(job->requests->by_name, key.bytes, key.size);
    if (entry == NULL || entry->value != job)
        return;
    if (job->name_next != NULL)
        entry->value = job->name_next;
    else
        qv_map_remove_entry(job->requests->by_name, entry);
}

static qv_status check_limits(const qv_requests *requests, const qv_caller *caller,
                              const qv_group *group, const qv_tenant *tenant, int64_t bytes)
{
    const qv_requests_limits *limits = &requests->limits;
    if (bytes > limits->max_client_bytes || bytes > limits->max_bytes)
        return qv_fail(QV_ERR_LIMIT, "the request needs %lld bytes, a client may have %lld",
                       (long long)bytes, (long long)limits->max_client_bytes);
    if (caller->n_jobs >= limits->max_client_requests)
        return qv_fail(QV_ERR_BUSY, "the client has %lld requests in flight, the limit",
                       (long long)caller->n_jobs);
    if (caller->bytes + bytes > limits->max_client_bytes)
        return qv_fail(QV_ERR_BUSY, "the client's requests hold %lld bytes, the limit is %lld",
                       (long long)caller->bytes, (long long)limits->max_client_bytes);
    if (requests->n_queued >= limits->max_queued)
        return qv_fail(QV_ERR_BUSY, "the queue is full: %lld requests wait",
                       (long long)requests->n_queued);
    QV_TRY(qv_tenant_check(tenant));
    if (group->n_queued >= limits->max_queued_per_adapter)
        return qv_fail(QV_ERR_BUSY, "the queue of %s%s is full: %u requests wait",
                       group->name_size ? "adapter " : "the base model", group->name,
                       group->n_queued);
    if (requests->bytes + bytes > limits->max_bytes)
        return qv_fail(QV_ERR_BUSY, "requests hold %lld bytes, the limit is %lld",
                       (long long)requests->bytes, (long long)limits->max_bytes);
    return QV_OK;
}

static qv_job *new_job(const qv_msg_submit *submit, const void *data, size_t size)
{
    uint32_t n = (uint32_t)submit->n;
    qv_job *job = malloc(sizeof *job + size);
    if (job == NULL)
        return NULL;
    memset(job, 0, sizeof *job);
    job->streams = n > 1 ? calloc(n, sizeof *job->streams) : &job->one;
    if (job->streams == NULL) {
        free(job);
        return NULL;
    }
    job->n = n;
    job->stream = submit->stream;
    job->priority = (int32_t)submit->priority;
    job->timer_place = job->queue_place = QV_HEAP_NONE;
    job->id_size = (uint8_t)submit->id.size;
    memcpy(job->id, submit->id.data, submit->id.size);
    job->submit_size = size;
    memcpy(job->submit, data, size);
    return job;
}

static void free_job(qv_job *job)
{
    for (uint32_t i = 0; i < job->n; i++) {
        qv_job_stream *stream = &job->streams[i];
        qv_answer_deinit(&stream->answer);
        free(stream->prior);
        free(stream->bounds);
        free(stream->done);
        free(stream->prompt_logprobs.data);
        free(stream->prompt_top_logprobs.start);
        free(stream->prompt_top_logprobs.token);
        free(stream->prompt_top_logprobs.logprob);
    }
    if (job->streams != &job->one)
        free(job->streams);
    free(job->warnings.data);
    free(job->error);
    free(job);
}

/* A submit that goes on where another broker stopped: what that one delivered. Errors: NOMEM. */
static qv_status set_prior(qv_job *job, const qv_msg_submit *submit)
{
    for (uint32_t i = 0; i < job->n; i++)
        job->streams[i].have = -1;
    for (uint32_t i = 0; i < submit->resume.count; i++) {
        const qv_msg_resume *row = &submit->resume.data[i];
        qv_job_stream *stream = &job->streams[row->index];
        stream->seq_in = stream->seq_out = stream->base_seq = row->seq;
        stream->have = row->seq - 1;
        stream->n_tokens = row->tokens.count;
        stream->finished = row->finished;
        job->n_finished += row->finished;
        stream->n_prior = row->tokens.count;
        stream->prior = malloc((row->tokens.count + 1) * sizeof *stream->prior);
        if (stream->prior == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for %u tokens", row->tokens.count);
        if (row->tokens.count > 0)
            memcpy(stream->prior, row->tokens.data, row->tokens.count * sizeof *stream->prior);
    }
    return QV_OK;
}

qv_status qv_requests_accept(qv_requests *requests, qv_caller *caller, qv_group *group,
                             qv_tenant *tenant, const qv_msg_submit *submit, const void *data,
                             size_t size, uint64_t seed, uint64_t now_us, qv_job **out)
{
    id_key key = make_key(caller->serial, submit->id.data, submit->id.size);
    if (caller->serial != 0 && qv_map_find(requests->by_id, key.bytes, key.size) != NULL)
        return qv_fail(QV_ERR_EXISTS, "id '%.*s' is in flight already", (int)submit->id.size,
                       submit->id.data);
    int64_t bytes = (int64_t)(sizeof(qv_job) + size +
                              (size_t)(submit->n > 1 ? submit->n : 0) * sizeof(qv_job_stream));
    QV_TRY(check_limits(requests, caller, group, tenant, bytes));
    qv_job *job = new_job(submit, data, size);
    if (job != NULL) {
        job->requests = requests;
        job->serial = requests->next_serial++;
        job->owner_size = (uint8_t)submit->tenant.size;
        if (submit->tenant.size > 0)
            memcpy(job->owner, submit->tenant.data, submit->tenant.size);
        key = job_key(job, caller);
    }
    qv_map_entry *entry = job != NULL ? qv_map_require(requests->by_id, key.bytes, key.size) : NULL;
    if (entry == NULL || set_prior(job, submit) != QV_OK || link_name(job) != QV_OK) {
        if (entry != NULL)
            qv_map_remove_entry(requests->by_id, entry);
        if (job != NULL)
            free_job(job);
        return qv_fail(QV_ERR_NOMEM, "no memory for a request of %zu bytes", size);
    }
    entry->value = job;
    job->entry = entry;
    job->caller = caller;
    job->group = group;
    job->tenant = tenant;
    job->rank_us = (int64_t)now_us - job->priority * QV_FAIR_PRIORITY_US;
    job->seed = qv_has(submit, submit, seed) ? submit->seed : seed;
    job->received_us = now_us;
    if (qv_has(submit, submit, deadline_ms))
        job->deadline_us = now_us + (uint64_t)submit->deadline_ms * 1000;
    job->bytes = (size_t)bytes;
    if (submit->resume.count > 0 && submit->digest.size > 0) {
        job->held = true;
        memcpy(job->digest, submit->digest.data, submit->digest.size);
    }
    for (uint32_t i = 0; i < job->n; i++)
        qv_answer_init(&job->streams[i].answer, (size_t)requests->limits.max_answer_bytes);
    qv_list_append(&caller->jobs, &job->caller_link);
    caller->n_jobs++;
    caller->bytes += bytes;
    requests->bytes += bytes;
    requests->n_queued++;
    group->n_jobs++;
    group->used_us = now_us;
    *out = job;
    return QV_OK;
}

qv_job *qv_requests_find(const qv_requests *requests, const qv_caller *caller, const char *id,
                         size_t size)
{
    id_key key = make_key(caller->serial, id, size);
    return qv_map_get(requests->by_id, key.bytes, key.size);
}

qv_job *qv_requests_find_any(const qv_requests *requests, const char *tenant, const char *id,
                             size_t size)
{
    qv_job *found = NULL;
    QV_MAP_EACH(requests->by_id, entry)
    {
        qv_job *job = entry->value;
        if (job->id_size != size || memcmp(job->id, id, size) != 0 ||
            (tenant != NULL && strcmp(tenant, job->owner) != 0))
            continue;
        if (found != NULL)
            return NULL;
        found = job;
    }
    return found;
}

qv_job *qv_requests_find_name(const qv_requests *requests, qv_str tenant, qv_str id)
{
    qv_job_name key = qv_job_name_of(tenant, id);
    return qv_map_get(requests->by_name, key.bytes, key.size);
}

qv_status qv_job_give(qv_job *job, qv_caller *caller)
{
    qv_requests *requests = job->requests;
    if (job->caller == caller)
        return QV_OK;
    id_key key = job_key(job, caller);
    if (qv_map_find(requests->by_id, key.bytes, key.size) != NULL)
        return qv_fail(QV_ERR_EXISTS, "id '%s' is in flight already", job->id);
    qv_map_entry *entry = qv_map_require(requests->by_id, key.bytes, key.size);
    if (entry == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a request");
    entry->value = job;
    qv_map_remove_entry(requests->by_id, job->entry);
    job->entry = entry;
    qv_caller *old = job->caller;
    qv_list_remove(&job->caller_link);
    old->n_jobs--;
    old->bytes -= (int64_t)job->bytes;
    job->caller = caller;
    qv_list_append(&caller->jobs, &job->caller_link);
    caller->n_jobs++;
    caller->bytes += (int64_t)job->bytes;
    return QV_OK;
}

qv_status qv_job_note_bound(qv_job *job, qv_job_stream *stream, bool joined)
{
    const qv_answer *answer = &stream->answer;
    qv_bound bound = {(uint32_t)answer->n_tokens, (uint32_t)answer->text_size};
    if (joined && stream->n_bounds > 0) {
        stream->bounds[stream->n_bounds - 1] = bound;
        return QV_OK;
    }
    if (stream->n_bounds == stream->bounds_capacity) {
        uint32_t capacity = stream->bounds_capacity > 0 ? 2 * stream->bounds_capacity : 4;
        QV_TRY(qv_job_grow(job, (capacity - stream->bounds_capacity) * sizeof bound));
        qv_bound *grown = realloc(stream->bounds, capacity * sizeof *grown);
        if (grown == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for the messages of an answer");
        stream->bounds = grown;
        stream->bounds_capacity = capacity;
    }
    stream->bounds[stream->n_bounds++] = bound;
    return QV_OK;
}

/* --- Life -------------------------------------------------------------------------------------*/

qv_status qv_job_enqueue(qv_job *job)
{
    QV_ASSERT(job->state == QV_JOB_QUEUED);
    return qv_fair_push(&job->requests->fair, job);
}

void qv_job_dequeue(qv_job *job)
{
    qv_fair_remove(&job->requests->fair, job);
}

qv_status qv_job_set_timer(qv_job *job, uint64_t at_us)
{
    if (job->timer_us == at_us)
        return QV_OK;
    qv_heap_remove(&job->requests->timers, job);
    job->timer_us = at_us;
    return at_us != 0 ? qv_heap_push(&job->requests->timers, job) : QV_OK;
}

void qv_job_end(qv_job *job, qv_job_event how, uint64_t now_us)
{
    qv_requests *requests = job->requests;
    qv_job_dequeue(job);
    qv_job_apply(job, how);
    qv_heap_remove(&requests->timers, job);
    job->timer_us = 0;
    qv_map_remove_entry(requests->by_id, job->entry);
    job->entry = NULL;
    unlink_name(job);
    qv_list_remove(&job->caller_link);
    job->caller->n_jobs--;
    job->caller->n_dead++;
    job->caller->bytes -= (int64_t)job->bytes;
    requests->bytes -= (int64_t)job->bytes;
    requests->n_window++;
    if (job->attempt != NULL) {
        if (job->attempt->n_left == 0)
            qv_attempt_free(job->attempt);
        else
            qv_attempt_orphan(job->attempt, now_us);
    }
    qv_group *group = job->group;
    if (--group->n_jobs == 0 && (group->deleted || qv_group_is_idle(group)))
        qv_group_touch(group);
    qv_list_append(&requests->dead, &job->dead_link);
}

void qv_requests_bury(qv_requests *requests)
{
    QV_LIST_EACH(&requests->dead, qv_job, dead_link, job)
    {
        qv_list_remove(&job->dead_link);
        job->caller->n_dead--;
        qv_caller_release(job->caller);
        free_job(job);
    }
}

qv_status qv_job_grow(qv_job *job, size_t bytes)
{
    qv_requests *requests = job->requests;
    if (requests->bytes + (int64_t)bytes > requests->limits.max_bytes)
        return qv_fail(QV_ERR_BUSY, "requests hold %lld bytes, the limit is %lld",
                       (long long)requests->bytes, (long long)requests->limits.max_bytes);
    job->bytes += bytes;
    job->caller->bytes += (int64_t)bytes;
    requests->bytes += (int64_t)bytes;
    return QV_OK;
}

/* --- Attempts ---------------------------------------------------------------------------------*/

static qv_status grow_slots(qv_requests *requests)
{
    uint32_t n = requests->n_slots ? requests->n_slots * 2 : 256;
    if (n > SLOT_MASK)
        return qv_fail(QV_ERR_LIMIT, "%u attempts run at once, the limit", requests->n_slots);
    qv_attempt **attempts = realloc(requests->attempts, n * sizeof *attempts);
    if (attempts != NULL)
        requests->attempts = attempts;
    uint32_t *slots = realloc(requests->free_slots, n * sizeof *slots);
    if (slots != NULL)
        requests->free_slots = slots;
    if (attempts == NULL || slots == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for %u attempts", n);
    for (uint32_t i = requests->n_slots; i < n; i++) {
        attempts[i] = malloc(sizeof *attempts[i]);
        if (attempts[i] == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for %u attempts", n);
        *attempts[i] = (qv_attempt){.requests = requests, .slot = i};
        slots[requests->n_free++] = i;
        requests->n_slots++;
    }
    return QV_OK;
}

qv_status qv_attempt_new(qv_job *job, qv_member *member, uint64_t now_us, qv_attempt **out)
{
    qv_requests *requests = job->requests;
    QV_ASSERT(job->attempt == NULL && qv_member_credit(member) > 0);
    if (requests->n_free == 0)
        QV_TRY(grow_slots(requests));
    qv_attempt *attempt = requests->attempts[requests->free_slots[--requests->n_free]];
    attempt->number = requests->next_attempt++ << SLOT_BITS | attempt->slot;
    attempt->job = job;
    attempt->member = member;
    attempt->active_us = attempt->sent_us = now_us;
    for (uint32_t i = 0; i < job->n; i++)
        attempt->finished |= (uint64_t)job->streams[i].finished << i;
    attempt->n_left = job->n - job->n_finished;
    attempt->alone = job->alone;
    member->n_alone += job->alone;
    qv_list_append(&member->attempts, &attempt->member_link);
    qv_member_add_attempt(member, 1);
    member->n_dispatched++;
    job->attempt = attempt;
    *out = attempt;
    return QV_OK;
}

qv_attempt *qv_requests_find_attempt(const qv_requests *requests, uint64_t number)
{
    uint64_t slot = number & SLOT_MASK;
    qv_attempt *attempt = slot < requests->n_slots ? requests->attempts[slot] : NULL;
    return attempt != NULL && number != 0 && attempt->number == number ? attempt : NULL;
}

void qv_attempt_orphan(qv_attempt *attempt, uint64_t now_us)
{
    qv_requests *requests = attempt->requests;
    attempt->job->attempt = NULL;
    attempt->job = NULL;
    attempt->orphan_us = now_us;
    qv_list_append(&requests->orphans, &attempt->orphan_link);
    requests->n_orphans++;
}

void qv_attempt_free(qv_attempt *attempt)
{
    qv_requests *requests = attempt->requests;
    if (attempt->job != NULL)
        attempt->job->attempt = NULL;
    else
        requests->n_orphans--;
    qv_list_remove(&attempt->orphan_link);
    qv_list_remove(&attempt->member_link);
    attempt->member->work -= attempt->work;
    if (attempt->alone) {
        attempt->member->n_alone--;
        qv_member_wake(attempt->member);
    }
    qv_member_add_attempt(attempt->member, -1);
    if (attempt->member->n_attempts == 0)
        attempt->member->work = 0; /* sums of floats drift */
    *attempt = (qv_attempt){.requests = requests, .slot = attempt->slot};
    requests->free_slots[requests->n_free++] = attempt->slot;
}

/* --- Views ------------------------------------------------------------------------------------*/

int64_t qv_requests_retry_ms(const qv_requests *requests)
{
    if (requests->per_second <= 0)
        return 1000;
    double ms = 1000.0 * (double)(requests->n_queued + 1) / requests->per_second;
    return ms < 100 ? 100 : ms > 30000 ? 30000 : (int64_t)ms;
}

void qv_requests_tick(qv_requests *requests, uint64_t now_us)
{
    uint64_t elapsed_us = now_us - requests->window_us;
    if (requests->window_us != 0 && elapsed_us < 1000000)
        return;
    if (requests->window_us != 0) {
        double rate = (double)requests->n_window * 1e6 / (double)elapsed_us;
        requests->per_second += 0.3 * (rate - requests->per_second);
    }
    requests->window_us = now_us;
    requests->n_window = 0;
}
