/* See test_faults.h. */
#include "tests/kernels/test_faults.h"

#include "kernels/tensor_map.cuh"
#include "kernels/wgmma_shapes.cuh"

namespace
{

/* Numbers go through shared memory to the thread that is opposite in the block or in the warp. */
__global__ void exchange_kernel(bool across_block, bool forgets, float *out)
{
    __shared__ float numbers[128];
    int thread = threadIdx.x, opposite = across_block ? 127 - thread : thread ^ 31;
    numbers[thread] = (float)(thread + 1);
    if (!forgets && across_block)
        __syncthreads();
    if (!forgets && !across_block)
        __syncwarp();
    out[opposite] = numbers[opposite];
}

/* The first pieces of the rows of `in` through one stage, then all get that of row 0. */
__global__ void stage_kernel(bool forgets_wait, bool forgets_free, const bf16 *in, float *out)
{
    __shared__ __align__(16) bf16 stage[128 * 8];
    int thread = threadIdx.x, opposite = 127 - thread;
    copy16(stage + thread * 8, in + thread * 64, true);
    copies_commit();
    if (!forgets_wait)
        copies_wait<0>();
    __syncthreads();
    out[opposite] = to_float(stage[opposite * 8]);
    if (!forgets_free)
        __syncthreads();
    copy16(stage + thread * 8, in, true);
    copies_commit();
    copies_wait<0>();
}

/* First a box that is one row further on, then the right one, into the same place. */
__global__ void box_kernel(const __grid_constant__ CUtensorMap map, bool forgets_wait, float *out)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ __align__(1024) bf16 tile[128 * 64];
    __shared__ uint64_t barrier;
    int thread = threadIdx.x;
    if (thread == 0)
        barrier_init(&barrier, 1);
    for (int phase = 0; phase < 2; phase++) {
        __syncthreads();
        if (thread == 0) {
            barrier_expect(&barrier, sizeof tile);
            copy_box_here(tile, &map, 0, 1 - phase, 0, &barrier);
        }
        if (phase == 0 || !forgets_wait)
            barrier_wait(&barrier, phase);
        out[thread] = to_float(tile[tile_at<64>(thread, 0)]);
    }
#endif
}

/* out[row] = in[row][0] in[0][0], by products of 64 rows with 32. */
__global__ void product_kernel(const __grid_constant__ CUtensorMap map, bool forgets_operand,
                               bool forgets_wait, float *out)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ __align__(1024) bf16 tile[128 * 64];
    __shared__ uint64_t barrier;
    int thread = threadIdx.x, row = thread / 32 * 16 + thread % 32 / 4;
    if (thread == 0) {
        barrier_init(&barrier, 1);
        barrier_expect(&barrier, sizeof tile);
        copy_box_here(tile, &map, 0, 0, 0, &barrier);
    }
    __syncthreads();
    if (!forgets_operand)
        barrier_wait(&barrier, 0);
    float d[2][16] = {};
    wgmma_begin();
    for (int half = 0; half < 2; half++)
        wgmma<32>(d[half], wgmma_tile(tile + half * 64 * 64), wgmma_tile(tile));
    wgmma_commit();
    if (!forgets_wait)
        wgmma_wait<0>();
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 2 && thread % 4 == 0; i++)
            out[half * 64 + row + i * 8] = d[half][2 * i];
    wgmma_wait<0>();
    barrier_wait(&barrier, 0);
#endif
}

__global__ void named_kernel(bool forgets, float *out)
{
    if (threadIdx.x >= 32 || !forgets)
        named_barrier<128>(1);
    out[threadIdx.x] = (float)(threadIdx.x + 1);
}

} // namespace

qv_status test_with_fault(test_fault fault, bool has_it, const void *in, float *out)
{
    const cuuint64_t sizes[3] = {64, 128, 1}, strides[2] = {128, 128 * 128};
    const cuuint32_t box[3] = {64, 128, 1};
    CUtensorMap map;
    QV_TRY(qv_k_tensor_map("test_with_fault", in, sizes, strides, box, &map));
    auto is = [&](test_fault one) { return has_it && fault == one; };
    switch (fault) {
    case NO_BARRIER:
    case NO_WARP_BARRIER:
        exchange_kernel<<<1, 128>>>(fault == NO_BARRIER, has_it, out);
        break;
    case NO_COPY_WAIT:
    case NO_FREE_STAGE:
        stage_kernel<<<1, 128>>>(is(NO_COPY_WAIT), is(NO_FREE_STAGE), (const bf16 *)in, out);
        break;
    case NO_BOX_WAIT:
        box_kernel<<<1, 128>>>(map, has_it, out);
        break;
    case NO_OPERAND:
    case NO_PRODUCT_WAIT:
        product_kernel<<<1, 128>>>(map, is(NO_OPERAND), is(NO_PRODUCT_WAIT), out);
        break;
    case NOT_ALL_ARRIVE:
        named_kernel<<<1, 128>>>(has_it, out);
        break;
    }
    return qv_k_check_launch("test_with_fault");
}
