/* Prefix: which prompts a worker has seen lately, so that a request can go where the beginning of
 * its prompt is cached. The broker cannot tokenize, so it compares bytes: a prompt is a list of
 * hashes over growing beginnings of it (256, 512, 768, 1024 bytes, then each a quarter longer), and
 * a member's memory is a bounded set of such hashes, the least recently used ones forgotten. What
 * follows is an estimate: a worker may have dropped what we remember, or share what we do not know
 * of. Pure; one thread.
 */
#ifndef QV_BROKER_PREFIX_H
#define QV_BROKER_PREFIX_H

#include "common/protocol.h"

#define QV_PREFIX_MAX  32   /* hashes of a prompt; the longest beginning is about 500 KB */
#define QV_PREFIX_SETS 1024 /* of QV_PREFIX_WAYS hashes each: 32 KiB a member */
#define QV_PREFIX_WAYS 4

typedef struct {
    uint32_t n;
    uint64_t hash[QV_PREFIX_MAX]; /* [n], never 0 */
} qv_prefix;

typedef struct {
    uint64_t hash[QV_PREFIX_SETS][QV_PREFIX_WAYS]; /* latest first; 0 = empty */
} qv_prefix_memory;

/* Bytes of the beginning that hash i is over. */
uint32_t qv_prefix_bytes(uint32_t i);

/* The hashes of a submit's prompt, messages or tokens, made different for each adapter by its
 * name. */
void qv_prefix_of(const qv_msg_submit *submit, qv_str adapter, qv_prefix *out);

/* How many bytes of the prompt the member has seen: 0 or one of the lengths above. */
uint32_t qv_prefix_match(const qv_prefix_memory *memory, const qv_prefix *prefix);

/* The prompt was sent there. */
void qv_prefix_remember(qv_prefix_memory *memory, const qv_prefix *prefix);

#endif
