/* Tensor maps for the CPU: cuTensorMapEncodeTiled() as kernels/tensor_map.cuh uses it, three or
 * four dimensions of BF16 or float32 with a swizzle of 128 bytes, and the copies of a box.
 */
#ifndef QV_EMULATE_TENSOR_MAP_H
#define QV_EMULATE_TENSOR_MAP_H

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

namespace emu
{

/* What a CUtensorMap of the emulated device holds. */
struct tensor_map {
    uint64_t mark;
    const char *data;
    uint64_t sizes[4];   /* numbers; the first dimension is the one without gaps */
    uint64_t strides[3]; /* bytes, of the others */
    uint32_t box[4];     /* numbers */
    uint32_t number;     /* bytes of one */

    size_t box_bytes() const { return (size_t)box[0] * box[1] * box[2] * box[3] * number; }
};

struct box_position {
    int at[4]; /* may be outside: zeros are what is there */
};

/* The map at `map`; an error of the kernel if there is none. */
tensor_map read_tensor_map(const void *map);

/* `offset` is that of `to` in its shared memory, which the swizzle goes by. */
void land_box(const tensor_map &m, box_position from, char *to, size_t offset);
/* The other way: what is outside of the array is left out. */
void take_box(const tensor_map &m, box_position to, const char *from, size_t offset, bool add);

} // namespace emu

/* The driver's function: INVALID_VALUE for what a device refuses, NOT_SUPPORTED for what only the
 * emulated one does. */
extern "C" CUresult
cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *data,
                       const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                       const cuuint32_t *steps, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                       CUtensorMapFloatOOBfill fill);

#endif
