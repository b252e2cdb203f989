/* Sums over ranks in one kernel, with the addition to the residual stream and the norm that follow,
 * and the gathering of columns: collectives of few bytes, where the time is latency.
 *
 * Every rank writes what it has straight into memory of every other rank, four bytes of data beside
 * four of a flag, which arrive together (a vector of 16 bytes holds two such pairs): whoever reads
 * the expected flag has the data, and no fence, no barrier and no second message is needed. That
 * doubles the bytes, which matters only for messages that should go another way.
 *
 * A block has a slot at each rank, in two halves that it uses in turn, and a counter of its own,
 * the epoch, whose value is the flag. The block with the same index of every rank takes the same
 * rows. A half may be written again when its reader is done with it: the reader's next message,
 * which the writer waits for before it comes back to this half, was sent after that (a block ends a
 * message with a barrier, for threads that have no part of the next one). So nothing is cleared,
 * and a recorded kernel finds the epoch where the last one left it. All of a rank's blocks must be
 * able to run at the same time as those of the others.
 *
 * Cost of a sum of m bytes a rank: 2 (n - 1) m bytes out and as many in; for a row of some
 * kilobytes about one way over the link and back.
 */
#include "kernels/device.cuh"
#include "kernels/kernels_comm.h"
#include "kernels/norm_row.cuh"

