/* Poison: requests under which workers die. One that two workers were lost under is quarantined: it
 * ends, and what asks for the same is refused until people clear it in Redis.
 *
 * A lost worker says little about which of its requests did it. So where several could be to blame
 * for a second loss, each of them next runs on a worker without the others, and the one that loses
 * that worker too is it.
 *
 * A worker may also be lost because the network was, or because its machine was too busy to speak.
 * It is the same process then that registers again, and its loss is taken back from the requests
 * that it ran, but not for ever: one that only hangs workers for a while is found as well. */
#include "broker/core_internal.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define MAX_POISON    4096
#define MAX_TOGETHER  4 /* losses beyond the bound that a request may share with others */
#define MAX_ACQUITTED 8 /* losses that are taken back from one request */

/* --- Fingerprints -----------------------------------------------------------------------------*/

/* What makes a worker do what it does: not who asks, how it is delivered and when. */
static qv_status fingerprint_of(qv_core *core, const qv_msg_submit *submit,
                                char out[QV_FINGERPRINT_SIZE])
{
    qv_message message = {.type = QV_MSG_SUBMIT, .submit = *submit};
    qv_msg_submit *copy = &message.submit;
    const void *data;
    size_t size;
    qv_set(copy, submit, id, qv_str_from("-"));
    copy->has &= ~(UINT64_C(1) << QV_BIT_submit_tenant | UINT64_C(1) << QV_BIT_submit_priority |
                   UINT64_C(1) << QV_BIT_submit_deadline_ms | UINT64_C(1) << QV_BIT_submit_seed |
                   UINT64_C(1) << QV_BIT_submit_durable | UINT64_C(1) << QV_BIT_submit_resume |
                   UINT64_C(1) << QV_BIT_submit_stream);
    QV_TRY(qv_message_encode(&message, &core->arena, &data, &size));
    XXH128_hash_t hash = XXH3_128bits(data, size);
    snprintf(out, QV_FINGERPRINT_SIZE, "%016llx%016llx", (unsigned long long)hash.high64,
             (unsigned long long)hash.low64);
    return QV_OK;
}

bool qv_core_is_poison(qv_core *core, const qv_msg_submit *submit,
                       char fingerprint[QV_FINGERPRINT_SIZE])
{
    return qv_map_count(core->poison) > 0 && fingerprint_of(core, submit, fingerprint) == QV_OK &&
           qv_map_get_str(core->poison, fingerprint) != NULL;
}

void qv_core_poison(qv_core *core, const char *fingerprint, bool present, uint64_t now_us)
{
    (void)now_us;
    if (!present)
        qv_map_remove_str(core->poison, fingerprint);
    else if (qv_map_count(core->poison) < MAX_POISON &&
             qv_map_set_str(core->poison, fingerprint, core) != QV_OK)
        qv_core_event(core, "quarantine_ignored", NULL, NULL, qv_error());
}

/* --- Blame ------------------------------------------------------------------------------------*/

uint32_t qv_core_count_suspects(const qv_core *core, const qv_member *member)
{
    uint32_t n = 0;
    QV_LIST_EACH(&member->attempts, qv_attempt, member_link, attempt)
    n += attempt->job != NULL && attempt->job->abort == QV_ABORT_NONE &&
         (int64_t)attempt->job->n_losses + 1 >= core->options.max_worker_losses;
    return n;
}

bool qv_core_may_go_on(const qv_core *core, qv_job *job, uint32_t n_suspects)
{
    if ((int64_t)job->n_losses < core->options.max_worker_losses)
        return true;
    if (n_suspects <= 1 || (int64_t)job->n_losses >= core->options.max_worker_losses + MAX_TOGETHER)
        return false;
    job->alone = true;
    return true;
}

static void note_killed(qv_job *job, const char *worker)
{
    size_t used = strlen(job->killed);
    snprintf(job->killed + used, sizeof job->killed - used, "%s%s", used > 0 ? " " : "", worker);
}

void qv_core_blame(qv_job *job, const qv_member *member)
{
    note_killed(job, member->id);
    job->blamed[1] = job->blamed[0];
    job->blamed[0] = member->epoch;
}

