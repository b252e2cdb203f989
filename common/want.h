/* Want: one adapter's desired state as people write it into Redis (quiver:want:<adapter>), parsed
 * and checked; and the ids that workers and brokers may have.
 *
 * Pure functions over text from outside: any thread.
 */
#ifndef QV_COMMON_WANT_H
#define QV_COMMON_WANT_H

#include "common/status.h"

#include <stdint.h>

#define QV_ADAPTER_NAME_MAX  128 /* bytes */
#define QV_ID_MAX            64
#define QV_WANT_MAX_WORKERS  256
#define QV_WANT_MAX_PATH     4096
#define QV_WANT_MAX_REPLICAS 1024
#define QV_WANT_MAX_TENANTS  256
#define QV_WANT_MAX_SPLIT    16
#define QV_WANT_MAX_WEIGHT   1000000

/* An adapter that an alias stands for, and its share of the requests. */
typedef struct {
    const char *adapter;
    int64_t weight;
} qv_want_share;

typedef struct {
    const char *path;           /* folder of the adapter's files, as the workers see it; NULL only
                                 * where there is a split */
    int64_t replicas;           /* on so many workers; 0 = loaded on demand only; default 1 */
    int64_t max_replicas;       /* demand adds replicas up to this; 0 = up to all workers */
    bool pin;                   /* never evict it */
    const char *const *workers; /* [n_workers] ids: only on these; none = anywhere */
    size_t n_workers;
    const char *const *tenants; /* [n_tenants]: only these may use it; none = all */
    size_t n_tenants;
    const qv_want_share *split; /* [n_split]: requests for the name go to these; none = to itself */
    size_t n_split;
} qv_want;

/* One field of a hash, not terminated. */
typedef struct {
    const char *name, *value;
    size_t name_size, value_size;
} qv_want_field;

/* A qv_want and the texts it points to. */
typedef struct qv_want_box qv_want_box;

/* Make a want of a hash: path, replicas (0 to 1024), max_replicas, pin (0, 1, true, false ...),
 * workers (ids parted by commas or blanks), tenants (names, the same), split (adapters, each with a
 * weight: "sql-v1=95 sql-v2=5"; without one it is 1). path or split is required. Other fields are
 * people's own. Errors: ARG with the sentence for people, NOMEM. */
qv_status qv_want_parse(const qv_want_field *fields, size_t n, qv_want_box **out);
void qv_want_free(qv_want_box *box); /* NULL is fine */

const qv_want *qv_want_get(const qv_want_box *box);
bool qv_want_equal(const qv_want *a, const qv_want *b);

/* Whether a text may be the id of a worker or a broker: 1 to 64 letters, digits and "._-:@".
 * Errors: ARG with the sentence. (Names of adapters: qv_adapter_name_check in protocol.h.) */
qv_status qv_check_id(const char *id, size_t size);

/* --- Tenants ----------------------------------------------------------------------------------*/

/* What people set for a tenant (quiver:tenant:<name>): weight (default 1), max_queued and
 * max_running (requests; 0 = no limit). Other fields are people's own. Errors: ARG. */
typedef struct {
    double weight;
    int64_t max_queued, max_running;
} qv_tenant_want;

qv_status qv_tenant_want_parse(const qv_want_field *fields, size_t n, qv_tenant_want *out);

#endif
