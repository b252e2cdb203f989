/* The LoRA op and its layout: planes spaced by the pool's rank, loops that end at the loaded one.
 */
#include "tests/ops/ops_test.h"

#define MAX_SLICES 5
#define N_SLOTS    4

/* An adapter's part of one site: a pair per slice, or a pair that several slices share. */
typedef struct {
    int32_t plane[MAX_SLICES], rank[MAX_SLICES];
    float scale[MAX_SLICES];
    float *a[MAX_SLICES]; /* by plane: [rank, n_in] */
    float *b[MAX_SLICES]; /* by slice: [rows, rank] */
} adapter;

typedef struct {
    const qv_lora_shape *shape;
    qv_lora_site site;
    int64_t slice_start[MAX_SLICES + 1];
    uint8_t active[N_SLOTS];
    qv_lora_slice *slices;
} pool;

static const qv_dtype pool_dtypes[] = {QV_F32, QV_BF16};

static pool *new_pool(const qv_lora_shape *shape, int32_t max_rank, qv_dtype dtype)
{
    pool *p = must(calloc(1, sizeof *p));
    p->shape = shape;
    for (int32_t i = 0; i < shape->n_slices; i++)
        p->slice_start[i + 1] = p->slice_start[i] + shape->slice_rows[i];
    int64_t n_out = p->slice_start[shape->n_slices];
    size_t a = (size_t)(N_SLOTS * shape->n_slices * max_rank * shape->n_in);
    size_t b = (size_t)(N_SLOTS * n_out * max_rank), size = qv_dtype_size(dtype);
    p->slices = must(calloc(N_SLOTS * MAX_SLICES, sizeof *p->slices));
    p->site = (qv_lora_site){
        .n_in = shape->n_in,
        .n_out = n_out,
        .n_slices = shape->n_slices,
        .n_slots = N_SLOTS,
        .max_rank = max_rank,
        .slice_start = p->slice_start,
        .a = qv_tensor_4d(must(calloc(a, size)), dtype, N_SLOTS, shape->n_slices, max_rank,
                          shape->n_in),
        .b = qv_tensor_3d(must(calloc(b, size)), dtype, N_SLOTS, max_rank, n_out),
        .slices = p->slices,
        .slot_active = p->active,
    };
    return p;
}

static void free_pool(pool *p)
{
    free(p->site.a.data);
    free(p->site.b.data);
    free(p->slices);
    free(p);
}

/* Every number of both pools becomes NaN. */
static void poison(pool *p)
{
    memset(p->site.a.data, 0xFF,
           (size_t)qv_tensor_count(&p->site.a) * qv_dtype_size(p->site.a.dtype));
    memset(p->site.b.data, 0xFF,
           (size_t)qv_tensor_count(&p->site.b) * qv_dtype_size(p->site.b.dtype));
}

static void put(qv_tensor t, int64_t i, float x)
{
    if (t.dtype == QV_F32)
        ((float *)t.data)[i] = x;
    else
        ((uint16_t *)t.data)[i] = qv_f32_to_bf16(x);
}

static adapter new_adapter(const qv_lora_shape *shape, uint64_t seed, const int32_t *ranks,
                           const int32_t *planes)
{
    qv_rng rng = qv_rng_seed(seed);
    adapter ad = {0};
    int32_t plane_rank[MAX_SLICES] = {0};
    for (int32_t i = 0; i < shape->n_slices; i++) {
        ad.plane[i] = planes ? planes[i] : i;
        ad.rank[i] = ranks[i];
        ad.scale[i] = 0.5f + (float)qv_rng_uniform(&rng);
        ad.b[i] = random_floats(&rng, shape->slice_rows[i] * ranks[i], 1);
        round_to_bf16(ad.b[i], shape->slice_rows[i] * ranks[i]);
        if (ranks[i] > plane_rank[ad.plane[i]])
            plane_rank[ad.plane[i]] = ranks[i];
    }
    for (int32_t i = 0; i < shape->n_slices; i++) {
        ad.a[i] = random_floats(&rng, plane_rank[i] * shape->n_in, 1);
        round_to_bf16(ad.a[i], plane_rank[i] * shape->n_in);
    }
    return ad;
}

static adapter uniform_adapter(const qv_lora_shape *shape, uint64_t seed, int32_t rank)
{
    return new_adapter(shape, seed, (int32_t[]){rank, rank, rank, rank, rank}, NULL);
}

static void free_adapter(adapter *ad)
{
    for (int i = 0; i < MAX_SLICES; i++) {
        free(ad->a[i]);
        free(ad->b[i]);
    }
}

