/* A hash over eight bytes at a time; each beginning goes on from the one before. */
#include "broker/prefix.h"

#include <string.h>

#define MULTIPLIER UINT64_C(0x9e3779b97f4a7c15)

static const uint32_t lengths[QV_PREFIX_MAX] = {
    256,   512,   768,    1024,   1280,   1600,   2000,   2496,   3120,   3896,  4864,
    6080,  7600,  9496,   11864,  14832,  18536,  23168,  28960,  36200,  45248, 56560,
    70696, 88368, 110456, 138072, 172584, 215728, 269656, 337072, 421336, 526664};

uint32_t qv_prefix_bytes(uint32_t i)
{
    return lengths[i];
}

static uint64_t mix(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * MULTIPLIER;
    return hash ^ hash >> 29;
}

static uint64_t hash_bytes(uint64_t hash, const char *data, size_t size)
{
    uint64_t word;
    for (; size >= sizeof word; data += sizeof word, size -= sizeof word) {
        memcpy(&word, data, sizeof word);
        hash = mix(hash, word);
    }
    for (; size > 0; data++, size--)
        hash = mix(hash, (unsigned char)*data);
    return hash;
}

/* The elements of a msgpack array, without the head that says how many there are: a conversation
 * that goes on begins with the bytes of the one before. */
static qv_str skip_array_head(qv_str raw)
{
    if (raw.size == 0)
        return raw;
    unsigned char first = (unsigned char)raw.data[0];
    uint32_t head = (first & 0xf0) == 0x90 ? 1 : first == 0xdc ? 3 : first == 0xdd ? 5 : 0;
    if (head > raw.size)
        head = 0;
    return (qv_str){raw.data + head, raw.size - head};
}

void qv_prefix_of(const qv_msg_submit *submit, qv_str adapter, qv_prefix *out)
{
    qv_str text = submit->prompt;
    if (submit->messages.size > 0)
        text = skip_array_head(submit->messages);
    else if (submit->tokens.count > 0)
        text = (qv_str){(const char *)submit->tokens.data,
                        submit->tokens.count * (uint32_t)sizeof *submit->tokens.data};
    uint64_t hash = hash_bytes(submit->tools.size + 1, adapter.data, adapter.size);
    hash = hash_bytes(hash, submit->tools.data, submit->tools.size);
    uint32_t from = 0;
    for (out->n = 0; out->n < QV_PREFIX_MAX && lengths[out->n] <= text.size; out->n++) {
        hash = hash_bytes(hash, text.data + from, lengths[out->n] - from);
        from = lengths[out->n];
        out->hash[out->n] = hash != 0 ? hash : 1;
    }
}

static bool holds(const qv_prefix_memory *memory, uint64_t hash)
{
    const uint64_t *set = memory->hash[hash % QV_PREFIX_SETS];
    for (int i = 0; i < QV_PREFIX_WAYS; i++)
        if (set[i] == hash)
            return true;
    return false;
}

/* A member that has seen a beginning has seen all shorter ones, as far as it remembers. */
uint32_t qv_prefix_match(const qv_prefix_memory *memory, const qv_prefix *prefix)
{
    if (memory == NULL)
        return 0;
    uint32_t least = 0, most = prefix->n;
    while (least < most) {
        uint32_t middle = (least + most + 1) / 2;
        if (holds(memory, prefix->hash[middle - 1]))
            least = middle;
        else
            most = middle - 1;
    }
    return least > 0 ? lengths[least - 1] : 0;
}

void qv_prefix_remember(qv_prefix_memory *memory, const qv_prefix *prefix)
{
    for (uint32_t k = 0; memory != NULL && k < prefix->n; k++) {
        uint64_t hash = prefix->hash[k], *set = memory->hash[hash % QV_PREFIX_SETS];
        int i = 0;
        while (i < QV_PREFIX_WAYS - 1 && set[i] != hash)
            i++;
        memmove(set + 1, set, (size_t)i * sizeof *set);
        set[0] = hash;
    }
}
