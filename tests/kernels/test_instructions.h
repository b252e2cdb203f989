/* Kernels that do one thing each, for test_instructions.c: what instructions of kernels/ptx*.cuh
 * mean. Pointers are to memory of the device, numbers are BF16 unless it is said; QV_ERR_DEVICE
 * with a sentence if a launch fails.
 */
#ifndef QV_TESTS_KERNELS_TEST_INSTRUCTIONS_H
#define QV_TESTS_KERNELS_TEST_INSTRUCTIONS_H

#include "common/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* c [16][16] float32 = a [16][64] b [64][16] by mma(). a is stored [16][64], or [64][16] by
 * columns; b is stored [64][16], or [16][64] by columns. */
qv_status test_mma(const void *a, bool a_by_columns, const void *b, bool b_by_columns, float *c);

/* d [64][n] float32 = a [64][64] b [64][n] by wgmma on tiles that the copy engine brings.
 * WGMMA_ROWS: a is stored [64][64], b [n][64]; n is 32, 64, 80, 96, 112 or 128.
 * WGMMA_COLUMNS: the same with the transposed of a, n 64.
 * WGMMA_VALUES: a is in registers, b is stored [n / 64][64][64]: a tile for 64 columns; n is 64,
 * 128 or 256. */
typedef enum { WGMMA_ROWS, WGMMA_COLUMNS, WGMMA_VALUES } wgmma_form;
qv_status test_wgmma(wgmma_form form, int n, const void *a, const void *b, float *d);

/* out[lane] = what each lane gets in each of the eight exchanges of the kernel, [8][32]. */
qv_status test_shuffles(const int32_t *in, int32_t *out);

/* out[i] = sum of in[i], in[i + 128] .. of `n` rows of 128 float32, that cp.async brings through a
 * ring of four rows. */
qv_status test_ring(const float *in, int n, float *out);

/* The same of BF16 rows [n][64] by two blocks of a cluster: in turn one of them has a row copied to
 * both, through a ring of barriers, and each reads the sums of the other. out is [2][64]. */
qv_status test_cluster(const void *in, int n, float *out);

#ifdef __cplusplus
}
#endif

#endif
