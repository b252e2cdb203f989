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

/* A member that was looked at, and what it would cost to run the request there: milliseconds until
 * the first token, about. */
typedef struct {
    const qv_member *member;
    bool has_credit;
    double queue_ms;   /* what it has to do already */
    double load_ms;    /* the adapter is not there */
    double prefill_ms; /* of the part of the prompt that is not cached there */
} qv_route_row;

#define QV_ROUTE_MAX_ROWS 8

/* What a policy looked at, for people: the latest rows. */
typedef struct {
    uint32_t n; /* in rows */
    qv_route_row rows[QV_ROUTE_MAX_ROWS];
} qv_route_trace;

/* A request that is to go somewhere. */
typedef struct {
    const qv_pool *pool;
    const qv_group *group;
    const char *digest;      /* it has begun and must go on with this version; "" = any */
    double prompt_tokens;    /* about; 0 = not known */
    const qv_prefix *prefix; /* of the prompt, or NULL */
    uint64_t random;         /* a number for whoever draws lots */
    uint64_t now_us;
    qv_route_trace *trace; /* or NULL */
} qv_route_query;

typedef struct {
    const char *name;    /* as in --policy */
    const char *summary; /* one line for --help and docs */

    /* A member of a SEND is READY and has credit; for a group with a name it holds the adapter. */
    qv_route (*choose)(const qv_route_query *query);
} qv_route_policy;

extern const qv_route_policy qv_route_score;        /* the default */
extern const qv_route_policy qv_route_affinity;     /* without measurements */
extern const qv_route_policy qv_route_least_loaded; /* the simple one, for comparison */

/* All policies; ends with NULL. */
extern const qv_route_policy *const qv_route_policies[];

/* Errors: NOT_FOUND, with the names there are. */
qv_status qv_route_find(const char *name, const qv_route_policy **out);

/* --- What policies share ----------------------------------------------------------------------*/

/* What a request would cost on a member. */
qv_route_row qv_route_score_of(const qv_route_query *query, const qv_member *member);

static inline double qv_route_total_ms(const qv_route_row *row)
{
    return row->queue_ms + row->load_ms + row->prefill_ms;
}

/* Keep a row for people; beyond the bound the last one is replaced. */
void qv_route_note(const qv_route_query *query, const qv_route_row *row);

/* Whether `a` is the better of two members with credit (less in flight for its capacity, then more
 * free pages, then fewer requests so far); the best member of all; the best of the members that
 * serve the group and, if the query's digest is not "", hold just that. NULL: none has credit. */
bool qv_route_better(const qv_member *a, const qv_member *b);
qv_member *qv_route_best_member(const qv_route_query *query);
qv_member *qv_route_best_holder(const qv_route_query *query);

/* Whether a resident may serve the query, credit aside. */
bool qv_route_serves(const qv_route_query *query, const qv_resident *resident);

#endif
