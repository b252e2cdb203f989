/* Peers: several brokers over the same workers. Each shows in its lease (quiver:broker:<id>) how
 * much demand it sees for which adapters; each adds up what the others show; and the one of the
 * least id, of those with as many workers, moves adapters for demand and balance and takes surplus
 * away, so that no two work against each other. All of them load what is wanted and what their own
 * requests wait for: rendezvous hashing sends them to the same workers. Pure; the broker's thread.
 */
#ifndef QV_BROKER_PEERS_H
#define QV_BROKER_PEERS_H

#include "broker/core.h"

#define QV_PEERS_MAX_TEXT 4096

typedef struct {
    const char *id;
    const char *demand; /* as qv_peers_show wrote it; NULL: none */
    int64_t workers;    /* that are ready there */
} qv_peer_broker;

/* "sql=12.5 french=0.3": this broker's own demand, the greatest first; cut to fit. Returns out. */
const char *qv_peers_show(const qv_core *core, char *out, size_t size);

/* All brokers that hold a lease, perhaps with this one among them. What makes no sense in a demand
 * is passed over. */
void qv_peers_update(qv_core *core, const qv_peer_broker *brokers, size_t n);

#endif
