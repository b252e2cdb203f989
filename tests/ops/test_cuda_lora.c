/* LoRA on CUDA: against the CPU over the shared shapes, and the properties of the layout, bit for
 * bit, on the device itself.
 */
#include "tests/ops/pair.h"

#define N_SLOTS    4
#define MAX_SLICES 5

/* A site on both sides. The host keeps what both were filled from. */
typedef struct {
    const qv_lora_shape *shape;
    qv_lora_site site[2];
    int64_t slice_start[MAX_SLICES + 1];
    uint8_t active[N_SLOTS];
    float *a, *b;
    qv_lora_slice slices[N_SLOTS * MAX_SLICES];
    int32_t max_rank;
} pool;

static pool *new_pool(const qv_lora_shape *shape, int32_t max_rank, float fill)
{
    pool *l = must(calloc(1, sizeof *l));
    l->shape = shape;
    l->max_rank = max_rank;
    for (int32_t i = 0; i < shape->n_slices; i++)
        l->slice_start[i + 1] = l->slice_start[i] + shape->slice_rows[i];
    l->a = filled_floats((int64_t)N_SLOTS * shape->n_slices * max_rank * shape->n_in, fill);
    l->b = filled_floats((int64_t)N_SLOTS * max_rank * l->slice_start[shape->n_slices], fill);
    return l;
}

static void free_pool(pool *l)
{
    free(l->a);
    free(l->b);
    free(l);
}

/* A pair of `rank` for every slice, from a generator of its own, so that it is the same in any
 * pool. Slices of rank 0 get none. With `clear`, all else of the slot is zero. */
static void install(pool *l, int32_t slot, const int32_t *ranks, uint64_t seed, bool clear)
{
    const qv_lora_shape *s = l->shape;
    int64_t n_out = l->slice_start[s->n_slices], spacing = l->max_rank;
    float *a = l->a + slot * s->n_slices * spacing * s->n_in, *b = l->b + slot * spacing * n_out;
    qv_rng rng = qv_rng_seed(seed);
    if (clear) {
        memset(a, 0, (size_t)(s->n_slices * spacing * s->n_in) * sizeof *a);
        memset(b, 0, (size_t)(spacing * n_out) * sizeof *b);
    }
    for (int32_t i = 0; i < s->n_slices; i++) {
        for (int64_t r = 0; r < ranks[i]; r++) {
            for (int64_t k = 0; k < s->n_in; k++)
                a[(i * spacing + r) * s->n_in + k] = (float)(qv_rng_uniform(&rng) * 2 - 1);
            for (int64_t row = l->slice_start[i]; row < l->slice_start[i + 1]; row++)
                b[r * n_out + row] = (float)(qv_rng_uniform(&rng) * 2 - 1);
        }
        l->slices[slot * s->n_slices + i] = (qv_lora_slice){
            .plane = i, .rank = ranks[i], .scale = 0.5f + (float)qv_rng_uniform(&rng)};
        l->active[slot] |= ranks[i] > 0;
    }
}

static void install_all(pool *l, int32_t slot, int32_t rank, uint64_t seed, bool clear)
{
    install(l, slot, (int32_t[]){rank, rank, rank, rank, rank}, seed, clear);
}

static void upload_pool(pair *p, pool *l)
{
    const qv_lora_shape *s = l->shape;
    int64_t n_out = l->slice_start[s->n_slices];
    int64_t n_a = (int64_t)N_SLOTS * s->n_slices * l->max_rank * s->n_in;
    both a = tensor_both(p, l->a, QV_BF16, QV_BF16, n_a, 1, 1);
    both b = tensor_both(p, l->b, QV_BF16, QV_BF16, N_SLOTS * l->max_rank * n_out, 1, 1);
    both_memory slices =
        upload_both(p, l->slices, (size_t)(N_SLOTS * s->n_slices) * sizeof *l->slices);
    for (int side = 0; side < 2; side++)
        l->site[side] = (qv_lora_site){
            .n_in = s->n_in,
            .n_out = n_out,
            .n_slices = s->n_slices,
            .n_slots = N_SLOTS,
            .max_rank = l->max_rank,
            .slice_start = l->slice_start,
            .a = qv_tensor_4d(a.t[side].data, QV_BF16, N_SLOTS, s->n_slices, l->max_rank, s->n_in),
            .b = qv_tensor_3d(b.t[side].data, QV_BF16, N_SLOTS, l->max_rank, n_out),
            .slices = slices.at[side],
            .slot_active = l->active,
        };
}

typedef struct {
    int32_t n_segs;
    both_memory start, slot;
} segments;

static segments upload_segments(pair *p, int32_t n_segs, const int32_t *start, const int32_t *slot)
{
    return (segments){.n_segs = n_segs,
                      .start = upload_both(p, start, (size_t)(n_segs + 1) * 4),
                      .slot = upload_both(p, slot, (size_t)n_segs * 4)};
}

