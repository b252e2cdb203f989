/* LoRA of routed experts, over the runs of a list: pairs of one expert and one adapter. The passes
 * are those of lora.c, shrink and expand, with an expert's planes instead of a slot's. What a slot
 * shares between experts is done once a token: A x for the up-projection, B for the
 * down-projection, the latter after the weighted sum (qv_op_moe_combine).
 *
 * A x of pair t * k + j is row t * k + j of the scratch; A x of a whole token is row t * k.
 */
#include "ops/cpu/lora_tiles.h"

typedef struct {
    const qv_moe_lora_site *site;
    const qv_moe_list *list;
    qv_tensor x, y, weights;
    qv_moe_rows rows;
    float *scratch; /* X1 [P][n_slices][max_rank] */
} moe_lora_ctx;

/* A slot's part, NULL if it has none. */
static const qv_moe_lora_slot *part_of(const moe_lora_ctx *c, int32_t slot)
{
    return slot >= 0 && c->site->slot_active[slot] ? &c->site->slots[slot] : NULL;
}

static bool shrinks_tokens(const moe_lora_ctx *c, const qv_moe_lora_slot *part)
{
    return part && part->a_shared && c->rows == QV_MOE_TOKENS;
}

static bool shrinks_pairs(const moe_lora_ctx *c, const qv_moe_lora_slot *part)
{
    return part && !shrinks_tokens(c, part);
}

/* B after the weighted sum, which only the down-projection comes before. */
static bool expands_tokens(const moe_lora_ctx *c, const qv_moe_lora_slot *part)
{
    return part && part->b_shared && c->rows == QV_MOE_PAIRS;
}

static bool expands_pairs(const moe_lora_ctx *c, const qv_moe_lora_slot *part)
{
    return part && !expands_tokens(c, part);
}

static const qv_lora_slice *slices_of(const moe_lora_ctx *c, const qv_moe_lora_slot *part,
                                      int32_t expert)
{
    return part->slices + (int64_t)expert * c->site->n_slices;
}

static int64_t element(const moe_lora_ctx *c)
{
    return c->site->dtype == QV_F32 ? 4 : 2;
}

static const void *a_of(const moe_lora_ctx *c, const qv_moe_lora_slot *part, int32_t expert,
                        int32_t plane)
{
    int64_t e = part->a_shared ? 0 : expert;
    int64_t offset = (e * c->site->n_slices + plane) * part->max_rank * c->site->n_in;
    return (const char *)part->a + offset * element(c);
}

static const void *b_of(const moe_lora_ctx *c, const qv_moe_lora_slot *part, int32_t expert)
{
    int64_t e = part->b_shared ? 0 : expert;
    return (const char *)part->b + e * c->site->n_out * part->max_rank * element(c);
}

static float *x1_of(const moe_lora_ctx *c, int64_t pair, int32_t plane)
{
    return c->scratch + (pair * c->site->n_slices + plane) * c->site->max_rank;
}

/* Ranks of a plane that some slice of the expert reads. */
static int32_t plane_rank(const moe_lora_ctx *c, const qv_lora_slice *slices, int32_t plane)
{
    int32_t rank = 0;
    for (int32_t i = 0; i < c->site->n_slices; i++)
        if (slices[i].plane == plane && slices[i].rank > rank)
            rank = slices[i].rank;
    return rank;
}

/* --- Items -------------------------------------------------------------------------------- */

/* A pass walks runs of pairs or segments of tokens. `count` says how many items each has. */
typedef int64_t count_fn(const moe_lora_ctx *c, int32_t i);
typedef void item_fn(const moe_lora_ctx *c, int32_t i, int64_t item);

/* There may be as many runs as pairs, so their items are counted ahead: work[i] is run i's first.
 */
static int64_t count_runs(const moe_lora_ctx *c, count_fn *count)
{
    int64_t n_items = 0, *first = c->list->work;
    for (int32_t i = 0; i < *c->list->n_runs; i++) {
        first[i] = n_items;
        n_items += count(c, i);
    }
    first[*c->list->n_runs] = n_items;
    return n_items;
}