void qv_core_note_loss(qv_core *core, const qv_member *member)
{
    size_t row = core->n_lost++ % QV_CORE_LOSSES;
    snprintf(core->losses[row].worker, sizeof core->losses[row].worker, "%s", member->id);
    core->losses[row].instance = member->instance;
    core->losses[row].epoch = member->epoch;
}

/* The worker's name is no longer among those that a job is said to have killed. */
static void forget_killed(qv_job *job, const char *worker)
{
    size_t size = strlen(worker);
    for (char *at = job->killed; (at = strstr(at, worker)) != NULL; at += size) {
        bool begins = at == job->killed || at[-1] == ' ';
        if (!begins || (at[size] != ' ' && at[size] != '\0'))
            continue;
        char *rest = at[size] == ' ' ? at + size + 1 : at + size;
        if (*rest == '\0' && at > job->killed)
            at--; /* the blank before it */
        memmove(at, rest, strlen(rest) + 1);
        return;
    }
}

static bool acquit_of(qv_core *core, qv_job *job, const char *worker, uint64_t epoch)
{
    for (size_t i = 0; i < 2; i++) {
        if (job->blamed[i] != epoch || job->n_losses == 0 || job->n_acquitted == MAX_ACQUITTED)
            continue;
        job->blamed[i] = 0;
        job->n_acquitted++;
        job->n_losses--;
        job->alone = job->alone && (int64_t)job->n_losses >= core->options.max_worker_losses;
        forget_killed(job, worker);
        return true;
    }
    return false;
}

void qv_core_acquit(qv_core *core, const char *worker, int64_t instance)
{
    size_t n = 0;
    for (size_t i = 0; instance != 0 && i < QV_CORE_LOSSES; i++) {
        if (core->losses[i].instance != instance || strcmp(core->losses[i].worker, worker) != 0)
            continue;
        core->losses[i].instance = 0;
        QV_MAP_EACH(core->requests.by_id, entry)
        n += acquit_of(core, entry->value, worker, core->losses[i].epoch);
    }
    if (n == 0)
        return;
    char text[96];
    snprintf(text, sizeof text, "it lives: its loss is not held against %zu requests", n);
    qv_core_event(core, "worker_alive", NULL, worker, text);
}

void qv_core_quarantine(qv_core *core, qv_job *job, uint64_t now_us)
{
    qv_message message = {0};
    char fingerprint[QV_FINGERPRINT_SIZE] = "";
    if (qv_message_decode(job->submit, job->submit_size, QV_FROM_CLIENT, &qv_callers_own_limits,
                          &core->arena, &message) == QV_OK &&
        fingerprint_of(core, &message.submit, fingerprint) == QV_OK) {
        qv_core_poison(core, fingerprint, true, now_us);
        const qv_poison poison = {.fingerprint = fingerprint,
                                  .id = job->id,
                                  .tenant = job->owner,
                                  .adapter = job->group->name,
                                  .workers = job->killed,
                                  .n_losses = job->n_losses};
        if (core->actions.quarantine != NULL)
            core->actions.quarantine(core->actions.user, &poison);
    }
    core->stats.quarantined++;
    char text[512];
    snprintf(text, sizeof text,
             "%u workers were lost while they ran this request (%s): it is quarantined as %s",
             job->n_losses, job->killed, fingerprint);
    qv_core_event(core, "request_quarantined", job->group->name, NULL, text);
    qv_core_fail_job(core, job, QV_CODE_QUARANTINED, text, 0, now_us);
}

/* Where a suspect may run: a member without another. NULL: it has to wait. */
qv_member *qv_core_place_alone(qv_core *core, const qv_job *job, qv_member *chosen)
{
    if (chosen->n_alone == 0)
        return chosen;
    QV_LIST_EACH(&core->pool.members, qv_member, link, member)
    {
        bool holds = job->group == core->pool.base;
        const qv_resident *resident = holds ? NULL : qv_resident_find(job->group, member);
        bool fits = resident != NULL && resident->state == QV_RESIDENT_READY &&
                    ((!qv_job_has_begun(job) && !job->held) || job->digest[0] == '\0' ||
                     strcmp(job->digest, resident->digest) == 0);
        holds = holds || fits;
        if (holds && member->n_alone == 0 && qv_member_credit(member) > 0)
            return member;
    }
    return NULL;
}
