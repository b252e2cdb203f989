/* mma.sync, ldmatrix and stmatrix for the CPU: what all lanes of a warp do together. A lane that
 * has ended, or shared memory that is not 16 bytes at a multiple of 16, is an error of the kernel.
 */
#ifndef QV_EMULATE_TENSOR_CORE_H
#define QV_EMULATE_TENSOR_CORE_H

#include <stdint.h>

namespace emu
{

/* c [16 x 8] += a [16 x 16] b [16 x 8], each lane with its fragments. Sums are in float32 and in
 * the order of k, where a device rounds in its own way. */
void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

/* Four tiles [8][8] of 16 bits: lane l says where row l % 8 of tile l / 8 is. `transposed`: of the
 * tiles, not of what the fragments mean. */
void load_tiles(uint32_t (&r)[4], const void *row, bool transposed);
void store_tiles(void *row, const uint32_t (&r)[4], bool transposed);

} // namespace emu

#endif
