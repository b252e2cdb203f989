/* Matrix products for few tokens, and for shapes that nothing else takes.
 *
 * Skinny: y^T [16 rows of W, 8 tokens] = W x^T by mma.m16n8k16 with W as the left operand, so that
 * a decode step pays for the bytes of W and for nothing else: 2 n_out n_in bytes over the
 * bandwidth. W goes from memory straight into fragments. The order of k within 32 is free as long
 * as both operands agree, so thread t of four takes k = 8 t .. 8 t + 7 of a row as one 16-byte
 * load: its numbers 0..3 are the fragment of the first product, 4..7 that of the second. A block is
 * 16 rows of W; its 8 warps take pieces of 128 of k in turn and add up in shared memory, in a fixed
 * order.
 */
#include "kernels/linear_parts.cuh"

namespace
{

constexpr int ANY_WARPS = 8;

__device__ __forceinline__ void store(void *y, bool f32, int64_t at, float v)
{
    if (f32)
        ((float *)y)[at] = v;
    else
        ((bf16 *)y)[at] = __float2bfloat16(v);
}

/* NT tiles of 8 tokens, with a rest two products for each piece of W. The first piece is on its way
 * before the kernel waits for the one before it, whose results x are; each next one before the one
 * at hand is used. */
template <int NT, int WARPS, bool REST>
__global__ void __launch_bounds__(32 * WARPS) skinny_kernel(qv_k_linear_args c)
{
    extern __shared__ float skinny_memory[]; /* 64 KiB for 16 warps and 64 tokens */
    float(*sums)[NT][4][32] = (float(*)[NT][4][32])skinny_memory;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int64_t row0 = (int64_t)blockIdx.x * 16;
    /* Rows beyond the end read the last one, and are not stored. */
    int64_t upper = row0 + g < c.n_out ? row0 + g : c.n_out - 1;
    int64_t lower = row0 + g + 8 < c.n_out ? row0 + g + 8 : c.n_out - 1;
    const bf16 *w0 = (const bf16 *)c.w + upper * c.n_in + t * 8;
    const bf16 *w1 = (const bf16 *)c.w + lower * c.n_in + t * 8;
    const bf16 *x[NT], *rest[REST ? NT : 1];
#pragma unroll
    for (int i = 0; i < NT; i++) {
        int64_t token = i * 8 + g < c.n_tokens ? i * 8 + g : c.n_tokens - 1;
        x[i] = (const bf16 *)c.x + token * c.x_stride + t * 8;
        if (REST)
            rest[i] = (const bf16 *)c.rest + token * c.rest_stride + t * 8;
    }
    float acc[NT][4] = {};
    piece now, next;
    load_piece(now, w0, w1, (int64_t)warp * PIECE, c.n_in);
    wait_for_previous();
    for (int64_t k = (int64_t)warp * PIECE; k < c.n_in; k += WARPS * PIECE) {
        load_piece(next, w0, w1, k + WARPS * PIECE, c.n_in);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (k + j * 32 >= c.n_in)
                break;
#pragma unroll
            for (int i = 0; i < NT; i++) {
                multiply_piece(now, j, x[i] + k + j * 32, acc[i]);
                if (REST)
                    multiply_piece(now, j, rest[i] + k + j * 32, acc[i]);
            }
        }
        now = next;
    }
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            sums[warp][i][j][lane] = acc[i][j];
    __syncthreads();
    /* Number j of lane (g, t) is row g + 8 (j / 2) of token 2 t + j % 2. Threads next to each other
     * take rows next to each other. */
    for (int i = threadIdx.x; i < NT * 128; i += 32 * WARPS) {
        int row = i & 15, token = i >> 4;
        int tile = token >> 3, in_tile = token & 7;
        int j = (row >> 3) * 2 + (in_tile & 1), from = (row & 7) * 4 + (in_tile >> 1);
        float v = 0;
#pragma unroll
        for (int k = 0; k < WARPS; k++)
            v += sums[k][tile][j][from];
        if (row0 + row < c.n_out && token < c.n_tokens)
            store(c.y, c.y_f32, token * c.y_stride + row0 + row, v);
    }
}

/* Few rows leave few blocks, which must then have more in flight each. The choice depends on W
 * alone, so that a row's sums do not depend on how many tokens there are. */
