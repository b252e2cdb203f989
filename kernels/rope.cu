/* RoPE with the write of pages, alone or with the norms of q and k in front of it.
 *
 * Alone, a block has a token; q is rotated where it stands, k and v go to their pages. With the
 * norms, each number is read once and written once, 16 bytes a thread: 4 bytes for each number of
 * q, k and v, bound by bandwidth; at decode by the latency of one pass. A head is 16 or 32 threads,
 * 8 numbers each, which keep it in registers from the sum of squares to the rotation. What three
 * ops would have stored in between is rounded as if they had, and the sum runs in the order of
 * norm.cu, so the numbers are the same to the bit.
 */
#include "kernels/kernels_dense.h"
#include "kernels/norm_row.cuh"

namespace
{

constexpr int THREADS = 256;
constexpr int MAX_ROTARY = 1024;
constexpr double TURN = 0.15915494309189535; /* 1 / (2 pi) */
constexpr int KNOWN = 128;                   /* frequencies that travel with the launch */

struct frequencies {
    double f[KNOWN]; /* theta^(-2i / rotary_dim), in turns: over 2 pi */
};

frequencies find_frequencies(const qv_k_rope_args &c)
{
    frequencies known;
    for (int i = 0; i < KNOWN; i++)
        known.f[i] = i < c.rotary_dim / 2 ? pow(c.theta, -2.0 * i / c.rotary_dim) * TURN : 0;
    return known;
}

/* The angles of a position, at most MOST of them, by all threads of the block. */
template <int MOST>
__device__ __forceinline__ void find_angles(const qv_k_rope_args &c, const frequencies &known,
                                            int pos, float *cosine, float *sine)
{
    for (int i = threadIdx.x; i < c.rotary_dim / 2; i += THREADS) {
        double f =
            MOST <= KNOWN || i < KNOWN ? known.f[i] : pow(c.theta, -2.0 * i / c.rotary_dim) * TURN;
        /* Whole turns off in double; what is left is small enough for float32. */
        double turns = __dmul_rn(pos, f);
        sincospif((float)(2.0 * (turns - rint(turns))), &sine[i], &cosine[i]);
    }
}

/* One number of a pair, given the other: a cos - b sin of the first; of the second, with the sine
 * turned over, b cos + a sin. Each product is rounded, as on the CPU, and not fused into the sum in
 * one kernel and left alone in another. */
__device__ __forceinline__ float turn(float own, float other, float cosine, float sine)
{
    return __fadd_rn(__fmul_rn(own, cosine), -__fmul_rn(other, sine));
}

/* Where a token's keys and values are: elements from the start of the pages. */
__device__ __forceinline__ int64_t find_slot(const qv_k_rope_args &c, int seq, int pos)
{
    int64_t page = c.page_table[(int64_t)seq * c.page_stride + pos / c.page_tokens];
    return (page * c.page_tokens + pos % c.page_tokens) * c.n_kv_heads * c.head_dim;
}

/* --- Alone -------------------------------------------------------------------------------- */

/* A block a token: the angles once into shared memory, then all heads. A thread turns both numbers
 * of a pair; numbers that do not turn are copied. */
__global__ void __launch_bounds__(THREADS)
    rope_kernel(qv_k_rope_args c, __grid_constant__ const frequencies known)
{
    __shared__ float cosine[MAX_ROTARY / 2], sine[MAX_ROTARY / 2];
    int t = blockIdx.x, half = c.rotary_dim / 2, d = c.head_dim;
    if (t >= c.seq_start[c.n_seqs])
        return;
    int pos = c.pos[t];
    find_angles<MAX_ROTARY / 2>(c, known, pos, cosine, sine);
    int64_t slot = find_slot(c, range_of(c.seq_start, c.n_seqs, t), pos);
    __syncthreads();

    bf16 *q = (bf16 *)c.q.data + t * c.q.token;
    for (int i = threadIdx.x; i < c.n_heads * half; i += THREADS) {
        int head = i / half, j = i - head * half;
        bf16 *p = q + head * c.q.head + j;
        float a = to_float(p[0]), b = to_float(p[half]);
        p[0] = __float2bfloat16(turn(a, b, cosine[j], sine[j]));
        p[half] = __float2bfloat16(turn(b, a, cosine[j], -sine[j]));
    }
    const bf16 *k = (const bf16 *)c.k.data + t * c.k.token;
    const bf16 *v = (const bf16 *)c.v.data + t * c.v.token;
    bf16 *k_out = (bf16 *)c.k_pages + slot, *v_out = (bf16 *)c.v_pages + slot;
    for (int i = threadIdx.x; i < c.n_kv_heads * d; i += THREADS) {
        int head = i / d, j = i - head * d;
        v_out[i] = v[head * c.v.head + j];
        const bf16 *p = k + head * c.k.head;
        float x = to_float(p[j]);
        if (j < half)
            x = turn(x, to_float(p[j + half]), cosine[j], sine[j]);
        else if (j < 2 * half)
            x = turn(x, to_float(p[j - half]), cosine[j - half], -sine[j - half]);
        k_out[i] = __float2bfloat16(x);
    }
}

/* --- With the norms ----------------------------------------------------------------------- */

constexpr int MAX_NORMED = 256; /* numbers of a head */
constexpr int BLOCKS = 1024;    /* about what a device has room for at once */

/* A token's heads in a row: those of q, of k, of v. */
enum head_kind { QUERY, KEY, VALUE };

struct head_place {
    head_kind kind;
    const bf16 *from;
    int64_t to; /* from the start of the pages, without the token's slot */
};

__device__ __forceinline__ head_place find_head(const qv_k_rope_args &c, int t, int head)
{
    if (head < c.n_heads)
        return {QUERY, (const bf16 *)c.q.data + t * c.q.token + head * c.q.head, 0};
    head -= c.n_heads;
    if (head < c.n_kv_heads)
        return {KEY, (const bf16 *)c.k.data + t * c.k.token + head * c.k.head,
                (int64_t)head * c.head_dim};
    head -= c.n_kv_heads;
    return {VALUE, (const bf16 *)c.v.data + t * c.v.token + head * c.v.head,
            (int64_t)head * c.head_dim};
}

/* A head's 8 numbers of a thread, normed and rounded. All threads of the warp. */
template <int LANES>
__device__ __forceinline__ bf16x8 norm_head(const qv_k_norm_rope_args &a, bf16x8 packed,
                                            const float *w, bool there)
{
    float v[8], g[8], squares = 0;
    unpack8(packed, v);
#pragma unroll
    for (int k = 0; k < 8; k++)
        squares = fmaf(v[k], v[k], squares);
    squares = lanes_sum<LANES>(squares);
    float scale = norm_scale(squares, a.rope.head_dim, a.eps);
    float4 w0 = {}, w1 = {};
    if (there) {
        w0 = *(const float4 *)w;
        w1 = *(const float4 *)(w + 4);
    }
    g[0] = w0.x, g[1] = w0.y, g[2] = w0.z, g[3] = w0.w;
    g[4] = w1.x, g[5] = w1.y, g[6] = w1.z, g[7] = w1.w;
#pragma unroll
    for (int k = 0; k < 8; k++)
        v[k] = v[k] * scale * (a.plus_one ? 1.0f + g[k] : g[k]);
    return pack8(v);
}

/* The same 8 numbers turned: those they are paired with are half / 8 lanes away. All threads of the
 * warp. */
template <int LANES>
__device__ __forceinline__ bf16x8 turn_head(bf16x8 own, int lane, int half, const float *cosine,
                                            const float *sine)
{
    int apart = half / 8;
    bool first = lane < apart, turns = lane < 2 * apart;
    int partner = first ? lane + apart : turns ? lane - apart : lane;
    bf16x8 other = {make_uint4(__shfl_sync(0xffffffffu, own.u.x, partner, LANES),
                               __shfl_sync(0xffffffffu, own.u.y, partner, LANES),
                               __shfl_sync(0xffffffffu, own.u.z, partner, LANES),
                               __shfl_sync(0xffffffffu, own.u.w, partner, LANES))};
    if (!turns)
        return own;
    float a[8], b[8];
    unpack8(own, a);
    unpack8(other, b);
    int angle = (first ? lane : partner) * 8;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        float s = sine[angle + k];
        a[k] = turn(a[k], b[k], cosine[angle + k], first ? s : -s);
    }
    return pack8(a);
}

