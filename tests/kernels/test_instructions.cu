/* See test_instructions.h. */
#include "tests/kernels/test_instructions.h"

#include "kernels/tensor_map.cuh"
#include "kernels/wgmma_attention.cuh"
#include "kernels/wgmma_shapes.cuh"

namespace
{

/* --- mma ---------------------------------------------------------------------------------- */

__global__ void mma_kernel(const bf16 *a, bool a_by_columns, const bf16 *b, bool b_by_columns,
                           float *c)
{
    __shared__ __align__(128) bf16 a_tile[64 * 64], b_tile[64 * 64];
    int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
    for (int i = lane; i < 16 * 64; i += 32) {
        int along = i % 64, across = i / 64; /* of a row of 64 */
        int k = i / 16, n = i % 16;
        if (a_by_columns)
            a_tile[tile_at<64>(k, n)] = a[i];
        else
            a_tile[tile_at<64>(across, along)] = a[i];
        if (b_by_columns)
            b_tile[tile_at<64>(across, along)] = b[i];
        else
            b_tile[tile_at<64>(k, n)] = b[i];
    }
    __syncwarp();
    float sums[2][4] = {};
    for (int k = 0; k < 64; k += 16) {
        uint32_t af[4], bf[4];
        if (a_by_columns)
            load_a_trans<64>(af, a_tile, 0, k);
        else
            load_a<64>(af, a_tile, 0, k);
        if (b_by_columns)
            load_b<64>(bf, b_tile, 0, k);
        else
            load_b_trans<64>(bf, b_tile, 0, k);
        mma(sums[0], af, bf[0], bf[1]);
        mma(sums[1], af, bf[2], bf[3]);
    }
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++)
            c[(g + i / 2 * 8) * 16 + half * 8 + 2 * t + i % 2] = sums[half][i];
}

/* --- wgmma -------------------------------------------------------------------------------- */

template <wgmma_form FORM, int N>
__global__ void wgmma_kernel(const __grid_constant__ CUtensorMap a_map,
                             const __grid_constant__ CUtensorMap b_map, const bf16 *a, float *out)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char memory[];
    bf16 *a_tile = (bf16 *)(((uintptr_t)memory + 1023) / 1024 * 1024), *b_tile = a_tile + 64 * 64;
    __shared__ uint64_t barrier;
    int thread = threadIdx.x, row = thread / 32 * 16 + thread % 32 / 4, col = thread % 4 * 2;
    if (thread == 0) {
        barrier_init(&barrier, 1);
        barriers_publish();
        barrier_expect(&barrier, (64 + N) * 64 * (int)sizeof(bf16));
        copy_box_here(a_tile, &a_map, 0, 0, 0, &barrier);
        if (FORM == WGMMA_VALUES)
            for (int i = 0; i < N / 64; i++)
                copy_box_here(b_tile + i * 64 * 64, &b_map, 0, 0, i, &barrier);
        else
            copy_box_here(b_tile, &b_map, 0, 0, 0, &barrier);
    }
    __syncthreads();
    barrier_wait(&barrier, 0);
    uint32_t fragments[4][4] = {};
    for (int k = 0; k < 4 && FORM == WGMMA_VALUES; k++)
        for (int i = 0; i < 4; i++)
            fragments[k][i] =
                *(const uint32_t *)(a + (row + i % 2 * 8) * 64 + 16 * k + col + i / 2 * 8);
    float d[N / 2] = {};
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; k++)
        if constexpr (FORM == WGMMA_ROWS)
            wgmma<N>(d, wgmma_tile(a_tile) + 2 * k, wgmma_tile(b_tile) + 2 * k);
        else if constexpr (FORM == WGMMA_COLUMNS)
            wgmma_64_trans(d, wgmma_tile(a_tile) + 128 * k, wgmma_tile(b_tile) + 2 * k);
        else
            wgmma_values<N>(d, fragments[k], wgmma_values_tile(b_tile, 64 * 128) + 128 * k);
    wgmma_commit();
    wgmma_wait<0>();
    for (int j = 0; j < N / 2; j++)
        out[(row + j / 2 % 2 * 8) * N + col + j / 4 * 8 + j % 2] = d[j];