template <int NT, bool REST>
cudaError_t launch_skinny(const qv_k_linear_args &c, cudaStream_t stream)
{
    bool few = qv_k_skinny_linear_warps(&c) == 16;
    unsigned blocks = (unsigned)((c.n_out + 15) / 16);
    size_t bytes = (few ? 16 : 8) * NT * 128 * sizeof(float);
    if (!few)
        return launch_early(true, skinny_kernel<NT, 8, REST>, blocks, 256, bytes, stream, c);
    cudaError_t error = cudaFuncSetAttribute(
        skinny_kernel<NT, 16, REST>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    return error == cudaSuccess
               ? launch_early(true, skinny_kernel<NT, 16, REST>, blocks, 512, bytes, stream, c)
               : error;
}

template <bool REST> cudaError_t choose_skinny(const qv_k_linear_args &c, cudaStream_t stream)
{
    return c.n_tokens <= 8    ? launch_skinny<1, REST>(c, stream)
           : c.n_tokens <= 16 ? launch_skinny<2, REST>(c, stream)
           : c.n_tokens <= 32 ? launch_skinny<4, REST>(c, stream)
                              : launch_skinny<8, REST>(c, stream);
}

/* --- Few rows of W for many tokens: gates ---------------------------------------------------- */

/* A warp a token, which reads it once for every row: bound by reading x where W has a row or two.
 */
__global__ void __launch_bounds__(32 * ANY_WARPS) few_rows_kernel(qv_k_linear_args c)
{
    int lane = threadIdx.x & 31;
    int64_t token = (int64_t)blockIdx.x * ANY_WARPS + (threadIdx.x >> 5);
    if (token >= c.n_tokens)
        return;
    const bf16 *x = (const bf16 *)c.x + token * c.x_stride;
    for (int64_t row = 0; row < c.n_out; row++) {
        const bf16 *w = (const bf16 *)c.w + row * c.n_in;
        float sum = 0;
#pragma unroll 4
        for (int64_t k = lane * 8; k < c.n_in; k += 256) {
            float a[8], b[8];
            unpack8(*(const bf16x8 *)(x + k), a);
            unpack8(*(const bf16x8 *)(w + k), b);
#pragma unroll
            for (int i = 0; i < 8; i++)
                sum = fmaf(a[i], b[i], sum);
        }
        sum = warp_sum(sum);
        if (lane == 0)
            store(c.y, c.y_f32, token * c.y_stride + row, sum);
    }
}

/* --- Any shape ---------------------------------------------------------------------------- */

constexpr int ANY_TOKENS = 8;

/* A warp a row of W and ANY_TOKENS tokens. */
__global__ void __launch_bounds__(32 * ANY_WARPS) any_kernel(qv_k_linear_args c)
{
    int lane = threadIdx.x & 31;
    int64_t row = (int64_t)blockIdx.x * ANY_WARPS + (threadIdx.x >> 5);
    int64_t first = (int64_t)blockIdx.y * ANY_TOKENS;
    if (row >= c.n_out)
        return;
    float acc[ANY_TOKENS] = {};
    for (int64_t k = lane; k < c.n_in; k += 32) {
        float w = c.w_f32 ? ((const float *)c.w)[row * c.n_in + k]
                          : to_float(((const bf16 *)c.w)[row * c.n_in + k]);
#pragma unroll
        for (int i = 0; i < ANY_TOKENS; i++)
            if (first + i < c.n_tokens) {
                float x = to_float(((const bf16 *)c.x)[(first + i) * c.x_stride + k]);
                if (c.rest)
                    x += to_float(((const bf16 *)c.rest)[(first + i) * c.rest_stride + k]);
                acc[i] = fmaf(w, x, acc[i]);
            }
    }
#pragma unroll
    for (int i = 0; i < ANY_TOKENS; i++) {
        float v = warp_sum(acc[i]);
        if (lane == 0 && first + i < c.n_tokens)
            store(c.y, c.y_f32, (first + i) * c.y_stride + row, v);
    }
}

} // namespace

bool qv_k_skinny_linear_can(const qv_k_linear_args *c)
{
    return !c->w_f32 && c->n_tokens <= QV_K_SKINNY_TOKENS && c->n_in % 32 == 0 &&
           (uintptr_t)c->w % 16 == 0 && (uintptr_t)c->x % 16 == 0 && c->x_stride % 8 == 0 &&
           (uintptr_t)c->rest % 16 == 0 && c->rest_stride % 8 == 0;
}

int qv_k_skinny_linear_warps(const qv_k_linear_args *c)
{
    return c->n_out <= 1024 ? 16 : 8;
}

qv_status qv_k_skinny_linear(const qv_k_linear_args *c, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    cudaError_t error = c->rest ? choose_skinny<true>(*c, s) : choose_skinny<false>(*c, s);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: skinny_linear: %s", cudaGetErrorString(error));
    return qv_k_check_launch("skinny_linear");
}

qv_status qv_k_any_linear(const qv_k_linear_args *c, void *stream)
{
    bool vectors = !c->w_f32 && !c->rest && c->n_in % 8 == 0 && c->x_stride % 8 == 0 &&
                   (uintptr_t)c->w % 16 == 0 && (uintptr_t)c->x % 16 == 0;
    if (c->n_out <= QV_K_FEW_ROWS && vectors) {
        unsigned blocks = (unsigned)((c->n_tokens + ANY_WARPS - 1) / ANY_WARPS);
        few_rows_kernel<<<blocks, 32 * ANY_WARPS, 0, (cudaStream_t)stream>>>(*c);
        return qv_k_check_launch("any_linear");
    }
    dim3 grid((unsigned)((c->n_out + ANY_WARPS - 1) / ANY_WARPS),
              (unsigned)((c->n_tokens + ANY_TOKENS - 1) / ANY_TOKENS));
    any_kernel<<<grid, 32 * ANY_WARPS, 0, (cudaStream_t)stream>>>(*c);
    return qv_k_check_launch("any_linear");
}