/* Write an adapter into a slot. With `fill`, as the layout demands: all that the pair does not
 * cover becomes zero. Without, only the pair itself is written. */
static void install(pool *p, int32_t slot, const adapter *ad, bool fill)
{
    const qv_lora_site *s = &p->site;
    int64_t a_slot = (int64_t)s->n_slices * s->max_rank * s->n_in, b_slot = s->n_out * s->max_rank;
    if (fill) {
        for (int64_t i = 0; i < a_slot; i++)
            put(s->a, slot * a_slot + i, 0);
        for (int64_t i = 0; i < b_slot; i++)
            put(s->b, slot * b_slot + i, 0);
    }
    for (int32_t i = 0; i < s->n_slices; i++) {
        int64_t plane = ad->plane[i];
        for (int64_t r = 0; r < ad->rank[i]; r++) {
            for (int64_t k = 0; k < s->n_in; k++)
                put(s->a, slot * a_slot + (plane * s->max_rank + r) * s->n_in + k,
                    ad->a[plane][r * s->n_in + k]);
            for (int64_t row = 0; row < p->shape->slice_rows[i]; row++)
                put(s->b, slot * b_slot + r * s->n_out + p->slice_start[i] + row,
                    ad->b[i][row * ad->rank[i] + r]);
        }
        p->slices[slot * s->n_slices + i] =
            (qv_lora_slice){.plane = ad->plane[i], .rank = ad->rank[i], .scale = ad->scale[i]};
    }
    p->active[slot] = 1;
}

/* y += delta for n tokens in segments. The scratch is NaN, so that what is read was written. */
static void run_lora(qv_backend *be, const pool *p, int32_t n_segs, const int32_t *seg_start,
                     const int32_t *seg_slot, const float *x, float *y)
{
    int64_t n = seg_start[n_segs], n_scratch = n * p->site.n_slices * p->site.max_rank;
    float *scratch = filled_floats(n_scratch, NAN);
    PASS(qv_op_lora(be, &p->site, n_segs, seg_start, seg_slot,
                    qv_tensor_2d((void *)x, QV_F32, n, p->site.n_in),
                    qv_tensor_3d(scratch, QV_F32, n, p->site.n_slices, p->site.max_rank),
                    qv_tensor_2d(y, QV_F32, n, p->site.n_out)));
    free(scratch);
}

static void run_one(qv_backend *be, const pool *p, int32_t slot, int32_t n, const float *x,
                    float *y)
{
    run_lora(be, p, 1, (int32_t[]){0, n}, &slot, x, y);
}

/* --- Oracle: the delta merged into a matrix, in double ------------------------------------ */

static void merge(const qv_lora_shape *shape, const adapter *ad, double *w)
{
    for (int32_t i = 0, first = 0; i < shape->n_slices; first += (int32_t)shape->slice_rows[i++])
        for (int64_t row = 0; row < shape->slice_rows[i]; row++)
            for (int64_t k = 0; k < shape->n_in; k++) {
                double sum = 0;
                for (int32_t r = 0; r < ad->rank[i]; r++)
                    sum += (double)ad->b[i][row * ad->rank[i] + r] *
                           ad->a[ad->plane[i]][r * shape->n_in + k];
                w[(first + row) * shape->n_in + k] = ad->scale[i] * sum;
            }
}

static void check_merged(const char *what, const pool *p, const adapter *ad, int32_t n,
                         const float *x, const float *before, const float *y)
{
    int64_t n_out = p->site.n_out, n_in = p->site.n_in;
    double *w = new_doubles(n_out * n_in), *want = new_doubles(n * n_out);
    double *bound = new_doubles(n * n_out);
    merge(p->shape, ad, w);
    for (int64_t t = 0; t < n; t++)
        for (int64_t o = 0; o < n_out; o++) {
            int32_t rank = 0;
            for (int32_t i = 0; i < p->site.n_slices; i++)
                if (o >= p->slice_start[i] && o < p->slice_start[i + 1])
                    rank = ad->rank[i];
            double sum = before[t * n_out + o];
            for (int64_t k = 0; k < n_in; k++)
                sum += w[o * n_in + k] * x[t * n_in + k];
            want[t * n_out + o] = sum;
            /* Sizes of A x and B X1 at random signs: the root of what is summed. */
            bound[t * n_out + o] =
                rank == 0 ? 0 : 32 * U32 * (fabs(sum) + sqrt((double)n_in) * (1 + sqrt(rank)));
        }
    for (int64_t i = 0; i < n * n_out; i++)
        if (bound[i] == 0) { /* no pair: untouched, bit for bit */
            cr_assert_eq(qv_f32_bits(y[i]), qv_f32_bits(before[i]), "%s: element %lld changed",
                         what, (long long)i);
            bound[i] = 1;
        }
    check_bound(what, y, want, bound, n * n_out);
    free(w);
    free(want);
    free(bound);
}