static void run_side(pair *p, int side, const pool *l, const segments *s, qv_tensor x, both scratch,
                     qv_tensor y, bool f32)
{
    qv_tensor x1 =
        qv_tensor_3d(scratch.t[side].data, QV_F32, x.shape[0], l->shape->n_slices, l->max_rank);
    PASS((f32 ? qv_op_lora_f32 : qv_op_lora)(p->be[side], &l->site[side], s->n_segs,
                                             s->start.at[side], s->slot.at[side], x, x1, y));
}

/* --- Against the CPU ---------------------------------------------------------------------- */

/* Segments of base tokens, one token, many, none, and a slot without a pair. */
static const int32_t mixed_start[] = {0, 5, 6, 90, 90, 95, 130};
static const int32_t mixed_slot[] = {-1, 0, 1, 2, 3, 2};

static void check_shape(const qv_lora_shape *shape, int32_t max_rank, const int32_t ranks[3],
                        bool f32, bool odd_strides)
{
    enum { N = 130 };
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(4);
    pool *l = new_pool(shape, max_rank, NAN);
    for (int i = 0; i < 3; i++)
        install_all(l, i, ranks[i], (uint64_t)(10 + i), true);
    upload_pool(p, l);
    segments s = upload_segments(p, 6, mixed_start, mixed_slot);
    int64_t n_out = l->slice_start[shape->n_slices], gap = odd_strides ? 3 : 8;
    both x = random_act(p, &rng, N, shape->n_in + gap, 1);
    both y = f32 ? random_f32(p, &rng, N, n_out + gap, 1) : random_act(p, &rng, N, n_out + gap, 1);
    both scratch = nan_f32(p, N, shape->n_slices * max_rank), part = y;
    float *before = fetch(p, GPU, y.t[GPU]);
    for (int side = 0; side < 2; side++) {
        part.t[side] = qv_tensor_cols(y.t[side], 0, n_out);
        run_side(p, side, l, &s, qv_tensor_cols(x.t[side], 0, shape->n_in), scratch, part.t[side],
                 f32);
    }
    char what[160];
    snprintf(what, sizeof what, "lora %s, ranks %d %d %d of %d%s", shape->name, ranks[0], ranks[1],
             ranks[2], max_rank, f32 ? ", f32" : "");
    compare(p, what, part, f32 ? 1e-4 : 0.0079, f32 ? 1e-4 : 0.002);
    float *after = fetch(p, GPU, y.t[GPU]);
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = i < 5 || (i >= 90 && i < 95) ? 0 : n_out; j < n_out + gap; j++) {
            int64_t at = i * (n_out + gap) + j;
            cr_assert(qv_f32_bits(after[at]) == qv_f32_bits(before[at]), "%s: row %lld changed",
                      what, (long long)i);
        }
    free(before);
    free(after);
    free_pool(l);
    close_pair(p);
}

Test(cuda_lora, agrees_with_the_cpu, .timeout = 600)
{
    static const struct {
        int32_t max_rank, ranks[3];
    } cases[] = {{8, {1, 8, 3}}, {16, {16, 1, 7}}, {64, {33, 64, 17}}, {200, {8, 200, 130}}};
    for (size_t i = 0; i < QV_ROWS(qv_lora_shapes); i++)
        for (size_t j = 0; j < QV_ROWS(cases); j++)
            for (int form = 0; form < 3; form++)
                check_shape(&qv_lora_shapes[i], cases[j].max_rank, cases[j].ranks, form == 1,
                            form == 2);
}

/* A prompt: the form of shrink for many rows, several planes in a block. */
Test(cuda_lora, prompts_agree_with_the_cpu, .timeout = 600)
{
    enum { T = 700 };
    static const int32_t start[] = {0, 3, 4, 330, 700}, slot[] = {-1, 0, 1, 2};
    static const int32_t ranks[][3] = {{5, 16, 40}, {33, 64, 1}};
    for (size_t i = 0; i < QV_ROWS(qv_lora_shapes) - 1; i++)
        for (size_t j = 0; j < QV_ROWS(ranks); j++) {
            const qv_lora_shape *shape = &qv_lora_shapes[i];
            pair *p = open_pair();
            qv_rng rng = qv_rng_seed(9);
            pool *l = new_pool(shape, 64, NAN);
            for (int k = 0; k < 3; k++)
                install_all(l, k, ranks[j][k], (uint64_t)(50 + k), true);
            upload_pool(p, l);
            segments s = upload_segments(p, 4, start, slot);
            int64_t n_out = l->slice_start[shape->n_slices];
            both x = random_act(p, &rng, T, shape->n_in, 1), y = random_act(p, &rng, T, n_out, 1);
            both scratch = nan_f32(p, T, shape->n_slices * 64);
            for (int side = 0; side < 2; side++)
                run_side(p, side, l, &s, x.t[side], scratch, y.t[side], false);
            compare(p, shape->name, y, ROUNDED_ONCE);
            free_pool(l);
            close_pair(p);
        }
}

