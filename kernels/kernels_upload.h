/* Launcher that takes the pieces of an upload where they belong.
 */
#ifndef QV_KERNELS_KERNELS_UPLOAD_H
#define QV_KERNELS_KERNELS_UPLOAD_H

#include "common/status.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QV_K_ZEROS UINT64_MAX /* in from: nothing was sent, the bytes become 0 */

typedef struct {
    void *dst;
    uint64_t from; /* where its bytes begin in what was sent: a multiple of 16 */
    uint64_t bytes;
} qv_k_piece;

/* pieces[n] on the device, which do not overlap; `sent` is 16-byte aligned. */
qv_status qv_k_scatter(const qv_k_piece *pieces, int32_t n, const void *sent, void *stream);

#ifdef __cplusplus
}
#endif
#endif