#else
    (void)a_map, (void)b_map, (void)a, (void)out;
    __trap();
#endif
}

template <wgmma_form FORM, int N> qv_status launch_wgmma(const void *a, const void *b, float *d)
{
    const bool values = FORM == WGMMA_VALUES;
    const cuuint64_t strides[2] = {128, 64 * 128};
    const cuuint64_t a_sizes[3] = {64, 64, 1};
    const cuuint64_t b_sizes[3] = {64, values ? 64 : N, values ? N / 64 : 1};
    const cuuint32_t a_box[3] = {64, 64, 1}, b_box[3] = {64, values ? 64 : N, 1};
    CUtensorMap a_map, b_map;
    QV_TRY(qv_k_tensor_map("test_wgmma", a, a_sizes, strides, a_box, &a_map));
    QV_TRY(qv_k_tensor_map("test_wgmma", b, b_sizes, strides, b_box, &b_map));
    int bytes = (64 + N) * 128 + 1024;
    (void)cudaFuncSetAttribute(wgmma_kernel<FORM, N>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               bytes);
    wgmma_kernel<FORM, N><<<1, 128, bytes>>>(a_map, b_map, (const bf16 *)a, d);
    return qv_k_check_launch("test_wgmma");
}

/* --- Exchanges and copies ----------------------------------------------------------------- */

__global__ void shuffles_kernel(const int32_t *in, int32_t *out)
{
    const unsigned all = 0xffffffffu;
    int lane = threadIdx.x, x = in[lane];
    out[lane] = __shfl_sync(all, x, lane * 7 & 31);
    out[32 + lane] = __shfl_up_sync(all, x, 3);
    out[64 + lane] = __shfl_down_sync(all, x, 5, 8);
    out[96 + lane] = __shfl_xor_sync(all, x, 9);
    out[128 + lane] = (int)__ballot_sync(all, x & 1);
    out[160 + lane] = (int)__match_any_sync(all, (unsigned)x & 3);
    out[192 + lane] = __reduce_add_sync(all, x);
    out[224 + lane] = lane % 3 == 1 ? __shfl_sync(0x92492492u, x, 31) : 0; /* lanes 1, 4, .. 31 */
}

constexpr int STAGES = 4;

/* 128 threads: 32 of them copy, each 16 bytes of a row. */
__global__ void ring_kernel(const float *in, int n, float *out)
{
    __shared__ __align__(16) float ring[STAGES][128];
    int thread = threadIdx.x;
    auto fetch = [&](int row) {
        if (thread < 32)
            copy16(ring[row % STAGES] + thread * 4, in + row * 128 + thread * 4, row < n);
        copies_commit();
    };
    for (int row = 0; row < STAGES - 1; row++)
        fetch(row);
    float sum = 0;
    for (int row = 0; row < n; row++) {
        copies_wait<STAGES - 2>();
        __syncthreads(); /* the row is there, and the one in front of it has been read */
        fetch(row + STAGES - 1);
        sum += ring[row % STAGES][thread];
    }
    out[thread] = sum;
}

