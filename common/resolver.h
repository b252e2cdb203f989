/* A look-up of a host name on a thread of its own: getaddrinfo blocks. */
#ifndef QV_COMMON_RESOLVER_H
#define QV_COMMON_RESOLVER_H

#include <netdb.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { QV_RESOLVER_RUNNING, QV_RESOLVER_DONE, QV_RESOLVER_ABANDONED };

/* Freed by the side that is done last. */
typedef struct {
    char *host;
    char address[NI_MAXHOST]; /* numeric; empty: not found */
    char error[256];
    atomic_int state; /* RUNNING, then DONE by the thread (release: publishes the result) or
                         ABANDONED by its owner (acquire-release: one side sees the other's) */
} qv_resolver;

qv_resolver *qv_resolver_start(const char *host); /* NULL when it cannot be started */

/* The owner is through with it, whether it has ended or not; NULL is none. */
void qv_resolver_abandon(qv_resolver *resolver);

bool qv_is_numeric_address(const char *host);

#endif