static void walk_runs(const moe_lora_ctx *c, int64_t begin, int64_t end, item_fn *fn)
{
    const int64_t *first = c->list->work;
    int32_t run = qv_job_of(first, *c->list->n_runs, begin);
    for (int64_t item = begin; item < end; item++) {
        while (item >= first[run + 1])
            run++;
        fn(c, run, item - first[run]);
    }
}

static int64_t count_segs(const moe_lora_ctx *c, count_fn *count)
{
    int64_t n_items = 0;
    for (int32_t seg = 0; seg < c->list->n_segs; seg++)
        n_items += count(c, seg);
    return n_items;
}

static void walk_segs(const moe_lora_ctx *c, int64_t begin, int64_t end, count_fn *count,
                      item_fn *fn)
{
    int64_t base = 0;
    for (int32_t seg = 0; seg < c->list->n_segs && base < end; seg++) {
        int64_t n = count(c, seg);
        for (int64_t i = begin > base ? begin - base : 0; i < n && base + i < end; i++)
            fn(c, seg, i);
        base += n;
    }
}

static int64_t n_blocks(int64_t n, int64_t size)
{
    return (n + size - 1) / size;
}

static int64_t seg_tokens(const moe_lora_ctx *c, int32_t seg)
{
    return c->list->seg_start[seg + 1] - c->list->seg_start[seg];
}

static const qv_moe_lora_slot *seg_part(const moe_lora_ctx *c, int32_t seg)
{
    return part_of(c, c->list->seg_slot[seg]);
}

/* --- Shrink ------------------------------------------------------------------------------- */

/* Items of a run: blocks of pairs, in each planes. */
static int64_t n_run_shrinks(const moe_lora_ctx *c, int32_t i)
{
    const qv_moe_run *run = &c->list->runs[i];
    return shrinks_pairs(c, part_of(c, run->slot))
               ? n_blocks(run->n, QV_LORA_SHRINK_TOKENS) * c->site->n_slices
               : 0;
}

static void shrink_run(const moe_lora_ctx *c, int32_t i, int64_t item)
{
    const qv_moe_run *run = &c->list->runs[i];
    const qv_moe_lora_slot *part = part_of(c, run->slot);
    int32_t plane = (int32_t)(item % c->site->n_slices);
    int32_t rank = plane_rank(c, slices_of(c, part, run->expert), plane);
    int64_t done = item / c->site->n_slices * QV_LORA_SHRINK_TOKENS, left = run->n - done;
    int64_t n = left < QV_LORA_SHRINK_TOKENS ? left : QV_LORA_SHRINK_TOKENS;
    const float *x[QV_LORA_SHRINK_TOKENS];
    float *x1[QV_LORA_SHRINK_TOKENS];
    for (int64_t k = 0; k < n; k++) {
        int64_t place = run->first + done + k, pair = c->list->pair[place];
        x[k] = qv_row2(c->x, c->rows == QV_MOE_PAIRS ? place : pair / c->list->top_k);
        x1[k] = x1_of(c, pair, plane);
    }
    qv_lora_shrink(c->site->dtype, a_of(c, part, run->expert, plane), c->site->n_in, rank, n, x,
                   x1);
}

/* Items of a segment whose slot shares A: blocks of tokens, in each planes. */
static int64_t n_seg_shrinks(const moe_lora_ctx *c, int32_t seg)
{
    return shrinks_tokens(c, seg_part(c, seg))
               ? n_blocks(seg_tokens(c, seg), QV_LORA_SHRINK_TOKENS) * c->site->n_slices
               : 0;
}

static void shrink_seg(const moe_lora_ctx *c, int32_t seg, int64_t item)
{
    const qv_moe_lora_slot *part = seg_part(c, seg);
    int32_t plane = (int32_t)(item % c->site->n_slices);
    int64_t done = item / c->site->n_slices * QV_LORA_SHRINK_TOKENS;
    int64_t left = seg_tokens(c, seg) - done;
    int64_t n = left < QV_LORA_SHRINK_TOKENS ? left : QV_LORA_SHRINK_TOKENS;
    const float *x[QV_LORA_SHRINK_TOKENS];
    float *x1[QV_LORA_SHRINK_TOKENS];
    for (int64_t k = 0; k < n; k++) {
        int64_t t = c->list->seg_start[seg] + done + k;
        x[k] = qv_row2(c->x, t);
        x1[k] = x1_of(c, t * c->list->top_k, plane);
    }
    int32_t rank = plane_rank(c, part->slices, plane);
    qv_lora_shrink(c->site->dtype, a_of(c, part, 0, plane), c->site->n_in, rank, n, x, x1);
}