/* Two blocks of 96 threads: the last warp of either sends every second row to both. */
__global__ void QV_CLUSTER(2, 1, 1)
    cluster_kernel(const __grid_constant__ CUtensorMap map, int n, float *out)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ __align__(1024) bf16 ring[STAGES][8 * 64]; /* a row in each 1024 bytes */
    __shared__ uint64_t full[STAGES], empty[STAGES];
    __shared__ __align__(16) float sums[64];
    int thread = threadIdx.x, rank = blockIdx.x;
    if (thread == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], 2 * 64);
        }
        barriers_publish();
    }
    cluster_sync();
    if (thread == 64)
        for (int row = 0; row < n; row++) {
            int stage = row % STAGES;
            barrier_wait(&empty[stage], (row / STAGES & 1) ^ 1);
            barrier_expect(&full[stage], 128);
            if (row % 2 == rank)
                copy_box(ring[stage], &map, 0, row, 0, &full[stage], 3);
        }
    if (thread < 64) {
        float sum = 0;
        for (int row = 0; row < n; row++) {
            int stage = row % STAGES;
            barrier_wait(&full[stage], row / STAGES & 1);
            sum += to_float(ring[stage][tile_at<64>(0, thread)]);
            barrier_arrive_at(&empty[stage], 0);
            barrier_arrive_at(&empty[stage], 1);
        }
        sums[thread] = sum;
    }
    cluster_sync();
    if (thread < 16)
        *(float4 *)(out + rank * 64 + thread * 4) = load_from(sums + thread * 4, rank ^ 1);
    cluster_sync(); /* the other block has read this one's */
#else
    (void)map, (void)n, (void)out;
    __trap();
#endif
}

} // namespace

qv_status test_mma(const void *a, bool a_by_columns, const void *b, bool b_by_columns, float *c)
{
    mma_kernel<<<1, 32>>>((const bf16 *)a, a_by_columns, (const bf16 *)b, b_by_columns, c);
    return qv_k_check_launch("test_mma");
}

qv_status test_wgmma(wgmma_form form, int n, const void *a, const void *b, float *d)
{
    if (form == WGMMA_COLUMNS)
        return launch_wgmma<WGMMA_COLUMNS, 64>(a, b, d);
    if (form == WGMMA_VALUES)
        return n == 64    ? launch_wgmma<WGMMA_VALUES, 64>(a, b, d)
               : n == 128 ? launch_wgmma<WGMMA_VALUES, 128>(a, b, d)
                          : launch_wgmma<WGMMA_VALUES, 256>(a, b, d);
    return n == 32    ? launch_wgmma<WGMMA_ROWS, 32>(a, b, d)
           : n == 64  ? launch_wgmma<WGMMA_ROWS, 64>(a, b, d)
           : n == 144 ? launch_wgmma<WGMMA_ROWS, 144>(a, b, d)
           : n == 96  ? launch_wgmma<WGMMA_ROWS, 96>(a, b, d)
           : n == 176 ? launch_wgmma<WGMMA_ROWS, 176>(a, b, d)
           : n == 16  ? launch_wgmma<WGMMA_ROWS, 16>(a, b, d)
           : n == 72  ? launch_wgmma<WGMMA_ROWS, 72>(a, b, d)
           : n == 104 ? launch_wgmma<WGMMA_ROWS, 104>(a, b, d)
           : n == 136 ? launch_wgmma<WGMMA_ROWS, 136>(a, b, d)
                      : launch_wgmma<WGMMA_ROWS, 128>(a, b, d);
}

qv_status test_shuffles(const int32_t *in, int32_t *out)
{
    shuffles_kernel<<<1, 32>>>(in, out);
    return qv_k_check_launch("test_shuffles");
}

qv_status test_ring(const float *in, int n, float *out)
{
    ring_kernel<<<1, 128>>>(in, n, out);
    return qv_k_check_launch("test_ring");
}

qv_status test_cluster(const void *in, int n, float *out)
{
    const cuuint64_t sizes[3] = {64, (cuuint64_t)n, 1}, strides[2] = {128, (cuuint64_t)n * 128};
    const cuuint32_t box[3] = {64, 1, 1};
    CUtensorMap map;
    QV_TRY(qv_k_tensor_map("test_cluster", in, sizes, strides, box, &map));
    cluster_kernel<<<2, 96>>>(map, n, out);
    return qv_k_check_launch("test_cluster");
}
