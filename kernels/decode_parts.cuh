/* What the two kinds of blocks of decode_linear.cu share: their shared memory, and the ring through
 * which one warp hands over what it fetches.
 */
#ifndef QV_KERNELS_DECODE_PARTS_CUH
#define QV_KERNELS_DECODE_PARTS_CUH

#include "kernels/linear_parts.cuh"
#include "kernels/wgmma_shapes.cuh"

namespace
{

constexpr int STEP = 64;      /* of k, of a stage */
constexpr int MAX_SHARES = 8; /* blocks of a cluster */
constexpr int ROWS = 64;      /* of W, of a block */
constexpr int WORKERS = 128;
constexpr int BLOCKS = 3; /* of a multiprocessor */
constexpr int WORKERS_BARRIER = 1;
/* Where a block that has all of k has its units, in eighths of its steps: behind them W is on its
 * way while B x1 goes on, but x1 must be there. Of 4 to 8 the best on an H100. */
constexpr int UNITS_AT = 6;

constexpr int ITEMS = 8;       /* of shrink, of a block at a time */
constexpr int ITEM_TOKENS = 8; /* of an item */
constexpr int ITEM_SUMS = RANKS * ITEM_TOKENS;
static_assert(ITEM_SUMS == WORKERS, "a sum for each thread");

/* One adapter in one slice. */
struct entry {
    int32_t slot;
    float scale;
    uint16_t first, n; /* tokens */
    uint16_t rank;
    uint8_t plane, slice;
};

/* 16 ranks of a plane of A by up to 8 tokens. */
struct shrink_item {
    int32_t matrix;            /* slot * planes + plane */
    uint16_t first_rank, rank; /* rank: the plane's */
    uint16_t first, n;         /* tokens */
    uint16_t plane;
};

/* Room for N tokens. */
template <int N_, int STAGES_, bool LORA_> struct form {
    static constexpr int N = N_, STAGES = STAGES_;
    static constexpr bool LORA = LORA_;
    static constexpr int THREADS = WORKERS + (LORA ? 64 : 32); /* one warp fetches, one looks up */
    static constexpr int ENTRIES = LORA ? N * QV_K_STREAM_SLICES : 1;
    static constexpr int SHRINKS = LORA ? ITEMS : 1;
};

template <class F> struct decode_shared {
    union {
        /* Of a stage, w: rows of W; units of B, each [rank][64]; or A, 4 x [16][64]. x: tokens; x1
         * of the units, float32 [token][rank]; or tokens, 4 x [8][64]. */
        struct {
            bf16 w[F::STAGES][ROWS * STEP];
            bf16 x[F::STAGES][F::N * STEP];
        };
        float sums[F::N][ROWS + 4]; /* [token][row]: lanes of a fragment hit different banks */
    };
    /* full: W and x, or B, are there. x1_full: x1 is. empty: what the stage held has been read.
     * found: the entries are there. */
    uint64_t full[F::STAGES], x1_full[F::STAGES], empty[F::STAGES], found;
    union {
        entry entries[F::ENTRIES];
        struct {
            __align__(16) float x1[F::SHRINKS][ITEM_SUMS]; /* [token][rank] */
            float parts[2][WORKERS / 32][ITEM_SUMS];       /* of a warp, in turn */
            shrink_item items[F::SHRINKS];
            int counts[F::THREADS / 32];
        };
    };
    int n_entries, n_units, widest; /* widest: rows of tiles of 8 tokens that an entry touches */
};

/* What a block works on. */
struct place {
    int row0;                /* first row of W */
    int n;                   /* tokens */
    int share, n_shares;     /* of k */
    int first_step, n_steps; /* of k */
    int units_at;            /* steps ahead of the units of adapters */
};

/* --- Units of adapters --------------------------------------------------------------------- */

/* Whether every entry's tokens fit in half the room for x1. */
template <class F> __device__ __forceinline__ bool is_narrow(const decode_shared<F> &m)
{
    return m.widest <= F::N / 2;
}

/* Units of a stage: x1 has its room; adapters of few tokens have twice as many in it. */
template <class F> __device__ __forceinline__ int units_of_stage(const decode_shared<F> &m)
{
    return is_narrow(m) ? 2 * UNITS : UNITS;
}

/* The first token of a unit's rows of x1. */
template <class F>
__device__ __forceinline__ int first_row(const decode_shared<F> &m, const entry &e)
{
    return is_narrow(m) ? e.first & ~7 : 0;
}

/* x1 of a unit of a stage: [token][rank]. */
template <class F> __device__ __forceinline__ float *x1_of(decode_shared<F> &m, int at, int unit)
{
    return (float *)m.x[at] + unit * (is_narrow(m) ? F::N / 2 : F::N) * RANKS;
}

/* --- The ring ------------------------------------------------------------------------------ */

/* Wait until what a stage held before `step` has been read. */
template <class F> __device__ __forceinline__ void wait_for_stage(decode_shared<F> &m, int step)
{
    if (step >= F::STAGES)
        barrier_wait(&m.empty[step % F::STAGES], (step / F::STAGES - 1) & 1);
}

/* Where a warp reads: a stage, and the parity of its phase. */
struct reader {
    int at, parity;
};

/* This warp has read the stage: who fetches into it may go on. */
template <class F> __device__ __forceinline__ void release(decode_shared<F> &m, reader &r)
{
    if ((threadIdx.x & 31) == 0)
        barrier_arrive(&m.empty[r.at]);
    if (++r.at == F::STAGES) {
        r.at = 0;
        r.parity ^= 1;
    }
}

} // namespace

#endif