/* --- Tests -------------------------------------------------------------------------------- */

enum { N = 9 };

static const int32_t pool_ranks[] = {8, 16, 64};

static void for_each_rank(int32_t pool_rank, void (*fn)(int32_t pool_rank, int32_t rank))
{
    const int32_t ranks[] = {
        1, 2, 3, pool_rank / 2 - 1, pool_rank / 2, pool_rank / 2 + 1, pool_rank - 1, pool_rank};
    for (size_t i = 0; i < QV_ROWS(ranks); i++)
        fn(pool_rank, ranks[i]);
}

static void agrees_with_merge(int32_t pool_rank, int32_t rank)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_lora_shapes); i++)
        for (size_t d = 0; d < QV_ROWS(pool_dtypes); d++) {
            const qv_lora_shape *shape = &qv_lora_shapes[i];
            char what[160];
            snprintf(what, sizeof what, "%s, %s, rank %d of %d in %s", qv_backend_describe(be),
                     shape->name, rank, pool_rank, qv_dtype_name(pool_dtypes[d]));
            pool *p = new_pool(shape, pool_rank, pool_dtypes[d]);
            adapter ad = uniform_adapter(shape, 5, rank);
            install(p, 2, &ad, true);
            qv_rng rng = qv_rng_seed(6);
            float *x = random_floats(&rng, N * shape->n_in, 1);
            float *before = random_floats(&rng, N * p->site.n_out, 1);
            float *y = copied_floats(before, N * p->site.n_out);
            run_one(be, p, 2, N, x, y);
            check_merged(what, p, &ad, N, x, before, y);
            free(x);
            free(before);
            free(y);
            free_adapter(&ad);
            free_pool(p);
        }
}

Test(lora, every_rank_in_every_pool_agrees_with_the_merged_delta, .timeout = 60)
{
    for (size_t i = 0; i < QV_ROWS(pool_ranks); i++)
        for_each_rank(pool_ranks[i], agrees_with_merge);
}

/* Poisoned pools, with the zero fill and with nothing but the pair in place; and a pool as small as
 * the rank. All must equal a clean pool bit for bit. */
static void poison_changes_nothing(int32_t pool_rank, int32_t rank)
{
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(qv_lora_shapes); i++) {
        const qv_lora_shape *shape = &qv_lora_shapes[i];
        adapter ad = uniform_adapter(shape, 7, rank);
        qv_rng rng = qv_rng_seed(8);
        float *x = random_floats(&rng, N * shape->n_in, 1);
        float *want = NULL;
        for (int variant = 0; variant < 4; variant++) {
            pool *p = new_pool(shape, variant == 3 ? rank : pool_rank, QV_F32);
            if (variant == 1 || variant == 2)
                poison(p);
            install(p, 1, &ad, variant != 2);
            float *y = filled_floats(N * p->site.n_out, 0.25f);
            run_one(be, p, 1, N, x, y);
            if (want)
                check_same(shape->name, y, want, N * p->site.n_out);
            else
                want = copied_floats(y, N * p->site.n_out);
            free(y);
            free_pool(p);
        }
        free(want);
        free(x);
        free_adapter(&ad);
    }
    qv_backend_close(be);
}

Test(lora, what_lies_above_the_rank_is_never_read)
{
    for (size_t i = 0; i < QV_ROWS(pool_ranks); i++)
        for_each_rank(pool_ranks[i], poison_changes_nothing);
}

Test(lora, a_slot_forgets_the_adapter_before)
{
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(qv_lora_shapes); i++) {
        const qv_lora_shape *shape = &qv_lora_shapes[i];
        pool *reused = new_pool(shape, 16, QV_F32), *fresh = new_pool(shape, 16, QV_F32);
        adapter large = uniform_adapter(shape, 9, 16), small = uniform_adapter(shape, 10, 3);
        install(reused, 0, &large, true);
        install(reused, 0, &small, true);
        install(fresh, 0, &small, true);
        qv_rng rng = qv_rng_seed(11);
        float *x = random_floats(&rng, N * shape->n_in, 1);
        float *y = filled_floats(N * reused->site.n_out, 1),
              *want = filled_floats(N * fresh->site.n_out, 1);
        run_one(be, reused, 0, N, x, y);
        run_one(be, fresh, 0, N, x, want);
        check_same(shape->name, y, want, N * fresh->site.n_out);
        free(x);
        free(y);
        free(want);
        free_adapter(&large);
        free_adapter(&small);
        free_pool(reused);
        free_pool(fresh);
    }
    qv_backend_close(be);
}