/* --- Expand ------------------------------------------------------------------------------- */

static int64_t n_row_blocks(const moe_lora_ctx *c)
{
    return n_blocks(c->site->n_out, QV_LORA_EXPAND_ROWS);
}

/* y[i] += the delta of n rows, whose X1 belong to pair[i], for the output rows of block `block`. */
static void expand(const moe_lora_ctx *c, const qv_moe_lora_slot *part, int32_t expert,
                   int64_t block, int64_t n, const int64_t *pair, float *const *y)
{
    const qv_moe_lora_site *site = c->site;
    const qv_lora_slice *slices = slices_of(c, part, expert);
    int64_t row = block * QV_LORA_EXPAND_ROWS, row_end = row + QV_LORA_EXPAND_ROWS;
    const float *x1[QV_LORA_EXPAND_TOKENS];
    for (int32_t k = 0; k < site->n_slices; k++) {
        int64_t first = site->slice_start[k] > row ? site->slice_start[k] : row;
        int64_t end = site->slice_start[k + 1] < row_end ? site->slice_start[k + 1] : row_end;
        if (slices[k].rank == 0 || first >= end)
            continue;
        for (int64_t i = 0; i < n; i++)
            x1[i] = x1_of(c, pair[i], slices[k].plane);
        qv_lora_expand(site->dtype, b_of(c, part, expert), site->n_out, slices[k].rank,
                       slices[k].scale, n, x1, y, first, end);
    }
}

/* Items of a run: blocks of pairs, in each blocks of rows. */
static int64_t n_run_expands(const moe_lora_ctx *c, int32_t i)
{
    const qv_moe_run *run = &c->list->runs[i];
    return expands_pairs(c, part_of(c, run->slot))
               ? n_blocks(run->n, QV_LORA_EXPAND_TOKENS) * n_row_blocks(c)
               : 0;
}

static void expand_run(const moe_lora_ctx *c, int32_t i, int64_t item)
{
    const qv_moe_run *run = &c->list->runs[i];
    const qv_moe_lora_slot *part = part_of(c, run->slot);
    int64_t done = item / n_row_blocks(c) * QV_LORA_EXPAND_TOKENS, left = run->n - done;
    int64_t n = left < QV_LORA_EXPAND_TOKENS ? left : QV_LORA_EXPAND_TOKENS;
    int64_t pair[QV_LORA_EXPAND_TOKENS];
    float *y[QV_LORA_EXPAND_TOKENS];
    for (int64_t k = 0; k < n; k++) {
        int64_t place = run->first + done + k, p = c->list->pair[place];
        pair[k] = shrinks_tokens(c, part) ? p / c->list->top_k * c->list->top_k : p;
        y[k] = qv_row2(c->y, place);
    }
    expand(c, part, run->expert, item % n_row_blocks(c), n, pair, y);
}

/* --- qv_op_moe_lora ----------------------------------------------------------------------- */

static void run_shrinks(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    walk_runs(ctx, begin, end, shrink_run);
}

static void seg_shrinks(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    walk_segs(ctx, begin, end, n_seg_shrinks, shrink_seg);
}

static void run_expands(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    walk_runs(ctx, begin, end, expand_run);
}

