/* What the two kinds of blocks of decode_linear.cu share: their shared memory, what they work on.
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
constexpr int BLOCKS = 3;  /* of a multiprocessor */
constexpr int ADDERS = 96; /* threads that add adapters */
/* The fewer bytes are on order, the sooner what all wait for comes. While a block has more units of
 * B before it than so many, and x1 is not there, it has so many stages of W on order. */
constexpr int HURRY_UNITS = 16, HURRY_STAGES = 2;
/* Of a thread, of which the launch gives each 80: of the workers, and of the others. */
constexpr int WORK_REGISTERS = 64, ADD_REGISTERS = 96;
static_assert(WORKERS * WORK_REGISTERS + (ADDERS + 32) * ADD_REGISTERS <=
                  (WORKERS + ADDERS + 32) * (65536 / ((WORKERS + ADDERS + 32) * BLOCKS) / 8 * 8),
              "who asks for more than there are waits for ever");
constexpr int WORKERS_BARRIER = 1, ADDERS_BARRIER = 2;

constexpr int ITEMS = 8;       /* of shrink, of a block at a time */
constexpr int ITEM_TOKENS = 8; /* of an item */
constexpr int ITEM_SUMS = RANKS * ITEM_TOKENS;
static_assert(ITEM_SUMS == WORKERS, "a sum for each thread");

/* Some tokens of one adapter, for all slices that a block's rows touch; one part is of no rank. */
struct entry {
    int32_t slot;
    uint16_t first, n; /* tokens */
    int32_t rank;      /* the largest of the parts */
    struct {
        float scale;
        uint16_t rank, plane;
    } parts[QV_K_STREAM_SLICES + 1]; /* slice by slice */
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
    static constexpr int THREADS = WORKERS + 32 + (LORA ? ADDERS : 0); /* one warp fetches */
    static constexpr int ENTRIES = LORA ? N : 1;                       /* each has a token */
    static constexpr int SHRINKS = LORA ? ITEMS : 1;
};

template <class F> struct decode_shared {
    /* Of a stage, w: rows of W; or A, 4 x [16][64]. x: tokens; or 4 x [8][64] of them. */
    bf16 w[F::STAGES][ROWS * STEP];
    bf16 x[F::STAGES][F::N * STEP];
    union {
        /* [token][row]: those of adapters, then all. Lanes of a fragment hit different banks. */
        float sums[F::N][ROWS + 4];
        struct {
            __align__(16) float x1[F::SHRINKS][ITEM_SUMS]; /* [token][rank] */
            float parts[2][WORKERS / 32][ITEM_SUMS];       /* of a warp, in turn */
            shrink_item items[F::SHRINKS];
            int counts[F::THREADS / 32];
        };
    };
    uint64_t full[F::STAGES], empty[F::STAGES]; /* a stage is there; it has been read */
    entry entries[F::ENTRIES];
    int n_entries, n_units;
    int calm; /* 1: no hurry, or none any more */
};

/* What a block works on. */
struct place {
    int row0;                /* first row of W */
    int n;                   /* tokens */
    int share, n_shares;     /* of k */
    int first_step, n_steps; /* of k */
};

} // namespace

#endif