/* Running the loops to the pool's rank gives the same bits: the zero fill alone would be enough. */
Test(lora, masked_and_unmasked_loops_agree)
{
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(qv_lora_shapes); i++) {
        const qv_lora_shape *shape = &qv_lora_shapes[i];
        pool *p = new_pool(shape, 16, QV_F32);
        adapter ad = uniform_adapter(shape, 12, 5);
        install(p, 0, &ad, true);
        qv_rng rng = qv_rng_seed(13);
        float *x = random_floats(&rng, N * shape->n_in, 1);
        float *want = filled_floats(N * p->site.n_out, 1), *y = filled_floats(N * p->site.n_out, 1);
        run_one(be, p, 0, N, x, want);
        for (int32_t s = 0; s < shape->n_slices; s++)
            p->slices[s].rank = 16;
        run_one(be, p, 0, N, x, y);
        check_same(shape->name, y, want, N * p->site.n_out);
        free(x);
        free(y);
        free(want);
        free_adapter(&ad);
        free_pool(p);
    }
    qv_backend_close(be);
}

/* A batch of several adapters, an inactive slot and base tokens, against every token alone. */
static void check_mixed(const char *isa, const qv_lora_shape *shape, qv_dtype dtype)
{
    static const int32_t seg_start[] = {0, 5, 6, 70, 70, 75, 90}, seg_slot[] = {-1, 0, 1, 2, 3, 2};
    enum { T = 90, SEGS = 6 };
    qv_backend *one = open_isa(isa, 1), *many = open_isa(isa, 3);
    if (!one || !many)
        return;
    pool *p = new_pool(shape, 16, dtype);
    poison(p);
    adapter ads[3];
    static const int32_t ranks[] = {1, 16, 7};
    for (int i = 0; i < 3; i++) {
        ads[i] = uniform_adapter(shape, (uint64_t)(20 + i), ranks[i]);
        install(p, i, &ads[i], true);
    }
    int64_t n_out = p->site.n_out; /* slot 3 stays poisoned and inactive */
    qv_rng rng = qv_rng_seed(14);
    float *x = random_floats(&rng, T * shape->n_in, 1), *before = random_floats(&rng, T * n_out, 1);
    float *y = copied_floats(before, T * n_out), *want = copied_floats(before, T * n_out);
    for (int32_t seg = 0; seg < SEGS; seg++)
        for (int32_t t = seg_start[seg]; t < seg_start[seg + 1]; t++)
            run_one(one, p, seg_slot[seg], 1, x + t * shape->n_in, want + t * n_out);
    run_lora(many, p, SEGS, seg_start, seg_slot, x, y);
    check_same(shape->name, y, want, T * n_out);
    check_same("base tokens", y, before, 5 * n_out);
    check_same("tokens of an inactive slot", y + 70 * n_out, before + 70 * n_out, 5 * n_out);
    for (int i = 0; i < 3; i++)
        free_adapter(&ads[i]);
    free(x);
    free(before);
    free(y);
    free(want);
    free_pool(p);
    qv_backend_close(one);
    qv_backend_close(many);
}

Test(lora, other_adapters_in_the_batch_change_no_bit)
{
    for (size_t a = 0; a < QV_ROWS(isas); a++)
        for (size_t i = 0; i < QV_ROWS(qv_lora_shapes); i++)
            for (size_t d = 0; d < QV_ROWS(pool_dtypes); d++)
                check_mixed(isas[a], &qv_lora_shapes[i], pool_dtypes[d]);
}

Test(lora, slices_may_share_a_plane_and_have_ranks_of_their_own)
{
    static const struct {
        int32_t rank[MAX_SLICES], plane[MAX_SLICES];
    } rows[] = {
        {{4, 4, 4, 4, 4}, {0, 0, 0, 0, 0}}, {{4, 2, 7, 1, 3}, {0, 0, 0, 0, 0}},
        {{0, 5, 0, 3, 0}, {0, 1, 2, 3, 4}}, {{3, 0, 5, 2, 8}, {1, 1, 1, 0, 0}},
        {{0, 0, 0, 0, 6}, {0, 0, 0, 0, 4}}, {{8, 8, 1, 8, 8}, {4, 3, 2, 1, 0}},
        {{0, 0, 0, 0, 0}, {0, 0, 0, 0, 0}},
    };
    const qv_lora_shape *shape = &qv_lora_shapes[QV_ROWS(qv_lora_shapes) - 1];
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(rows); i++) {
        pool *p = new_pool(shape, 8, QV_F32);
        poison(p);
        adapter ad = new_adapter(shape, 15, rows[i].rank, rows[i].plane);
        install(p, 3, &ad, true);
        qv_rng rng = qv_rng_seed(16);
        float *x = random_floats(&rng, N * shape->n_in, 1);
        float *before = random_floats(&rng, N * p->site.n_out, 1);
        float *y = copied_floats(before, N * p->site.n_out);
        run_one(be, p, 3, N, x, y);
        check_merged("slices", p, &ad, N, x, before, y);
        free(x);
        free(before);
        free(y);
        free_adapter(&ad);
        free_pool(p);
    }
}