/* A block has a token, or with gridDim.y > 1 a part of its heads, as many at a time as it has
 * threads for; the next ones are on their way while one is worked on. */
template <int LANES>
__global__ void __launch_bounds__(THREADS)
    norm_rope_kernel(qv_k_norm_rope_args a, __grid_constant__ const frequencies known)
{
    constexpr int AT_ONCE = THREADS / LANES;
    __shared__ __align__(16) float cosine[MAX_NORMED / 2], sine[MAX_NORMED / 2];
    let_next_start();
    const qv_k_rope_args &c = a.rope;
    int t = blockIdx.x, n = c.n_heads + 2 * c.n_kv_heads, step = gridDim.y * AT_ONCE;
    if (t >= c.seq_start[c.n_seqs])
        return;
    int lane = threadIdx.x % LANES, col = lane * 8;
    int own = blockIdx.y * AT_ONCE + threadIdx.x / LANES; /* head; n and more: none */
    auto load = [&](int head) {
        return head < n && col < c.head_dim ? *(const bf16x8 *)(find_head(c, t, head).from + col)
                                            : bf16x8{};
    };
    bf16x8 x = load(own);
    int pos = c.pos[t];
    find_angles<MAX_NORMED / 2>(c, known, pos, cosine, sine);
    /* A sequence of one token, in a step of such, needs no search. */
    bool single = t < c.n_seqs && c.seq_start[t] == t && c.seq_start[t + 1] == t + 1;
    int64_t slot = find_slot(c, single ? t : range_of(c.seq_start, c.n_seqs, t), pos);
    __syncthreads();

    /* All threads of a warp go round as often. */
    for (int first = blockIdx.y * AT_ONCE; first < n; first += step, own += step) {
        bool there = own < n && col < c.head_dim;
        bf16x8 next = load(own + step);
        head_place at = find_head(c, t, own < n ? own : 0);
        const float *w = (at.kind == QUERY ? a.q_norm : a.k_norm) + col;
        bf16x8 turned = turn_head<LANES>(norm_head<LANES>(a, x, w, there), lane, c.rotary_dim / 2,
                                         cosine, sine);
        if (there) {
            bf16 *to = at.kind == QUERY ? (bf16 *)at.from
                       : at.kind == KEY ? (bf16 *)c.k_pages + slot + at.to
                                        : (bf16 *)c.v_pages + slot + at.to;
            *(bf16x8 *)(to + col) = at.kind == VALUE ? x : turned;
        }
        x = next;
    }
}