/* Slices of one module share a plane and may differ in rank. */
Test(cuda_lora, slices_share_planes)
{
    const qv_lora_shape *shape = &qv_lora_shapes[2];
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(5);
    pool *l = new_pool(shape, 16, NAN);
    install(l, 1, (int32_t[]){16, 9, 0, 0, 0}, 20, true);
    l->slices[1 * 3 + 1].plane = 0;
    l->slices[1 * 3 + 2] = (qv_lora_slice){.plane = 0, .rank = 5, .scale = 0.25f};
    upload_pool(p, l);
    segments s = upload_segments(p, 1, (int32_t[]){0, 7}, (int32_t[]){1});
    both x = random_act(p, &rng, 7, shape->n_in, 1), y = random_act(p, &rng, 7, 704, 1);
    both scratch = nan_f32(p, 7, 3 * 16);
    for (int side = 0; side < 2; side++)
        run_side(p, side, l, &s, x.t[side], scratch, y.t[side], false);
    compare(p, "lora with one plane", y, ROUNDED_ONCE);
    free_pool(l);
    close_pair(p);
}

/* --- Layout: on the device, bit for bit --------------------------------------------------- */

enum { N = 9 };

/* y of N tokens through slot 1, y being 0.25 before. */
static float *run_gpu(pair *p, pool *l)
{
    qv_rng rng = qv_rng_seed(6);
    int64_t n_out = l->slice_start[l->shape->n_slices];
    upload_pool(p, l);
    segments s = upload_segments(p, 1, (int32_t[]){0, N}, (int32_t[]){1});
    float *y0 = filled_floats(N * n_out, 0.25f);
    both x = random_act(p, &rng, N, l->shape->n_in, 1), y = act_2d(p, y0, N, n_out);
    both scratch = nan_f32(p, N, l->shape->n_slices * l->max_rank);
    run_side(p, GPU, l, &s, x.t[GPU], scratch, y.t[GPU], false);
    free(y0);
    return fetch(p, GPU, y.t[GPU]);
}

static void check_layout(pair *p, const qv_lora_shape *shape, int32_t max_rank, int32_t rank)
{
    char what[160];
    int64_t n_out = 0;
    float *want = NULL;
    /* Clean; poisoned with the zero fill; poisoned with nothing but the pair; a pool of this rank;
     * a slot that had a larger adapter; loops that run to the pool's rank over zeros. */
    static const char *const names[] = {"clean",       "poisoned and filled",
                                        "poisoned",    "pool of the rank",
                                        "used before", "loops to the pool's rank"};
    for (int variant = 0; variant < 6; variant++) {
        pool *l = new_pool(shape, variant == 3 ? rank : max_rank,
                           variant == 1 || variant == 2 ? NAN : 0.0f);
        if (variant == 4)
            install_all(l, 1, max_rank, 31, true);
        install_all(l, 1, rank, 30, variant != 2);
        for (int32_t i = 0; variant == 5 && i < shape->n_slices; i++)
            l->slices[shape->n_slices + i].rank = max_rank;
        n_out = l->slice_start[shape->n_slices];
        float *y = run_gpu(p, l);
        snprintf(what, sizeof what, "%s, rank %d of %d: %s", shape->name, rank, max_rank,
                 names[variant]);
        for (int64_t i = 0; i < N * n_out; i++)
            cr_assert(isfinite(y[i]), "%s: element %lld is not finite", what, (long long)i);
        if (want)
            check_same(what, y, want, N * n_out);
        else
            want = y;
        if (y != want)
            free(y);
        free_pool(l);
        release_to(p, 0);
    }
    free(want);
}

Test(cuda_lora, what_lies_above_the_rank_is_never_read, .timeout = 600)
{
    static const int32_t pool_ranks[] = {8, 16, 64};
    pair *p = open_pair();
    for (size_t i = 0; i < QV_ROWS(qv_lora_shapes); i++)
        for (size_t j = 0; j < QV_ROWS(pool_ranks); j++) {
            int32_t most = pool_ranks[j];
            const int32_t ranks[] = {1, 2, 3, most / 2 - 1, most / 2, most / 2 + 1, most - 1, most};
            for (size_t k = 0; k < QV_ROWS(ranks); k++)
                check_layout(p, &qv_lora_shapes[i], most, ranks[k]);
        }
    close_pair(p);
}