namespace
{

constexpr int THREADS = 256;
constexpr int MAX_CHUNKS = QV_K_SLOT_NUMBERS / (THREADS * 8); /* of 8 numbers, of a thread */
constexpr int POLLS = 256; /* between two looks at the clock and whether the group has failed */

enum mode { SUM, SUM_ADD_NORM };

/* Lines of a slot's half: chunk j of a thread is lines 4 j to 4 j + 3 of THREADS each. */
__device__ __forceinline__ uint4 *half_of(const qv_k_direct &d, int at, int from, uint32_t epoch)
{
    int64_t half = ((int64_t)(epoch & 1) * d.n_ranks + from) * d.n_slots + blockIdx.x;
    return (uint4 *)d.slots[at] + half * (QV_K_SLOT_NUMBERS / 2);
}

__device__ __forceinline__ bool has_come(const uint4 &line, uint32_t flag)
{
    return line.y == flag && line.w == flag;
}

/* Waits of one thread: when it began, and whether it has given up. */
struct patience {
    uint64_t since;
    bool lost;
};

/* When the wait for a rank began, or 0 to give up: the group has failed, or the rank has not come
 * for too long; then all shall give up. Arguments by value, which need no stack. */
__device__ __noinline__ uint64_t wait_on(int32_t *stop, int32_t *missed, uint64_t patience_ns,
                                         int from, uint64_t since)
{
    if (*(volatile int32_t *)stop != 0)
        return 0;
    uint64_t now = now_ns();
    if (since == 0)
        since = now;
    if (now - since < patience_ns)
        return since;
    *(volatile int32_t *)missed = from + 1;
    *(volatile int32_t *)stop = 1;
    __threadfence_system();
    return 0;
}

__device__ __forceinline__ bool gives_up(const qv_k_direct &d, int from, patience &p)
{
    p.since = wait_on(d.stop, d.missed, d.patience_ns, from, p.since);
    p.lost = p.since == 0;
    return p.lost;
}

/* The two words of a line once its flag is there; anything when the wait is given up. */
__device__ __forceinline__ void take_line(const qv_k_direct &d, const uint4 *line, uint32_t flag,
                                          int from, patience &p, uint32_t &a, uint32_t &b)
{
    for (int i = 0;; i++) {
        uint4 v = look_at(line);
        a = v.x;
        b = v.z;
        if (has_come(v, flag) || p.lost)
            return;
        if (i == POLLS) {
            i = 0;
            if (gives_up(d, from, p))
                return;
        }
    }
}

struct chunk {
    float f[8];
};

/* Eight numbers of a row at `i`, zeros beyond its end. `whole`: rows are made of aligned eights. */
__device__ __forceinline__ chunk load8(const float *row, int i, int64_t n, bool whole)
{
    chunk v = {};
    if (i >= n)
        return v;
    if (whole) {
        float4 a = *(const float4 *)(row + i), b = *(const float4 *)(row + i + 4);
        return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    }
#pragma unroll
    for (int k = 0; k < 8; k++)
        if (i + k < n)
            v.f[k] = row[i + k];
    return v;
}

__device__ __forceinline__ void store8(float *row, int i, int64_t n, bool whole, const chunk &v)
{
    if (i >= n)
        return;
    if (whole) {
        *(float4 *)(row + i) = make_float4(v.f[0], v.f[1], v.f[2], v.f[3]);
        *(float4 *)(row + i + 4) = make_float4(v.f[4], v.f[5], v.f[6], v.f[7]);
        return;
    }
#pragma unroll
    for (int k = 0; k < 8; k++)
        if (i + k < n)
            row[i + k] = v.f[k];
}

/* Chunk j of this rank's row to all others. */
__device__ __forceinline__ void send(const qv_k_direct &d, uint32_t epoch, int j, const chunk &own)
{
    for (int k = 1; k < d.n_ranks; k++) {
        int to = d.rank + k < d.n_ranks ? d.rank + k : d.rank + k - d.n_ranks;
        uint4 *line = half_of(d, to, d.rank, epoch) + 4 * j * THREADS + threadIdx.x;
#pragma unroll
        for (int q = 0; q < 4; q++)
            put_line(line + q * THREADS, __float_as_uint(own.f[2 * q]),
                     __float_as_uint(own.f[2 * q + 1]), epoch);
    }
}

/* Chunk j summed over the ranks, at most N, in their order. The lines of all are looked at
 * together, so that the wait is for the slowest and not for one after the other. */
template <int N>
__device__ __forceinline__ chunk sum_ranks(const qv_k_direct &d, uint32_t epoch, int j,
                                           const chunk &own, patience &p)
{
    const uint4 *line = half_of(d, d.rank, 0, epoch) + 4 * j * THREADS + threadIdx.x;
    int64_t apart = (int64_t)d.n_slots * (QV_K_SLOT_NUMBERS / 2);
    uint4 v[N][4];
    for (int i = 0;; i++) {
        int missing = -1;
#pragma unroll
        for (int r = 0; r < N; r++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                if (r < d.n_ranks && r != d.rank)
                    v[r][q] = look_at(line + r * apart + q * THREADS);
#pragma unroll
        for (int r = 0; r < N; r++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                if (r < d.n_ranks && r != d.rank && !has_come(v[r][q], epoch))
                    missing = r;
        if (missing < 0 || p.lost)
            break;
        if (i == POLLS) {
            i = 0;
            if (gives_up(d, missing, p))
                break;
        }
    }
    chunk s = {};
#pragma unroll
    for (int r = 0; r < N; r++) {
        if (r >= d.n_ranks)
            break;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            s.f[2 * q] += r == d.rank ? own.f[2 * q] : __uint_as_float(v[r][q].x);
            s.f[2 * q + 1] += r == d.rank ? own.f[2 * q + 1] : __uint_as_float(v[r][q].z);
        }
    }
    return s;
}

/* y and rest of a row whose residual is v. */
template <int NC>
__device__ __forceinline__ void norm_row(const qv_k_exchange &c, int64_t row, const chunk (&v)[NC],
                                         const chunk (&gain)[NC], float squares)
{
    float scale = norm_scale(squares, c.n, c.eps);
    bf16 *y = (bf16 *)c.y + row * c.y_stride, *rest = (bf16 *)c.rest + row * c.rest_stride;
#pragma unroll
    for (int j = 0; j < NC; j++) {
        int i = ((int)threadIdx.x + j * THREADS) * 8;
        if (i < c.n)
            store_normed(v[j].f, gain[j].f, scale, c.plus_one, y + i, rest + i, c.rest != nullptr);
    }
}

/* NC chunks of 8 numbers a thread: rows of up to 2048 NC. With SUM, x becomes the sum. Otherwise
 * z += sum, y = norm(z) and its rest as norm.cu has them, with sums in the same order. */
template <mode MODE, int NC, int N>
__global__ void __launch_bounds__(THREADS)
    exchange_kernel(const __grid_constant__ qv_k_direct d, qv_k_exchange c)
{
    if (d.let_next)
        let_next_start();
    __shared__ float shared[8];
    patience p = {0, false};
    uint32_t epoch = d.epoch[blockIdx.x];
    for (int64_t row = blockIdx.x; row < c.n_rows; row += gridDim.x) {
        epoch++;
        float *x = c.x + row * c.x_stride, *z = c.z + row * c.z_stride;
        int64_t n = MODE == SUM && row == c.n_rows - 1 ? c.n_last : c.n;
        chunk own[NC], before[NC], gain[NC];
#pragma unroll
        for (int j = 0; j < NC; j++) {
            int i = ((int)threadIdx.x + j * THREADS) * 8;
            own[j] = load8(x, i, n, c.whole);
            if (i < n)
                send(d, epoch, j, own[j]);
        }
        if constexpr (MODE == SUM_ADD_NORM) {
#pragma unroll
            for (int j = 0; j < NC; j++) { /* while the row is on its way */
                int i = ((int)threadIdx.x + j * THREADS) * 8;
                before[j] = load8(z, i, n, true);
                gain[j] = load8(c.w, i, n, true);
            }
        }
        float squares = 0;
#pragma unroll
        for (int j = 0; j < NC; j++) {
            int i = ((int)threadIdx.x + j * THREADS) * 8;
            if (i >= n)
                continue;
            chunk sum = sum_ranks<N>(d, epoch, j, own[j], p);
            if constexpr (MODE == SUM) {
                store8(x, i, n, c.whole, sum);
            } else {
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    before[j].f[k] += sum.f[k];
                    squares = fmaf(before[j].f[k], before[j].f[k], squares);
                }
                store8(z, i, n, true, before[j]);
            }
        }
        if constexpr (MODE == SUM_ADD_NORM)
            norm_row<NC>(c, row, before, gain, block_sum(squares, shared));
        __syncthreads(); /* also for `shared` */
    }
    if (threadIdx.x == 0)
        d.epoch[blockIdx.x] = epoch;
}

/* Blocks of numbers of 32 bits: rank r has `n` of each row at part[r's own], rank 0 puts them into
 * columns [r n, (r + 1) n). A row is cut into slots' worth. Rank 0 answers each line once it has
 * those of all ranks, so that a rank which comes back to a half knows that every one is done. */
__global__ void __launch_bounds__(THREADS)
    gather_kernel(const __grid_constant__ qv_k_direct d, qv_k_gather c)
{
    if (d.let_next)
        let_next_start();
    constexpr int PER_SLOT = QV_K_SLOT_NUMBERS, LINES = PER_SLOT / 2 / THREADS;
    patience p = {0, false};
    uint32_t epoch = d.epoch[blockIdx.x];
    int64_t per_row = (c.n + PER_SLOT - 1) / PER_SLOT, n_pieces = c.n_rows * per_row;
    for (int64_t piece = blockIdx.x; piece < n_pieces; piece += gridDim.x) {
        epoch++;
        int64_t row = piece / per_row, first = piece % per_row * PER_SLOT;
        int n = (int)(c.n - first < PER_SLOT ? c.n - first : PER_SLOT);
        const uint32_t *part = (const uint32_t *)c.part + row * c.part_stride + first;
        uint32_t *whole = (uint32_t *)c.whole + row * c.whole_stride + first;
        if (d.rank != 0) {
            uint4 *half = half_of(d, 0, d.rank, epoch);
#pragma unroll
            for (int j = 0; j < LINES; j++) {
                int line = j * THREADS + (int)threadIdx.x, i = 2 * line;
                if (i < n)
                    put_line(half + line, part[i], i + 1 < n ? part[i + 1] : 0, epoch);
            }
            const uint4 *answer = half_of(d, d.rank, 0, epoch);
            for (int j = 0; j < LINES; j++) {
                int line = j * THREADS + (int)threadIdx.x;
                uint32_t a, b;
                if (2 * line < n)
                    take_line(d, answer + line, epoch, 0, p, a, b);
            }
        }
        for (int j = 0; j < LINES && d.rank == 0; j++) {
            int line = j * THREADS + (int)threadIdx.x, i = 2 * line;
            if (i >= n)
                break;
            for (int r = 0; r < d.n_ranks; r++) {
                uint32_t a = 0, b = 0;
                if (r == 0) {
                    a = part[i];
                    b = i + 1 < n ? part[i + 1] : 0;
                } else {
                    take_line(d, half_of(d, 0, r, epoch) + line, epoch, r, p, a, b);
                }
                whole[r * c.n + i] = a;
                if (i + 1 < n)
                    whole[r * c.n + i + 1] = b;
            }
            for (int r = 1; r < d.n_ranks; r++)
                put_line(half_of(d, r, 0, epoch) + line, 0, 0, epoch);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0)
        d.epoch[blockIdx.x] = epoch;
}

unsigned grid_of(const qv_k_direct *d, int64_t n)
{
    return (unsigned)(n < d->n_slots ? n : d->n_slots);
}

bool aligned(const void *p, int64_t stride, int size)
{
    return (uintptr_t)p % 16 == 0 && stride * size % 16 == 0;
}

template <mode MODE, int NC>
void launch_chunks(const qv_k_direct *d, const qv_k_exchange &c, cudaStream_t s)
{
    unsigned grid = grid_of(d, c.n_rows);
    if (d->n_ranks <= 2)
        exchange_kernel<MODE, NC, 2><<<grid, THREADS, 0, s>>>(*d, c);
    else if (d->n_ranks <= 4)
        exchange_kernel<MODE, NC, 4><<<grid, THREADS, 0, s>>>(*d, c);
    else
        exchange_kernel<MODE, NC, QV_K_DIRECT_RANKS><<<grid, THREADS, 0, s>>>(*d, c);
}

template <mode MODE> void launch(const qv_k_direct *d, const qv_k_exchange &c, cudaStream_t s)
{
    if (c.n <= THREADS * 8)
        launch_chunks<MODE, 1>(d, c, s);
    else if (c.n <= THREADS * 16)
        launch_chunks<MODE, 2>(d, c, s);
    else
        launch_chunks<MODE, MAX_CHUNKS>(d, c, s);
}

} // namespace

size_t qv_k_direct_bytes(int32_t n_ranks, int32_t n_slots)
{
    return (size_t)2 * (size_t)n_ranks * (size_t)n_slots * QV_K_SLOT_BYTES;
}

qv_status qv_k_direct_sum(const qv_k_direct *d, float *x, int64_t n, void *stream)
{
    /* Rows are pieces: long enough to fill a block, short enough to use many blocks. */
    int64_t piece = n > (int64_t)d->n_slots * THREADS * 8 ? THREADS * 16 : THREADS * 8;
    qv_k_exchange c = {};
    c.x = x;
    c.x_stride = piece;
    c.n_rows = (n + piece - 1) / piece;
    c.n = piece;
    c.n_last = n - (c.n_rows - 1) * piece;
    c.whole = aligned(x, 0, 4) && n % 8 == 0;
    launch<SUM>(d, c, (cudaStream_t)stream);
    return qv_k_check_launch("direct_sum");
}

bool qv_k_direct_sum_add_norm_can(const qv_k_exchange *c)
{
    return c->n % 8 == 0 && c->n <= QV_K_SLOT_NUMBERS && aligned(c->x, c->x_stride, 4) &&
           aligned(c->z, c->z_stride, 4) && aligned(c->y, c->y_stride, 2) &&
           aligned(c->rest, c->rest_stride, 2) && aligned(c->w, 0, 4);
}

qv_status qv_k_direct_sum_add_norm(const qv_k_direct *d, const qv_k_exchange *args, void *stream)
{
    qv_k_exchange c = *args;
    c.n_last = c.n;
    c.whole = true;
    launch<SUM_ADD_NORM>(d, c, (cudaStream_t)stream);
    return qv_k_check_launch("direct_sum_add_norm");
}

qv_status qv_k_direct_gather(const qv_k_direct *d, const qv_k_gather *c, void *stream)
{
    int64_t pieces = c->n_rows * ((c->n + QV_K_SLOT_NUMBERS - 1) / QV_K_SLOT_NUMBERS);
    gather_kernel<<<grid_of(d, pieces), THREADS, 0, (cudaStream_t)stream>>>(*d, *c);
    return qv_k_check_launch("direct_gather");
}
