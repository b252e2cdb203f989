/* wgmma for the CPU: products of a warpgroup that read their operands and write their sums some
 * time between the instruction and the wait for it: here at the commit or at the wait, as the seed
 * has it. Until then the accumulators hold NaN, for whoever reads them too early.
 */
#ifndef QV_EMULATE_WGMMA_H
#define QV_EMULATE_WGMMA_H

#include <stdint.h>

namespace emu
{

/* d [64 x n] = a [64 x 16] b [16 x n], plus d if `adds`: what one thread of the warpgroup gives.
 * Descriptors are the instruction's; tiles have the swizzle of 128 bytes. */
struct product {
    float *d; /* [n / 2], in the layout of mma() */
    int n;
    uint64_t a = 0, b = 0;
    bool a_in_registers = false;
    uint32_t a_registers[4] = {};
    bool a_by_columns = false, b_by_columns = false; /* "MN-major": stored [k][..] */
    bool adds = true;
};

void multiply(const product &p);

/* Fence, end of a group, wait for all but the last n groups. */
void products_begin();
void products_commit();
void products_wait(int n);

} // namespace emu

#endif
