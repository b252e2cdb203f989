/* Adapters by name: which are known, which are in a slot of the device, and who uses them.
 *
 * A name points at a version, which is one content: a digest, a copy in host memory and, while it
 * is in use or lately was, a slot on the device. Names with the same content share a version.
 * Loading a name again makes it point at another version at once; the old one lives until its last
 * request is done. There may be more versions than slots: a version without one gets the least
 * recently used slot that nobody runs on, when a sequence asks for it.
 *
 * Two counts: a request holds its version from submit to its end (acquire, release), a running
 * sequence holds the version's slot (enter, leave). A slot is written only while nobody runs on it.
 * Names may pin a version, which then keeps its slot; at least one slot is always left unpinned.
 *
 * Slots are state machines (worker/adapter_slot.h). Reading, checking and copying to the device
 * happen on a loader thread (worker/adapter_loader.h), which this cache owns. Everything declared
 * here is the engine thread's.
 */
#ifndef QV_WORKER_ADAPTER_CACHE_H
#define QV_WORKER_ADAPTER_CACHE_H

#include "worker/adapter_loader.h"
#include "worker/adapter_slot.h"
#include "worker/engine.h"

/* --- Life ------------------------------------------------------------------------------------ */

typedef struct qv_adapter_cache qv_adapter_cache;
typedef struct qv_adapter_version qv_adapter_version;

/* Most names at once. */
#define QV_MAX_ADAPTER_NAMES 4096

typedef struct {
    int32_t n_slots;
    uint64_t host_bytes; /* host copies of all versions; a load beyond it fails */

    /* A load or unload came to its end: called from load, unload and poll. The event is borrowed
     * during the call. */
    void (*on_event)(void *user, const qv_adapter_event *event);
    void *user;
} qv_adapter_cache_options;

/* Starts the loader thread. Errors: NOMEM, IO (no thread). */
qv_status qv_adapter_cache_new(const qv_adapter_cache_options *options,
                               const qv_adapter_source *source, qv_adapter_cache **out);

/* Waits for the job in hand, then ends the thread. Every request has released its version.
 * free(NULL) is fine. */
void qv_adapter_cache_free(qv_adapter_cache *cache);

/* --- Names ----------------------------------------------------------------------------------- */

/* Load, or load again and replace. Joins a load of the same path that has not ended. With `pin` and
 * too many pinned already, the adapter is loaded and its event says why it is not pinned.
 * Errors: ARG (name), UNSUPPORTED (no slots), LIMIT (too many names), NOMEM. */
qv_status qv_adapter_cache_load(qv_adapter_cache *cache, const char *name, const char *dir,
                                bool pin);

/* Forget a name. Errors: NOT_FOUND. */
qv_status qv_adapter_cache_unload(qv_adapter_cache *cache, const char *name);

/* Called once per name, in the order they were first loaded. */
void qv_adapter_cache_each(const qv_adapter_cache *cache,
                           void (*each)(const qv_adapter_event *, void *), void *user);

/* Take in what the loader finished. *changed: waiting requests and sequences should try again.
 * Errors: DEVICE (a copy to the device failed; fatal). */
qv_status qv_adapter_cache_poll(qv_adapter_cache *cache, bool *changed);

/* Readable when the loader has finished something; true when poll would take something in. */
int qv_adapter_cache_fd(const qv_adapter_cache *cache);
bool qv_adapter_cache_has_results(const qv_adapter_cache *cache);

/* --- Versions -------------------------------------------------------------------------------- */

/* Hold the version that the name points at. Errors, with *code for the client: BUSY (its first load
 * has not ended), NOT_FOUND (no such name), or what its load failed with. */
qv_status qv_adapter_cache_acquire(qv_adapter_cache *cache, qv_str name, qv_adapter_version **out,
                                   qv_code *code);
void qv_adapter_cache_release(qv_adapter_cache *cache, qv_adapter_version *version);

const char *qv_adapter_version_digest(const qv_adapter_version *version);

/* Hold the slot of a version while a sequence runs. Returns the slot, or starts to bring the
 * version into one and returns QV_NO_SLOT_YET, or QV_NO_SLOT_FREE (worker/scheduler.h). */
int32_t qv_adapter_cache_enter(qv_adapter_cache *cache, qv_adapter_version *version);
void qv_adapter_cache_leave(qv_adapter_cache *cache, qv_adapter_version *version);

/* --- Facts ----------------------------------------------------------------------------------- */

qv_slot_state qv_adapter_cache_slot_state(const qv_adapter_cache *cache, int32_t slot);
int32_t qv_adapter_cache_n_empty(const qv_adapter_cache *cache); /* slots */
int64_t qv_adapter_cache_refs(const qv_adapter_cache *cache); /* held by requests, all versions */
uint64_t qv_adapter_cache_host_bytes(const qv_adapter_cache *cache);

#endif
