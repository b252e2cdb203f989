/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a random
 * function of a counter and a key, without state. The draw of a token is a pure function of (seed,
 * stream, draw), so that any worker, at any time, repeats it. Host and device.
 */
#ifndef QV_OPS_PHILOX_H
#define QV_OPS_PHILOX_H

#include "common/dtype.h" /* QV_HD */

#include <stdint.h>

/* Encrypt `counter` under `key`, in place. */
QV_HD static inline void qv_philox4x32(uint32_t counter[4], const uint32_t key[2])
{
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * counter[0];
        uint64_t p1 = (uint64_t)0xCD9E8D57u * counter[2];
        uint32_t c1 = counter[1], c3 = counter[3];
        counter[0] = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        counter[1] = (uint32_t)p1;
        counter[2] = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        counter[3] = (uint32_t)p0;
        k0 += 0x9E3779B9u; /* the golden ratio, and sqrt(3) - 1 below: Weyl sequences of the key */
        k1 += 0xBB67AE85u;
    }
}

/* Uniform in [0, 1), 53 bits: the draw-th number of a stream. */
QV_HD static inline double qv_philox_uniform(uint64_t seed, uint32_t stream, uint32_t draw)
{
    uint32_t counter[4] = {draw, stream, 0, 0};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    qv_philox4x32(counter, key);
    uint64_t bits = (uint64_t)counter[0] << 32 | counter[1];
    return (double)(bits >> 11) * (1.0 / 9007199254740992.0);
}

#endif
