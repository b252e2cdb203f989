/* Routing: which worker gets the next request of a group. A policy is one function over the pool;
 * the table in route.c names them all. Pure; the broker's thread.
 */
#ifndef QV_BROKER_ROUTE_H
#define QV_BROKER_ROUTE_H

#include "broker/pool.h"

typedef enum {
    QV_ROUTE_SEND, /* to this member */
    QV_ROUTE_LOAD, /* wait, and ask placement to load the adapter: on this member if one is named */
    QV_ROUTE_WAIT  /* for credit, or for a load that is under way */
} qv_route_verdict;

typedef struct {
    qv_route_verdict verdict;
    qv_member *member;
} qv_route;

typedef struct {
    const char *name;    /* as in --policy */
    const char *summary; /* one line for --help and docs */

    /* `digest` is what a request that has begun must go on with, or "" for one that may take any. A
     * member of a SEND is READY and has credit; for a group with a name it holds the adapter. */
    qv_route (*choose)(const qv_pool *pool, const qv_group *group, const char *digest);
} qv_route_policy;

extern const qv_route_policy qv_route_affinity;     /* the default */
extern const qv_route_policy qv_route_least_loaded; /* the simple one, for comparison */

/* All policies; ends with NULL. */
extern const qv_route_policy *const qv_route_policies[];

/* Errors: NOT_FOUND, with the names there are. */
qv_status qv_route_find(const char *name, const qv_route_policy **out);

/* What policies share: whether `a` is the better of two members with credit (less in flight for its
 * capacity, then more free pages, then fewer requests so far); the best member of all; the best of
 * the members that serve the group and, if `digest` is not "", hold just that. NULL: none has
 * credit. */
bool qv_route_better(const qv_member *a, const qv_member *b);
qv_member *qv_route_best_member(const qv_pool *pool);
qv_member *qv_route_best_holder(const qv_group *group, const char *digest);

#endif
