/* What the parts of the core share:
 *
 *   core.c          life, dispatch, timers, what is lost
 *   core_client.c   messages of clients
 *   core_worker.c   messages of workers
 *   core_deliver.c  what clients are told, and how requests end
 *   core_resume.c   clients that are slow, gone or back; requests that may not run now
 *   core_durable.c  requests that are kept in Redis
 *   core_poison.c   requests under which workers die
 *   core_status.c   `status`, and the checks
 *   core_explain.c  `explain`, and estimates
 *
 * An event may find out in its middle that a client or a worker is gone. That is only noted then,
 * and acted on in qv_core_settle, which ends every event; and what has ended stays readable until
 * that.
 */
#ifndef QV_BROKER_CORE_INTERNAL_H
#define QV_BROKER_CORE_INTERNAL_H

#include "broker/core.h"
#include "broker/explain.h"
#include "broker/measure.h"

#define QV_MS UINT64_C(1000) /* of our time unit */

#define QV_CORE_LOSSES 64

struct qv_core {
    qv_core_options options;
    qv_core_actions actions;
    qv_core_stats stats;
    qv_pool pool;
    qv_requests requests;
    qv_callers callers;
    qv_keep keep;
    qv_map *poison; /* fingerprints */
    struct {
        char worker[QV_POOL_ID_MAX + 1];
        int64_t instance;
        uint64_t epoch;
    } losses[QV_CORE_LOSSES]; /* sessions of workers that were lost, the last ones in turns */
    size_t n_lost;            /* ever */
    const qv_identity *sender;
    qv_placement placement;
    qv_explain explain;
    qv_arena arena;  /* of the event at hand */
    qv_list lost;    /* members to take out */
    uint64_t random; /* state of the generator */
    uint64_t started_us, ticked_us;
    uint64_t placed_us; /* placement's last tick */
    uint64_t second_us; /* of what happens once a second */
    bool draining;
    bool drain_ordered; /* of this broker, by people */
    qv_map *drains;     /* ids of workers and brokers that people want drained */
    bool wants_known;
    char *redis; /* owned */
};

/* --- core.c -----------------------------------------------------------------------------------*/

/* End an event: act on what was lost, reconcile, dispatch, free what ended. */
void qv_core_settle(qv_core *core, uint64_t now_us);

/* What people want of a member that has just been welcomed. */
void qv_core_apply_orders(qv_core *core, qv_member *member, uint64_t now_us);

uint64_t qv_core_random(qv_core *core);
void qv_core_event(qv_core *core, const char *what, const char *adapter, const char *worker,
                   const char *why);

/* Send to a member; one that cannot be reached is noted as lost. False then. */
bool qv_core_tell(qv_core *core, qv_member *member, const qv_message *message, uint64_t now_us);

/* Note that a member is lost. `why` is a literal. */
void qv_core_note_lost(qv_core *core, qv_member *member, const char *why);

/* Take a member out now: its requests go on elsewhere. `is_loss` counts against them. Not while a
 * list of its attempts or residents is walked. */
void qv_core_remove_member(qv_core *core, qv_member *member, const char *what, const char *why,
                           bool is_loss, uint64_t now_us);

/* The attempt of a running job is of no use: abort it if need be and go on elsewhere from what was
 * delivered. `is_loss` counts it among the lost workers, of which a job survives only so many. */
void qv_core_retry(qv_core *core, qv_job *job, bool is_loss, uint64_t now_us);

/* --- core_resume.c ----------------------------------------------------------------------------*/

/* Stop a job that has not ended until something happens, or until until_us (0 = never); what it
 * delivered stays. */
void qv_core_park(qv_core *core, qv_job *job, qv_job_park why, uint64_t until_us, uint64_t now_us);
void qv_core_unpark(qv_core *core, qv_job *job, uint64_t now_us);
void qv_core_on_parked_timer(qv_core *core, qv_job *job, uint64_t now_us);

/* A new job goes to its queue, unless its client must read first. */
void qv_core_begin_queue(qv_core *core, qv_job *job, uint64_t now_us);

/* A caller in callers->flow is choked, has room again, or is stalled. */
void qv_core_on_flow(qv_core *core, qv_caller *caller, uint64_t now_us);

/* The jobs of a caller that is gone: dropped, or kept for its return. */
void qv_core_lose_client(qv_core *core, qv_caller *caller, uint64_t now_us);

/* The last seq of a stream that a client says it has; -1 = none. */
int64_t qv_core_have(const qv_msg_resume_request *request, uint32_t index);

/* Give a job to a client that comes for it, and tell it again what it does not have. */
void qv_core_attach(qv_core *core, const qv_mq_peer *peer, qv_job *job,
                    const qv_msg_resume_request *request, uint64_t now_us);
void qv_core_replay_kept(qv_core *core, const qv_mq_peer *peer, const qv_kept *kept,
                         const qv_msg_resume_request *request, uint64_t now_us);
void qv_core_on_resume(qv_core *core, const qv_mq_peer *peer, const qv_msg_resume_request *request,
                       uint64_t now_us);

/* There is no such request here; `broker` (may be NULL) is where it is. */
void qv_core_refuse_unknown(qv_core *core, const qv_mq_peer *peer, qv_str id, const char *broker,
                            uint64_t now_us);

