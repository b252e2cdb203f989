/* LoRA of the embedding: A by token, B as everywhere, the same layout tests. */
#include "tests/ops/ops_test.h"

enum { V = 50, OUT = 293, N_SLOTS = 3, T = 90 };

typedef struct {
    int32_t rank;
    float scale;
    float *a; /* [V, rank] */
    float *b; /* [OUT, rank] */
} adapter;

typedef struct {
    qv_embed_lora_site site;
    qv_embed_lora_slot slots[N_SLOTS];
    uint8_t active[N_SLOTS];
} pool;

static adapter new_adapter(uint64_t seed, int32_t rank)
{
    qv_rng rng = qv_rng_seed(seed);
    adapter ad = {.rank = rank, .scale = 0.5f + (float)qv_rng_uniform(&rng)};
    ad.a = random_floats(&rng, V * rank, 1);
    ad.b = random_floats(&rng, OUT * rank, 1);
    round_to_bf16(ad.a, V * rank);
    round_to_bf16(ad.b, OUT * rank);
    return ad;
}

static void free_adapter(adapter *ad)
{
    free(ad->a);
    free(ad->b);
}

static pool *new_pool(int32_t max_rank, qv_dtype dtype)
{
    pool *p = must(calloc(1, sizeof *p));
    p->site = (qv_embed_lora_site){.n_vocab = V,
                                   .n_out = OUT,
                                   .n_slots = N_SLOTS,
                                   .max_rank = max_rank,
                                   .dtype = dtype,
                                   .slots = p->slots,
                                   .slot_active = p->active};
    return p;
}

static void clear_slot(pool *p, int32_t slot)
{
    free(p->slots[slot].a);
    free(p->slots[slot].b);
    p->slots[slot] = (qv_embed_lora_slot){0};
    p->active[slot] = 0;
}

static void free_pool(pool *p)
{
    for (int32_t i = 0; i < N_SLOTS; i++)
        clear_slot(p, i);
    free(p);
}

/* Rows of `rank` numbers into rows of `spacing`; the rest is zero or NaN. */
static void *spread(qv_dtype dtype, const float *src, int64_t n_rows, int32_t rank, int32_t spacing,
                    bool poison)
{
    size_t size = qv_dtype_size(dtype), n = (size_t)(n_rows * spacing);
    char *dst = must(malloc(n * size));
    memset(dst, poison ? 0xFF : 0, n * size);
    for (int64_t row = 0; row < n_rows; row++)
        PASS(
            qv_dtype_from_f32(dtype, src + row * rank, dst + (size_t)(row * spacing) * size, rank));
    return dst;
}

/* The same turned: [n_rows, rank] into [spacing, n_rows]. */
static void *transposed(qv_dtype dtype, const float *src, int64_t n_rows, int32_t rank,
                        int32_t spacing, bool poison)
{
    float *turned = must(malloc((size_t)(rank * n_rows) * sizeof *turned));
    for (int64_t row = 0; row < n_rows; row++)
        for (int32_t r = 0; r < rank; r++)
            turned[r * n_rows + row] = src[row * rank + r];
    size_t size = qv_dtype_size(dtype), n = (size_t)(n_rows * spacing);
    char *dst = must(malloc(n * size));
    memset(dst, poison ? 0xFF : 0, n * size);
    PASS(qv_dtype_from_f32(dtype, turned, dst, rank * n_rows));
    free(turned);
    return dst;
}

static void install(pool *p, int32_t slot, const adapter *ad, int32_t spacing, bool poison)
{
    clear_slot(p, slot);
    p->slots[slot] = (qv_embed_lora_slot){
        .a = spread(p->site.dtype, ad->a, V, ad->rank, spacing, poison),
        .b = transposed(p->site.dtype, ad->b, OUT, ad->rank, spacing, poison),
        .max_rank = spacing,
        .rank = ad->rank,
        .scale = ad->scale,
    };
    p->active[slot] = 1;
}

static const int32_t mixed_start[] = {0, 4, 5, 5, 75, 80, 90}, mixed_slot[] = {-1, 0, 1, 1, 2, 0};

static void run(qv_backend *be, const pool *p, const int32_t *ids, float *y)
{
    PASS(qv_op_embed_lora(be, &p->site, 6, mixed_start, mixed_slot, ids,
                          qv_tensor_2d(y, QV_F32, T, OUT)));
}

static void fill_ids(int32_t *ids)
{
    qv_rng rng = qv_rng_seed(50);
    for (int i = 0; i < T; i++)
        ids[i] = (int32_t)qv_rng_range(&rng, 0, V);
}

