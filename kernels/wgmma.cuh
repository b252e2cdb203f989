/* Hopper's matrix instruction, which a warpgroup (four warps) gives and which reads its operands
 * from shared memory while the warps go on. Only for sm_90a.
 *
 * Operands are tiles [rows][64] of BF16 in the arrangement of tile_at<64>, which is the one with a
 * swizzle of 128 bytes, at addresses that are multiples of 1024. Ordinary writes to them need
 * wgmma_publish() in each writing thread and a barrier before they are read. Accumulators have the
 * layout of mma(): d[4 j ..] is the tile of columns 8 j.., row 16 (warp % 4) + lane / 4.
 */
#ifndef QV_KERNELS_WGMMA_CUH
#define QV_KERNELS_WGMMA_CUH

#include "kernels/ptx_hopper.cuh"
#include "kernels/tensor_core.cuh"

/* The blocks of a cluster, where there are clusters: naming them is an error elsewhere. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define QV_CLUSTER(x, y, z)
#else
#define QV_CLUSTER(x, y, z) __cluster_dims__(x, y, z)
#endif

/* A tile's descriptor; 16 columns further on is + 2. */
__device__ __forceinline__ uint64_t wgmma_tile(const bf16 *tile)
{
    const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
    const uint64_t group_bytes = 1024; /* from 8 rows to the next */
    return address | (uint64_t)1 << 16 | group_bytes >> 4 << 32 | (uint64_t)1 << 62;
}

/* Tiles [rows][64] side by side, `tile_bytes` each, as an operand whose summed index is the row
 * ("MN-major"). With a swizzle of 128 bytes its unit is 8 rows of 64 columns, 1024 bytes, in the
 * arrangement of tile_at<64>. From unit to unit along the rows is the stride offset: 1024, since a
 * tile's rows follow each other. From unit to unit along the columns is the leading offset: the
 * size of a tile. An instruction reads 16 rows; the next 16 are 2048 bytes further on. */
__device__ __forceinline__ uint64_t wgmma_values_tile(const bf16 *tile, int tile_bytes)
{
    const uint64_t leading = (uint64_t)tile_bytes >> 4, stride = 1024 >> 4;
    return (shared_address(tile) & 0x3ffff) >> 4 | leading << 16 | stride << 32 | (uint64_t)1 << 62;
}

/* Which warpgroup of its block a thread is in, so that the compiler knows it is the same in a warp.
 */
__device__ __forceinline__ int warpgroup()
{
    return __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0);
}

#endif