/* Every token of a mixed batch equals the same token alone. */
Test(cuda_lora, other_adapters_in_the_batch_change_no_bit, .timeout = 600)
{
    enum { T = 130 };
    static const int32_t one_start[] = {0, 1};
    pair *p = open_pair();
    for (size_t i = 0; i < QV_ROWS(qv_lora_shapes); i++) {
        const qv_lora_shape *shape = &qv_lora_shapes[i];
        qv_rng rng = qv_rng_seed(7);
        pool *l = new_pool(shape, 40, NAN);
        static const int32_t ranks[] = {1, 40, 19};
        for (int k = 0; k < 3; k++)
            install_all(l, k, ranks[k], (uint64_t)(40 + k), true);
        upload_pool(p, l);
        int64_t n_out = l->slice_start[shape->n_slices];
        float *y0 = random_floats(&rng, T * n_out, 1);
        both x = random_act(p, &rng, T, shape->n_in, 1);
        both y = act_2d(p, y0, T, n_out), alone = act_2d(p, y0, T, n_out);
        both scratch = nan_f32(p, T, shape->n_slices * 40);
        segments all = upload_segments(p, 6, mixed_start, mixed_slot);
        run_side(p, GPU, l, &all, x.t[GPU], scratch, y.t[GPU], false);
        for (int32_t seg = 0; seg < 6; seg++)
            for (int32_t t = mixed_start[seg]; t < mixed_start[seg + 1]; t += 3) {
                int mark = p->n_blocks;
                segments one = upload_segments(p, 1, one_start, &mixed_slot[seg]);
                run_side(p, GPU, l, &one, qv_tensor_rows(x.t[GPU], t, 1), scratch,
                         qv_tensor_rows(alone.t[GPU], t, 1), false);
                float *got = fetch(p, GPU, qv_tensor_rows(y.t[GPU], t, 1));
                float *want = fetch(p, GPU, qv_tensor_rows(alone.t[GPU], t, 1));
                check_same(shape->name, got, want, n_out);
                free(got);
                free(want);
                release_to(p, mark);
            }
        free(y0);
        free_pool(l);
        release_to(p, 0);
    }
    close_pair(p);
}

/* --- Embedding ---------------------------------------------------------------------------- */

static void check_embed(int64_t n_vocab, int64_t n_out, const int32_t ranks[3])
{
    enum { T = 130 };
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(8);
    qv_embed_lora_slot slots[2][N_SLOTS] = {0};
    uint8_t active[N_SLOTS] = {1, 1, 1, 0};
    for (int i = 0; i < 3; i++) {
        int32_t spacing = ranks[i] + 3;
        float *fa = random_floats(&rng, n_vocab * spacing, 1),
              *fb = random_floats(&rng, spacing * n_out, 1);
        for (int64_t id = 0; id < n_vocab; id++)
            for (int32_t r = ranks[i]; r < spacing; r++)
                fa[id * spacing + r] = NAN;
        for (int64_t j = ranks[i] * n_out; j < spacing * n_out; j++)
            fb[j] = NAN;
        both a = tensor_both(p, fa, QV_BF16, QV_BF16, n_vocab * spacing, 1, 1);
        both b = tensor_both(p, fb, QV_BF16, QV_BF16, spacing * n_out, 1, 1);
        for (int side = 0; side < 2; side++)
            slots[side][i] = (qv_embed_lora_slot){.a = a.t[side].data,
                                                  .b = b.t[side].data,
                                                  .max_rank = spacing,
                                                  .rank = ranks[i],
                                                  .scale = 0.75f};
        free(fa);
        free(fb);
    }
    both_memory slot_memory = alloc_both(p, sizeof slots[0], sizeof slots[0]);
    int32_t ids[T];
    for (int i = 0; i < T; i++)
        ids[i] = (int32_t)qv_rng_range(&rng, 0, n_vocab);
    both_memory id_memory = upload_both(p, ids, sizeof ids);
    segments s = upload_segments(p, 6, mixed_start, mixed_slot);
    both y = random_f32(p, &rng, T, n_out, 1);
    for (int side = 0; side < 2; side++) {
        PASS(qv_backend_upload(p->be[side], slot_memory.at[side], slots[side], sizeof slots[0]));
        qv_embed_lora_site site = {.n_vocab = n_vocab,
                                   .n_out = n_out,
                                   .n_slots = N_SLOTS,
                                   .max_rank = 256,
                                   .dtype = QV_BF16,
                                   .slots = slot_memory.at[side],
                                   .slot_active = active};
        PASS(qv_op_embed_lora(p->be[side], &site, s.n_segs, s.start.at[side], s.slot.at[side],
                              id_memory.at[side], y.t[side]));
    }
    compare(p, "embed_lora", y, ROUNDED_ONCE);
    close_pair(p);
}

Test(cuda_lora, embedding_agrees_with_the_cpu)
{
    check_embed(100, 192, (int32_t[]){1, 16, 7});
    check_embed(33, 331, (int32_t[]){64, 100, 3});
}