qv_status QV_ISA(qv_cpu_moe_lora)(qv_backend *be, const qv_moe_lora_site *site,
                                  const qv_moe_list *list, qv_tensor x, qv_moe_rows rows,
                                  qv_tensor scratch, qv_tensor y)
{
    if (site->max_rank > QV_LORA_MAX_RANK)
        return qv_fail(QV_ERR_LIMIT, "moe_lora: pool rank %d, but %d is possible", site->max_rank,
                       QV_LORA_MAX_RANK);
    moe_lora_ctx c = {
        .site = site, .list = list, .x = x, .y = y, .rows = rows, .scratch = scratch.data};
    qv_pool *pool = qv_cpu(be)->pool;
    /* Items of one pair are the usual: reading A or B is what takes time, 8 numbers per ns. */
    int64_t shrink_ns = site->max_rank * site->n_in / 8;
    int64_t expand_ns = site->max_rank * QV_LORA_EXPAND_ROWS / 4;
    qv_pool_run(pool, count_segs(&c, n_seg_shrinks), shrink_ns, seg_shrinks, &c);
    qv_pool_run(pool, count_runs(&c, n_run_shrinks), shrink_ns, run_shrinks, &c);
    qv_pool_run(pool, count_runs(&c, n_run_expands), expand_ns, run_expands, &c);
    return QV_OK;
}

/* --- B shared by all experts -------------------------------------------------------------- */

/* Items of a segment: its tokens. Row t * k of X1 becomes the weighted sum over the token's pairs.
 */
static int64_t n_seg_folds(const moe_lora_ctx *c, int32_t seg)
{
    return expands_tokens(c, seg_part(c, seg)) ? seg_tokens(c, seg) : 0;
}

static void fold_token(const moe_lora_ctx *c, int32_t seg, int64_t item)
{
    const qv_moe_lora_slot *part = seg_part(c, seg);
    int32_t k = c->list->top_k;
    int64_t t = c->list->seg_start[seg] + item;
    const float *weights = qv_row2(c->weights, t);
    for (int32_t plane = 0; plane < c->site->n_slices; plane++) {
        int32_t rank = plane_rank(c, part->slices, plane);
        QV_FOR_LANES(r, lanes, rank)
        {
            v16 sum = v_zero();
            for (int32_t j = 0; j < k; j++)
                if (c->list->place[t * k + j] >= 0)
                    sum = v_fma(v_set1(weights[j]),
                                v_load_lanes(x1_of(c, t * k + j, plane) + r, lanes), sum);
            v_store_lanes(x1_of(c, t * k, plane) + r, sum, lanes);
        }
    }
}

/* Items of a segment: blocks of tokens, in each blocks of rows. */
static int64_t n_seg_expands(const moe_lora_ctx *c, int32_t seg)
{
    return expands_tokens(c, seg_part(c, seg))
               ? n_blocks(seg_tokens(c, seg), QV_LORA_EXPAND_TOKENS) * n_row_blocks(c)
               : 0;
}

static void expand_seg(const moe_lora_ctx *c, int32_t seg, int64_t item)
{
    int64_t done = item / n_row_blocks(c) * QV_LORA_EXPAND_TOKENS;
    int64_t left = seg_tokens(c, seg) - done;
    int64_t n = left < QV_LORA_EXPAND_TOKENS ? left : QV_LORA_EXPAND_TOKENS;
    int64_t pair[QV_LORA_EXPAND_TOKENS];
    float *y[QV_LORA_EXPAND_TOKENS];
    for (int64_t k = 0; k < n; k++) {
        int64_t t = c->list->seg_start[seg] + done + k;
        pair[k] = t * c->list->top_k;
        y[k] = qv_row2(c->y, t);
    }
    expand(c, seg_part(c, seg), 0, item % n_row_blocks(c), n, pair, y);
}

static void seg_folds(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    walk_segs(ctx, begin, end, n_seg_folds, fold_token);
}

static void seg_expands(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    walk_segs(ctx, begin, end, n_seg_expands, expand_seg);
}

void QV_ISA(qv_cpu_moe_lora_shared)(qv_backend *be, const qv_moe_lora_site *site,
                                    const qv_moe_list *list, qv_tensor weights, qv_tensor scratch,
                                    qv_tensor y)
{
    moe_lora_ctx c = {.site = site,
                      .list = list,
                      .y = y,
                      .weights = weights,
                      .rows = QV_MOE_PAIRS,
                      .scratch = scratch.data};
    qv_pool *pool = qv_cpu(be)->pool;
    qv_pool_run(pool, count_segs(&c, n_seg_folds), list->top_k * site->max_rank / 8, seg_folds, &c);
    qv_pool_run(pool, count_segs(&c, n_seg_expands), site->max_rank * QV_LORA_EXPAND_ROWS / 4,
                seg_expands, &c);
}