bool aligned(const qv_k_rows &r)
{
    return (uintptr_t)r.data % 16 == 0 && r.token % 8 == 0 && r.head % 8 == 0;
}

bool aligned(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

template <int LANES> void launch(const qv_k_norm_rope_args &a, cudaStream_t stream)
{
    const qv_k_rope_args &c = a.rope;
    int at_once = THREADS / LANES, most = (c.n_heads + 2 * c.n_kv_heads + at_once - 1) / at_once;
    int parts = c.n_tokens < BLOCKS ? BLOCKS / c.n_tokens : 1;
    dim3 grid((unsigned)c.n_tokens, (unsigned)(parts < most ? parts : most));
    norm_rope_kernel<LANES><<<grid, THREADS, 0, stream>>>(a, find_frequencies(c));
}

} // namespace

qv_status qv_k_rope_kv_write(const qv_k_rope_args *args, void *stream)
{
    if (args->rotary_dim > MAX_ROTARY)
        return qv_fail(QV_ERR_LIMIT, "rope_kv_write: %d rotary dimensions, but %d are possible",
                       args->rotary_dim, MAX_ROTARY);
    rope_kernel<<<(unsigned)args->n_tokens, THREADS, 0, (cudaStream_t)stream>>>(
        *args, find_frequencies(*args));
    return qv_k_check_launch("rope_kv_write");
}

bool qv_k_norm_rope_can(const qv_k_norm_rope_args *a)
{
    const qv_k_rope_args &c = a->rope;
    return c.head_dim % 8 == 0 && c.head_dim <= MAX_NORMED && c.rotary_dim % 16 == 0 &&
           aligned(c.q) && aligned(c.k) && aligned(c.v) && aligned(c.k_pages) &&
           aligned(c.v_pages) && aligned(a->q_norm) && aligned(a->k_norm);
}

qv_status qv_k_norm_rope_kv_write(const qv_k_norm_rope_args *args, void *stream)
{
    if (args->rope.head_dim <= 128)
        launch<16>(*args, (cudaStream_t)stream);
    else
        launch<32>(*args, (cudaStream_t)stream);
    return qv_k_check_launch("norm_rope_kv_write");
}
