#include "common/resolver.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void resolver_free(qv_resolver *r)
{
    free(r->host);
    free(r);
}

static void *resolver_main(void *arg)
{
    qv_resolver *r = arg;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_ADDRCONFIG}, *found = NULL;
    int rc = getaddrinfo(r->host, NULL, &hints, &found);
    if (rc == 0)
        rc = getnameinfo(found->ai_addr, found->ai_addrlen, r->address, sizeof r->address, NULL, 0,
                         NI_NUMERICHOST);
    if (rc != 0) {
        r->address[0] = 0;
        snprintf(r->error, sizeof r->error, "host %.128s: %s", r->host, gai_strerror(rc));
    }
    if (found != NULL)
        freeaddrinfo(found);
    int expected = QV_RESOLVER_RUNNING;
    if (!atomic_compare_exchange_strong(&r->state, &expected, QV_RESOLVER_DONE))
        resolver_free(r);
    return NULL;
}

qv_resolver *qv_resolver_start(const char *host)
{
    qv_resolver *r = calloc(1, sizeof *r);
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all, before;
    if (r == NULL || (r->host = strdup(host)) == NULL) {
        free(r);
        return NULL;
    }
    sigfillset(&all); /* signals are for the threads that expect them */
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&thread, &attr, resolver_main, r);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    if (rc != 0) {
        resolver_free(r);
        return NULL;
    }
    return r;
}

void qv_resolver_abandon(qv_resolver *r)
{
    int expected = QV_RESOLVER_RUNNING;
    if (r != NULL && !atomic_compare_exchange_strong(&r->state, &expected, QV_RESOLVER_ABANDONED))
        resolver_free(r);
}

bool qv_is_numeric_address(const char *host)
{
    struct addrinfo hints = {.ai_flags = AI_NUMERICHOST}, *found;
    if (getaddrinfo(host, NULL, &hints, &found) != 0)
        return false;
    freeaddrinfo(found);
    return true;
}
