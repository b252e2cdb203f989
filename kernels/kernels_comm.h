/* Collectives in memory that ranks reach: sums over tensors on one device, and messages that ranks
 * write into each other's memory. Part of kernels.h. */
#ifndef QV_KERNELS_KERNELS_COMM_H
#define QV_KERNELS_KERNELS_COMM_H

#include "common/dtype.h"
#include "common/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QV_K_MAX_RANKS 64

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] = sum over r of in[r][i] for i in [first, end), in the order of r. Float32; `in` is a host
 * array of `n` device pointers; out may be one of them. */
qv_status qv_k_sum_ranks(void *const *in, int32_t n, void *out, int64_t first, int64_t end,
                         void *stream);

/* --- Messages between ranks (all_reduce.cu) ----------------------------------------------------
 */

#define QV_K_DIRECT_RANKS 8
#define QV_K_SLOT_NUMBERS 8192                    /* numbers of a message in a slot */
#define QV_K_SLOT_BYTES   (QV_K_SLOT_NUMBERS * 8) /* with flags */

/* A rank's view of the group. Every rank calls the same functions in the same order, with the same
 * sizes and n_slots. */
typedef struct {
    int32_t n_ranks, rank, n_slots;
    void *slots[QV_K_DIRECT_RANKS]; /* each rank's slots, of qv_k_direct_bytes, zero at first */
    uint32_t *epoch;                /* [n_slots] this rank's own, zero at first */
    int32_t *stop;                  /* host memory: not 0, nobody shall wait any more */
    int32_t *missed;                /* host memory: 1 + the rank that was waited for too long */
    uint64_t patience_ns;           /* how long is too long */
    bool let_next; /* a kernel that can may start while this one waits: not if the others of the
                    * group need the same device */
} qv_k_direct;

/* Bytes of a rank's slots. */
size_t qv_k_direct_bytes(int32_t n_ranks, int32_t n_slots);

/* x[0..n) becomes the sum over ranks, in their order. */
qv_status qv_k_direct_sum(const qv_k_direct *d, float *x, int64_t n, void *stream);

/* z += sum over ranks of x; y = z * rsqrt(mean(z^2) + eps) * (w or 1 + w), rounded; rest = what
 * that took from it, rounded: rows of n. x stays. The same bits as qv_k_direct_sum and
 * qv_k_add_norm one after the other. */
typedef struct {
    float *x, *z;                                      /* [n_rows, n] */
    void *y, *rest;                                    /* BF16 [n_rows, n]; rest may be NULL */
    int64_t x_stride, z_stride, y_stride, rest_stride; /* of rows, in numbers */
    int64_t n_rows, n;
    const float *w; /* [n] */
    float eps;
    bool plus_one;
    bool whole;     /* set by the launcher, as n_last */
    int64_t n_last; /* numbers of the last row */
} qv_k_exchange;

/* Whether the sizes and alignments fit. */
bool qv_k_direct_sum_add_norm_can(const qv_k_exchange *args);
qv_status qv_k_direct_sum_add_norm(const qv_k_direct *d, const qv_k_exchange *args, void *stream);

/* Rank 0's whole [n_rows, n_ranks * n] = the parts [n_rows, n] side by side; numbers of 32 bits. */
typedef struct {
    const void *part;
    void *whole; /* rank 0's; NULL on others */
    int64_t part_stride, whole_stride, n_rows, n;
} qv_k_gather;

qv_status qv_k_direct_gather(const qv_k_direct *d, const qv_k_gather *args, void *stream);

#ifdef __cplusplus
}
#endif

#endif