/* --- core_durable.c ---------------------------------------------------------------------------*/

/* Write a new job to Redis; it is accepted when that has succeeded. */
void qv_core_begin_store(qv_core *core, qv_job *job, uint64_t now_us);

/* A job has ended: store what it delivered, if it is durable. */
void qv_core_end_durable(qv_core *core, qv_job *job);

qv_job *qv_core_find_durable(const qv_core *core, qv_str tenant, qv_str id);

/* core_client.c: say `accepted`; and take a stored job in again. */
bool qv_core_tell_accepted(qv_core *core, qv_job *job, const qv_strs *warnings, uint64_t now_us);
qv_status qv_core_readmit(qv_core *core, const qv_msg_submit *submit, const qv_durable *durable,
                          uint64_t age_ms, uint64_t now_us);

/* --- core_poison.c ----------------------------------------------------------------------------*/

/* Whether this is quarantined; its fingerprint. */
bool qv_core_is_poison(qv_core *core, const qv_msg_submit *submit,
                       char fingerprint[QV_FINGERPRINT_SIZE]);

/* Jobs on a member for which its loss would be one too many. */
uint32_t qv_core_count_suspects(const qv_core *core, const qv_member *member);

/* Note that a member was lost, and under which job. */
void qv_core_note_loss(qv_core *core, const qv_member *member);
void qv_core_blame(qv_job *job, const qv_member *member);

/* A process registers: if it was thought dead, its requests did not kill it, and its loss is not
 * held against them any more. */
void qv_core_acquit(qv_core *core, const char *worker, int64_t instance);

/* Whether a job that has just lost a worker may run again, having shared it with so many suspects
 * (itself included). */
bool qv_core_may_go_on(const qv_core *core, qv_job *job, uint32_t n_suspects);

void qv_core_quarantine(qv_core *core, qv_job *job, uint64_t now_us);

/* Where a suspect may run instead of on the member that was chosen; NULL: nowhere now. */
qv_member *qv_core_place_alone(qv_core *core, const qv_job *job, qv_member *chosen);

/* --- core_deliver.c ---------------------------------------------------------------------------*/

/* An `error` to a peer; `id` may be empty. retry_ms 0 = leave out. */
void qv_core_refuse(qv_core *core, const qv_mq_peer *peer, qv_str id, qv_code code,
                    const char *text, int64_t retry_ms, uint64_t now_us);

qv_message qv_core_make_error(qv_core *core, qv_str id, qv_code code, const char *text,
                              int64_t retry_ms);

/* Answer a peer outside of any request. */
void qv_core_reply(qv_core *core, const qv_mq_peer *peer, const qv_message *message,
                   uint64_t now_us);

/* Send a message of a job. False: the job has ended, or will with its client. */
bool qv_core_deliver(qv_core *core, qv_job *job, const qv_message *message, bool must,
                     uint64_t now_us, bool *joined);

/* End a job with an `error`. */
void qv_core_fail_job(qv_core *core, qv_job *job, qv_code code, const char *text, int64_t retry_ms,
                      uint64_t now_us);

/* End a stream with a `done`; `delta` (may be NULL) is what the worker said. The job ends with its
 * last stream. False: the job has ended. */
bool qv_core_finish_stream(qv_core *core, qv_job *job, uint32_t index, qv_str reason,
                           const qv_msg_delta *delta, uint64_t now_us);

/* End every stream that has not ended, for the reason the job is aborted for. */
void qv_core_finish_aborted(qv_core *core, qv_job *job, uint64_t now_us);

/* Ask the worker of a running job to stop it. */
void qv_core_abort(qv_core *core, qv_job *job, const char *reason, uint64_t now_us);

/* Start to end a job for this reason: at once if it is queued, through its worker if it runs. */
void qv_core_begin_abort(qv_core *core, qv_job *job, qv_job_abort reason, uint64_t now_us);

/* Whether some of the answer was delivered. */
bool qv_job_has_begun(const qv_job *job);

/* --- the rest ---------------------------------------------------------------------------------*/

/* Handlers, without the settling. */
void qv_core_handle_client(qv_core *core, const qv_mq_peer *peer, qv_message *message,
                           const void *data, size_t size, uint64_t now_us);
void qv_core_handle_worker(qv_core *core, const qv_mq_peer *peer, const qv_message *message,
                           uint64_t now_us);

/* How much a job will cost, from what was measured so far. */
void qv_core_estimate(qv_core *core, qv_job *job, const qv_msg_submit *submit, qv_str adapter);

/* A waiting job will not begin before its deadline, as far as can be told: the sentence for its
 * client, and when to try again. NULL: it may. */
const char *qv_core_is_hopeless(qv_core *core, const qv_job *job, int64_t *retry_ms,
                                uint64_t now_us);

/* Fill `explain` from the arena. Errors: NOMEM. */
qv_status qv_core_fill_explain(qv_core *core, const qv_explain_record *record, qv_msg_explain *out,
                               uint64_t now_us);

/* Fill `status` from the arena. Errors: NOMEM. */
qv_status qv_core_fill_status(qv_core *core, qv_msg_status *out, uint64_t now_us);

#endif