/* DeepSeek's fused_qkv_a_proj_with_mqa: a replicated projection of two slices of unequal rows.
 * Where the second slice's plane is looked for must not depend on the rank that is loaded; neither
 * may the number of rows of a slice that the adapter lacks. */
Test(lora, replicated_two_slices_find_the_second_plane_at_any_rank)
{
    static const int32_t ranks[][2] = {{1, 1},   {3, 3}, {7, 7}, {9, 9},  {15, 15},
                                       {16, 16}, {5, 0}, {0, 5}, {16, 1}, {2, 16}};
    const qv_lora_shape *shape = NULL;
    for (size_t i = 0; i < QV_ROWS(qv_lora_shapes); i++)
        if (strcmp(qv_lora_shapes[i].name, "fused_qkv_a_proj_with_mqa") == 0)
            shape = &qv_lora_shapes[i];
    cr_assert_not_null(shape);
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(ranks); i++) {
        pool *p = new_pool(shape, 16, QV_F32);
        poison(p);
        adapter ad = new_adapter(shape, 17, (int32_t[]){ranks[i][0], ranks[i][1], 0, 0, 0}, NULL);
        install(p, 1, &ad, false);
        qv_rng rng = qv_rng_seed(18);
        float *x = random_floats(&rng, N * shape->n_in, 1);
        float *before = random_floats(&rng, N * p->site.n_out, 1);
        float *y = copied_floats(before, N * p->site.n_out);
        run_one(be, p, 1, N, x, y);
        check_merged("two slices", p, &ad, N, x, before, y);
        free(x);
        free(before);
        free(y);
        free_adapter(&ad);
        free_pool(p);
    }
}

Test(lora, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    pool *p = new_pool(&qv_lora_shapes[1], 8, QV_F32);
    float *m = filled_floats(100000, 0);
    int64_t n_in = p->site.n_in, n_out = p->site.n_out;
    int32_t seg[] = {0, 4}, slot = 0;
    qv_tensor x = qv_tensor_2d(m, QV_F32, 4, n_in), y = qv_tensor_2d(m, QV_F32, 4, n_out);
    qv_tensor scratch = qv_tensor_3d(m, QV_F32, 4, 2, 8);
    FAIL_WITH(
        QV_ERR_SHAPE, "x is f32[4, 191]",
        qv_op_lora(be, &p->site, 1, seg, &slot, qv_tensor_2d(m, QV_F32, 4, n_in - 1), scratch, y));
    FAIL_WITH(QV_ERR_SHAPE, "y is f32[3, 896]",
              qv_op_lora(be, &p->site, 1, seg, &slot, x, scratch, qv_tensor_rows(y, 0, 3)));
    FAIL_WITH(QV_ERR_LIMIT, "scratch for 3 tokens, but there are 4",
              qv_op_lora(be, &p->site, 1, seg, &slot, x, qv_tensor_rows(scratch, 0, 3), y));
    FAIL_WITH(QV_ERR_SHAPE, "scratch is f32[4, 2, 7]",
              qv_op_lora(be, &p->site, 1, seg, &slot, x, qv_tensor_3d(m, QV_F32, 4, 2, 7), y));
    p->slice_start[1] = 2 * n_out;
    FAIL_WITH(QV_ERR_SHAPE, "slice 1 starts at row 1792",
              qv_op_lora(be, &p->site, 1, seg, &slot, x, scratch, y));
    p->slice_start[1] = 448;
    p->site.n_slots = 5;
    FAIL_WITH(QV_ERR_SHAPE, "a is f32[4, 2, 8, 192], but needs f32[5, 2, 8, 192]",
              qv_op_lora(be, &p->site, 1, seg, &slot, x, scratch, y));
    free(m);
    free_pool(p);
    qv_backend_close(be);
}