/* Slot 2 stays empty. */
static void check_mixed(qv_backend *be, qv_dtype dtype, int32_t pool_rank, int32_t rank)
{
    adapter ads[2] = {new_adapter(51, rank), new_adapter(52, 1 + rank / 2)};
    qv_rng rng = qv_rng_seed(53);
    int32_t ids[T];
    fill_ids(ids);
    pool *p = new_pool(pool_rank, dtype);
    install(p, 0, &ads[0], pool_rank, true);
    install(p, 1, &ads[1], ads[1].rank, true); /* spacing of its own */
    float *before = random_floats(&rng, T * OUT, 1), *y = copied_floats(before, T * OUT);
    double *want = new_doubles(T * OUT), *bound = new_doubles(T * OUT);
    run(be, p, ids, y);
    for (int seg = 0; seg < 6; seg++)
        for (int32_t t = mixed_start[seg]; t < mixed_start[seg + 1]; t++)
            for (int32_t row = 0; row < OUT; row++) {
                const adapter *ad =
                    mixed_slot[seg] == 0 || mixed_slot[seg] == 1 ? &ads[mixed_slot[seg]] : NULL;
                int64_t i = t * OUT + row;
                double sum = 0;
                for (int32_t r = 0; ad && r < ad->rank; r++)
                    sum += (double)ad->b[row * ad->rank + r] * ad->a[ids[t] * ad->rank + r];
                want[i] = before[i] + (ad ? ad->scale * sum : 0);
                bound[i] = ad ? 4 * U32 * (1 + ad->rank) : 1e-300;
            }
    check_bound(qv_backend_describe(be), y, want, bound, T * OUT);
    free(before);
    free(y);
    free(want);
    free(bound);
    free_pool(p);
    free_adapter(&ads[0]);
    free_adapter(&ads[1]);
}

Test(embed_lora, agrees_with_double_and_leaves_other_tokens_alone)
{
    FOR_EACH_ISA(be, 2)
    for (int32_t rank = 1; rank <= 16; rank += 5) {
        check_mixed(be, QV_F32, 16, rank);
        check_mixed(be, QV_BF16, 16, rank);
    }
}

Test(embed_lora, what_lies_above_the_rank_is_never_read)
{
    static const int32_t pool_ranks[] = {8, 16, 64};
    qv_backend *be = open_cpu(3), *one = open_cpu(1);
    int32_t ids[T];
    fill_ids(ids);
    for (size_t i = 0; i < QV_ROWS(pool_ranks); i++) {
        int32_t r = pool_ranks[i];
        const int32_t ranks[] = {1, 2, 3, r / 2 - 1, r / 2, r / 2 + 1, r - 1, r};
        for (size_t k = 0; k < QV_ROWS(ranks); k++) {
            adapter ad = new_adapter(54, ranks[k]), large = new_adapter(55, r);
            float *want = filled_floats(T * OUT, 0.25f);
            for (int variant = 0; variant < 5; variant++) {
                pool *p = new_pool(r, QV_F32);
                float *y = filled_floats(T * OUT, 0.25f);
                if (variant == 3)
                    install(p, 0, &large, r, false); /* a slot forgets the adapter before */
                install(p, 0, &ad, variant == 2 ? ad.rank : r, variant == 1);
                if (variant == 4)
                    p->slots[0].rank = r; /* unmasked: the zero fill alone is enough */
                run(variant == 1 ? be : one, p, ids, variant == 0 ? want : y);
                if (variant > 0)
                    check_same("embed_lora", y, want, T * OUT);
                free(y);
                free_pool(p);
            }
            free(want);
            free_adapter(&ad);
            free_adapter(&large);
        }
    }
    qv_backend_close(be);
    qv_backend_close(one);
}

Test(embed_lora, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    pool *p = new_pool(8, QV_F32);
    float *m = filled_floats(T * OUT, 0);
    int32_t ids[T] = {0};
    FAIL_WITH(QV_ERR_SHAPE, "y is f32[2, 292], but needs f32[*, 293]",
              qv_op_embed_lora(be, &p->site, 1, mixed_start, mixed_slot, ids,
                               qv_tensor_2d(m, QV_F32, 2, 292)));
    p->site.dtype = QV_F16;
    FAIL_WITH(QV_ERR_UNSUPPORTED, "not F16",
              qv_op_embed_lora(be, &p->site, 1, mixed_start, mixed_slot, ids,
                               qv_tensor_2d(m, QV_F32, 2, OUT)));
    p->site.dtype = QV_F32;
    p->site.max_rank = 513;
    FAIL_WITH(QV_ERR_LIMIT, "513, but 512",
              qv_op_embed_lora(be, &p->site, 1, mixed_start, mixed_slot, ids,
                               qv_tensor_2d(m, QV_F32, 2, OUT)));
    free(m);
    free_pool(p);
    qv_backend_close(be);
}
