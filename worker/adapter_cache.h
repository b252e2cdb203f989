/* Adapters by name: which are known, where their content is, and who uses them.
 *
 * A name points at a version, which is one content: a digest, mostly a copy in host memory and,
 * while it is in use or lately was, a slot on the device. Names with the same content share a
 * version. Loading a name again makes it point at another version at once; the old one lives until
 * its last request is done, and no request that comes later gets it.
 *
 * There may be many more versions than slots, and more than host memory holds. A version without a
 * slot gets, when a sequence asks for it, an empty one or the least recently used one that no
 * request wants; a version without a host copy is read again as soon as a request holds it, and
 * must then be what it was. Host copies go in the order of their last use, within a bound in bytes.
 * Nothing of this stops a step: reading runs on reader threads, copying to the device on one more
 * (worker/adapter_loader.h), and sequences of other adapters go on.
 *
 * Two counts: a request holds its version from submit to its end (acquire, release), a running
 * sequence holds the version's slot (enter, leave). A slot is written only while nobody runs on it.
 * Names may pin a version, which then keeps its slot; at least one slot is always left unpinned.
 *
 * Slots are state machines (worker/adapter_slot.h). Everything declared here is the engine
 * thread's.
 */
#ifndef QV_WORKER_ADAPTER_CACHE_H
#define QV_WORKER_ADAPTER_CACHE_H

#include "worker/adapter_loader.h"
#include "worker/adapter_slot.h"
#include "worker/engine.h"

/* --- Life ------------------------------------------------------------------------------------ */

typedef struct qv_adapter_cache qv_adapter_cache;
typedef struct qv_adapter_version qv_adapter_version;

/* Most names at once. One costs some hundred bytes, whatever its adapter. */
#define QV_MAX_ADAPTER_NAMES 16384

typedef struct {
    int32_t n_slots;
    uint64_t host_bytes; /* host copies of all versions, besides files that are being read; an
                          * adapter that needs more alone is not loaded */

    /* A load or unload came to its end: called from load, unload and poll. The event is borrowed
     * during the call. */
    void (*on_event)(void *user, const qv_adapter_event *event);
    void *user;
} qv_adapter_cache_options;

/* Starts the threads. Errors: NOMEM, IO (no thread). */
qv_status qv_adapter_cache_new(const qv_adapter_cache_options *options,
                               const qv_adapter_source *source, qv_adapter_cache **out);

/* Waits for the jobs in hand, then ends the threads. Every request has released its version.
 * free(NULL) is fine. */
void qv_adapter_cache_free(qv_adapter_cache *cache);

/* --- Names ----------------------------------------------------------------------------------- */

/* Load, or load again and replace. Loads of the same path that have not begun become one; one that
 * comes while the files are being read looks at them once more, as they may have changed, and reads
 * them only if they have. With `pin` and too many pinned already, the adapter is loaded and its
 * event says why it is not pinned.
 * Errors: ARG (name), UNSUPPORTED (no slots), LIMIT (too many names), NOMEM. */
qv_status qv_adapter_cache_load(qv_adapter_cache *cache, const char *name, const char *dir,
                                bool pin);

/* Forget a name. Errors: NOT_FOUND. */
qv_status qv_adapter_cache_unload(qv_adapter_cache *cache, const char *name);

/* The state of one name; false: there is no such name. The event is borrowed until the next call.
 */
bool qv_adapter_cache_find(const qv_adapter_cache *cache, const char *name, qv_adapter_event *out);

/* Called once per name, in the order they were first loaded. */
void qv_adapter_cache_each(const qv_adapter_cache *cache,
                           void (*each)(const qv_adapter_event *, void *), void *user);

/* Take in what the loaders finished. *changed: waiting requests and sequences should try again.
 * Errors: DEVICE (a copy to the device failed; fatal). */
qv_status qv_adapter_cache_poll(qv_adapter_cache *cache, bool *changed);

/* Readable when a loader has finished something; true when poll would take something in. */
int qv_adapter_cache_fd(const qv_adapter_cache *cache);
bool qv_adapter_cache_has_results(const qv_adapter_cache *cache);

/* --- Versions -------------------------------------------------------------------------------- */

/* Hold the version that the name points at. Errors, with *code for the client: BUSY (its first load
 * has not ended), NOT_FOUND (no such name), or what its load failed with. */
qv_status qv_adapter_cache_acquire(qv_adapter_cache *cache, qv_str name, qv_adapter_version **out,
                                   qv_code *code);
void qv_adapter_cache_release(qv_adapter_cache *cache, qv_adapter_version *version);

const char *qv_adapter_version_digest(const qv_adapter_version *version);

/* Whether the version can never run any more, with the reason and what to tell clients: it had to
 * be read again, and its files were gone, broken or others. Its requests must be ended. n_lost says
 * how many such versions are held. */
bool qv_adapter_version_is_lost(const qv_adapter_version *version, qv_code *code,
                                const char **reason);
int32_t qv_adapter_cache_n_lost(const qv_adapter_cache *cache);

/* Hold the slot of a version while a sequence runs. Returns the slot, or starts to bring the
 * version into one and returns QV_NO_SLOT_YET, or QV_NO_SLOT_FREE (worker/scheduler.h). `must`: the
 * sequence has waited long, and also a slot that queued requests want may be taken. */
int32_t qv_adapter_cache_enter(qv_adapter_cache *cache, qv_adapter_version *version, bool must);

/* Bring a version that will be entered soon into a slot that no request wants, if there is one.
 * False: there is none, for this version or another. */
bool qv_adapter_cache_prefetch(qv_adapter_cache *cache, qv_adapter_version *version);

void qv_adapter_cache_leave(qv_adapter_cache *cache, qv_adapter_version *version);

/* --- Facts ----------------------------------------------------------------------------------- */

void qv_adapter_cache_get_stats(const qv_adapter_cache *cache, qv_adapter_stats *out);
qv_slot_state qv_adapter_cache_slot_state(const qv_adapter_cache *cache, int32_t slot);
int32_t qv_adapter_cache_n_empty(const qv_adapter_cache *cache); /* slots */

#endif
