/* Kernels that forget something, for test_faults.c. Each has 128 threads and writes 128 numbers:
 * i + 1 at i when nothing is forgotten.
 */
#ifndef QV_TESTS_KERNELS_TEST_FAULTS_H
#define QV_TESTS_KERNELS_TEST_FAULTS_H

#include "common/status.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    NO_BARRIER,      /* between writing and reading shared memory */
    NO_WARP_BARRIER, /* the same within a warp */
    NO_COPY_WAIT,    /* for cp.async */
    NO_FREE_STAGE,   /* a copy to where others still read */
    NO_BOX_WAIT,     /* for the copy engine */
    NO_PRODUCT_WAIT, /* for wgmma */
    NO_OPERAND,      /* wgmma before its operand is there */
    NOT_ALL_ARRIVE,  /* at a named barrier: a deadlock */
} test_fault;

/* Of the kernel that could have `fault`, with it or without. `in`: 128 rows of 64 BF16 numbers
 * whose first is the row's number + 1, the rest zeros. */
qv_status test_with_fault(test_fault fault, bool has_it, const void *in, float *out);

#ifdef __cplusplus
}
#endif

#endif
