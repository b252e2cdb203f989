/* qv_op_linear_lora on CUDA: against the product and the adapters of the CPU, one after the other;
 * and with `deterministic`, a token's bits whatever is in the batch.
 */
#include "tests/ops/linear_lora_test.h"

#ifdef QV_WITH_CUDA
#include "ops/cuda/cuda.h"
#endif

/* Products of up to 64 tokens by a form for decode; 0: as they are chosen, -1: by none. */
static void use_decode(pair *p, int form, int shares)
{
    (void)p, (void)form, (void)shares;
#ifdef QV_WITH_CUDA
    if (strcmp(qv_backend_name(p->be[GPU]), "cuda") == 0)
        qv_cuda(p->be[GPU])->decode_tuning = (qv_k_decode_tuning){form, shares};
#endif
}

/* Beyond the shared table: blocks of a cluster that share k, slices that end within a block's rows,
 * k that ends within a step. */
static const qv_lora_shape more_shapes[] = {
    {"down", 9216, 1, {320}},
    {"out", 1024, 2, {136, 56}},
    {"k in eights", 200, 3, {64, 40, 88}},
    {"more slices than rows can touch", 64, 5, {8, 8, 8, 8, 64}},
    {"slices that end within 8 rows", 72, 2, {68, 60}},
};

static const qv_lora_shape *shape_at(size_t i)
{
    size_t n = QV_ROWS(qv_lora_shapes);
    return i < n ? &qv_lora_shapes[i] : &more_shapes[i - n];
}

enum { N_SHAPES = QV_ROWS(qv_lora_shapes) + QV_ROWS(more_shapes) };

/* Segments over n tokens: base, then slots in turn with 1, 2, 3, ... tokens up to `most`. Returns
 * how many; two empty ones at the end, as a recorded step has them. */
static int32_t make_segments(int32_t n, int32_t most, int32_t *start, int32_t *slot)
{
    int32_t at = n / 6, k = 1;
    start[0] = 0;
    slot[0] = -1;
    start[1] = at;
    for (int32_t length = 1; at < n; k++, length = length % most + 1) {
        at = at + length < n ? at + length : n;
        slot[k] = (k - 1) % N_SLOTS;
        start[k + 1] = at;
    }
    for (int i = 0; i < 2; i++, k++) {
        slot[k] = -1;
        start[k + 1] = n;
    }
    return k;
}

/* y of tokens [first, first + n) of x. */
static void run(pair *p, int side, const rig *r, int64_t first, int64_t n, int32_t n_segs,
                const both_memory *start, const both_memory *slot, qv_tensor y, bool f32)
{
    qv_tensor scratch =
        qv_tensor_3d(r->scratch.t[side].data, QV_F32, n, r->shape->n_slices, r->max_rank);
    PASS(qv_op_linear_lora(p->be[side], r->w[side], &r->site[side], n_segs, start->at[side],
                           slot->at[side], qv_tensor_rows(r->x.t[side], first, n), scratch, y,
                           f32));
}

/* --- Against the CPU ---------------------------------------------------------------------- */

static void check_count(pair *p, const rig *r, int32_t n, int32_t most, bool f32)
{
    char what[160];
    int mark = p->n_blocks;
    int32_t start[MAX_TOKENS + 8], slot[MAX_TOKENS + 8];
    int32_t n_segs = make_segments(n, most, start, slot);
    both_memory starts = upload_both(p, start, (size_t)(n_segs + 1) * 4),
                slots = upload_both(p, slot, (size_t)n_segs * 4);
    int64_t gap = n % 2 ? 3 : 8;
    both y = f32 ? nan_f32(p, n, r->n_out + gap) : nan_act(p, n, r->n_out + gap), part = y;
    rig fresh = *r; /* nothing of A x is there from before */
    fresh.scratch = nan_f32(p, n, (int64_t)r->shape->n_slices * r->max_rank);
    for (int side = 0; side < 2; side++) {
        part.t[side] = qv_tensor_cols(y.t[side], 0, r->n_out);
        run(p, side, &fresh, 0, n, n_segs, &starts, &slots, part.t[side], f32);
    }
    snprintf(what, sizeof what, "linear_lora %s, %d tokens, up to %d an adapter, pool of %d%s",
             r->shape->name, n, most, r->max_rank, f32 ? ", f32" : "");
    /* The CPU rounds the product first. */
    compare(p, what, part, f32 ? 1e-4 : 0.008, f32 ? 2e-4 : 0.008);
    float *after = fetch(p, GPU, y.t[GPU]);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = r->n_out; j < r->n_out + gap; j++)
            cr_assert(isnan(after[i * (r->n_out + gap) + j]), "%s: row %lld wrote beyond its end",
                      what, (long long)i);
    free(after);
    release_to(p, mark);
}

static const struct {
    int32_t max_rank, ranks[3];
} pools[] = {{16, {16, 3, 7}}, {72, {33, 72, 17}}, {256, {8, 256, 130}}};

static void check_all(bool deterministic)
{
    static const int32_t counts[] = {1, 2, 7, 8, 9, 16, 20, 33, 64, 65, 130, 600};
    for (size_t i = 0; i < N_SHAPES; i++)
        for (size_t j = 0; j < QV_ROWS(pools); j++) {
            pair *p = open_pair_as(deterministic);
            rig *r = new_rig(p, shape_at(i), pools[j].max_rank, pools[j].ranks);
            bool few = is_emulated(p->be[GPU]); /* each shape with a few of each */
            for (size_t k = few ? (i + j) % 5 : 0; k < QV_ROWS(counts); k += few ? 5 : 1)
                for (int form = 0; form < 3; form++)
                    if (!few || form == (int)(k + j) % 3) {
                        int32_t n = few && counts[k] > 200 ? 200 : counts[k];
                        check_count(p, r, n, form == 0 ? 1 : form == 1 ? 9 : 80, form == 1);
                    }
            free_rig(p, r);
            close_pair(p);
        }
}

Test(cuda_linear_lora, agrees_with_the_cpu, .timeout = 600)
{
    check_all(false);
}

Test(cuda_linear_lora, agrees_with_the_cpu_when_deterministic, .timeout = 600)
{
    check_all(true);
}

/* --- The kernel for decode ----------------------------------------------------------------- */

#ifdef QV_WITH_CUDA
static void require_hopper(const pair *p)
{
    if (strcmp(qv_backend_name(p->be[GPU]), "cuda") != 0 || qv_cuda(p->be[GPU])->major != 9)
        cr_skip_test("no device of 9.0");
}

Test(cuda_linear_lora, every_form_for_decode_agrees_with_the_cpu, .timeout = 600)
{
    static const qv_lora_shape shapes[] = {{"qkv", 456, 3, {136, 64, 56}}, /* 1, 2 and 3 a block */
                                           {"four a block", 200, 5, {8, 24, 16, 16, 64}}};
    static const int32_t counts[] = {1, 9, 32, 41, 64};
    static const int shares[] = {1, 3, 8}; /* by 8 a block shrinks in several rounds */
    int n_forms;
    const qv_k_decode_form *forms = qv_k_decode_forms(&n_forms);
    for (size_t i = 0; i < QV_ROWS(pools) * QV_ROWS(shapes); i++) {
        pair *p = open_pair();
        size_t pool = i / QV_ROWS(shapes);
        rig *r = new_rig(p, &shapes[i % QV_ROWS(shapes)], pools[pool].max_rank, pools[pool].ranks);
        for (int form = 1; form <= n_forms; form++)
            for (size_t j = 0; j < QV_ROWS(counts); j++)
                for (size_t k = 0; k < QV_ROWS(shares) && counts[j] <= forms[form - 1].tokens;
                     k++) {
                    use_decode(p, form, shares[k]);
                    check_count(p, r, counts[j], k == 0 ? 60 : 7, k == 1);
                }
        free_rig(p, r);
        close_pair(p);
    }
}

/* That the forms above were that kernel's: no other refuses one. */
Test(cuda_linear_lora, a_form_that_decode_does_not_have_is_refused)
{
    enum { T = 9 };
    static const int32_t start[] = {0, T}, slot[] = {0};
    int n_forms;
    qv_k_decode_forms(&n_forms);
    pair *p = open_pair();
    require_hopper(p);
    rig *r = new_rig(p, &more_shapes[1], 16, (int32_t[]){16, 5, 7});
    both_memory starts = upload_both(p, start, sizeof start),
                slots = upload_both(p, slot, sizeof slot);
    both y = nan_act(p, T, r->n_out);
    qv_tensor scratch =
        qv_tensor_3d(r->scratch.t[GPU].data, QV_F32, T, r->shape->n_slices, r->max_rank);
    use_decode(p, n_forms + 1, 0);
    FAIL_WITH(QV_ERR_LIMIT, "decode_linear: form",
              qv_op_linear_lora(p->be[GPU], r->w[GPU], &r->site[GPU], 1, starts.at[GPU],
                                slots.at[GPU], qv_tensor_rows(r->x.t[GPU], 0, T), scratch, y.t[GPU],
                                false));
    use_decode(p, -1, 0);
    run(p, GPU, r, 0, T, 1, &starts, &slots, y.t[GPU], false);
    free_rig(p, r);
    close_pair(p);
}

/* Whether a product with adapters is decode's on 9.0, of so many tokens and slices. */
Test(cuda_linear_lora, up_to_64_tokens_are_decodes_where_slices_have_whole_eights_of_rows)
{
    static const struct {
        int32_t n_tokens, n_slices, starts[7];
        bool decodes;
    } cases[] = {{1, 2, {0, 136, 192}, true},
                 {64, 2, {0, 136, 192}, true},
                 {65, 2, {0, 136, 192}, false},
                 {64, 2, {0, 132, 192}, false},
                 {64, 4, {0, 64, 72, 80, 192}, true},
                 {64, 6, {0, 64, 72, 80, 88, 96, 192}, false}}; /* five in 64 rows */
    pair *p = open_pair();
    require_hopper(p);
    rig *r = new_rig(p, &more_shapes[1], 16, (int32_t[]){16, 5, 7});
    both y = nan_act(p, 65, r->n_out);
    for (size_t i = 0; i < QV_ROWS(cases); i++) {
        int32_t n = cases[i].n_tokens;
        qv_k_linear_args c = qv_cuda_linear_args(r->w[GPU], qv_tensor_rows(r->x.t[GPU], 0, n),
                                                 (qv_tensor){0}, qv_tensor_rows(y.t[GPU], 0, n));
        qv_k_stream_lora lora = {.segments = {.n_segs = 1, .n_tokens = n},
                                 .site = {.b = r->site[GPU].b.data,
                                          .n_in = r->shape->n_in,
                                          .n_out = r->n_out,
                                          .max_rank = 64,
                                          .ranges.n = cases[i].n_slices},
                                 .x1 = r->scratch.t[GPU].data};
        memcpy(lora.site.ranges.start, cases[i].starts, sizeof cases[i].starts);
        cr_expect_eq(qv_cuda_decodes(qv_cuda(p->be[GPU]), &c, &lora), cases[i].decodes,
                     "case %zu: %d tokens, %d slices", i, n, cases[i].n_slices);
    }
    free_rig(p, r);
    close_pair(p);
}
#endif

/* --- The same bits ------------------------------------------------------------------------ */

/* Some tokens of n by themselves, and base tokens through the product without adapters. */
static void check_alone(pair *p, const rig *r, int32_t n)
{
    int32_t every = is_emulated(p->be[GPU]) ? 29 : 5;
    static const int32_t one_start[] = {0, 1};
    int mark = p->n_blocks;
    int32_t start[MAX_TOKENS + 8], slot[MAX_TOKENS + 8];
    int32_t n_segs = make_segments(n, 17, start, slot);
    both_memory starts = upload_both(p, start, (size_t)(n_segs + 1) * 4),
                slots = upload_both(p, slot, (size_t)n_segs * 4),
                one = upload_both(p, one_start, sizeof one_start);
    both y = nan_act(p, n, r->n_out), alone = nan_act(p, 1, r->n_out);
    run(p, GPU, r, 0, n, n_segs, &starts, &slots, y.t[GPU], false);
    for (int32_t seg = 0; seg < n_segs; seg++)
        for (int32_t t = start[seg]; t < start[seg + 1]; t += every) {
            both_memory own = upload_both(p, &slot[seg], sizeof slot[seg]);
            if (slot[seg] < 0)
                PASS(qv_op_linear(p->be[GPU], r->w[GPU], qv_tensor_rows(r->x.t[GPU], t, 1),
                                  alone.t[GPU]));
            else
                run(p, GPU, r, t, 1, 1, &one, &own, alone.t[GPU], false);
            float *got = fetch(p, GPU, qv_tensor_rows(y.t[GPU], t, 1));
            float *want = fetch(p, GPU, alone.t[GPU]);
            check_same(r->shape->name, got, want, r->n_out);
            free(got);
            free(want);
        }
    release_to(p, mark);
}

Test(cuda_linear_lora, a_token_has_the_same_bits_in_any_batch_when_deterministic, .timeout = 600)
{
    static const int32_t counts[] = {3, 11, 40, 64, 130, 700};
    for (size_t i = 0; i < N_SHAPES; i++) {
        pair *p = open_pair_as(true);
        rig *r = new_rig(p, shape_at(i), 40, (int32_t[]){1, 40, 19});
        for (size_t k = 0; k < QV_ROWS(counts); k += is_emulated(p->be[GPU]) ? 2 : 1)
            check_alone(p, r, counts[k]);
        free_rig(p, r);
        close_pair(p);
    }
}

/* An adapter of infinities and NaNs beside another. */
static void check_nans(int decode_form)
{
    enum { T = 12 };
    static const int32_t start[] = {0, 3, 7, 9, 12}, slot[] = {0, 3, 1, -1};
    pair *p = open_pair();
    use_decode(p, decode_form, 0);
    rig *r = new_rig(p, &more_shapes[1], 16, (int32_t[]){16, 5, 7});
    r->active[3] = 1;
    qv_lora_slice bad[2] = {{.plane = 0, .rank = 16, .scale = 1},
                            {.plane = 1, .rank = 16, .scale = 1}};
    PASS(qv_backend_upload(p->be[GPU], r->site[GPU].slices + 3 * 2, bad, sizeof bad));
    both_memory starts = upload_both(p, start, sizeof start),
                slots = upload_both(p, slot, sizeof slot);
    both y = nan_act(p, T, r->n_out);
    run(p, GPU, r, 0, T, 4, &starts, &slots, y.t[GPU], false);
    float *got = fetch(p, GPU, y.t[GPU]);
    for (int64_t t = 0; t < T; t++)
        for (int64_t j = 0; j < r->n_out; j++)
            cr_assert((t >= 3 && t < 7) == !isfinite(got[t * r->n_out + j]),
                      "token %lld, column %lld is %g", (long long)t, (long long)j,
                      (double)got[t * r->n_out + j]);
    free(got);
    free_rig(p, r);
    close_pair(p);
}

Test(cuda_linear_lora, an_adapter_of_nans_harms_none_but_its_own_tokens)
{
    check_nans(0);
    check_nans(-1);
}

/* Tokens of no adapter have the bits of the product alone, in the same form of it. */
Test(cuda_linear_lora, base_tokens_have_the_bits_of_the_product_in_a_form_for_decode)
{
    enum { T = 60, FORM = 2 };
    int32_t start[T + 8], slot[T + 8];
    for (size_t i = 0; i < N_SHAPES; i++) {
        pair *p = open_pair();
        use_decode(p, FORM, 2);
        rig *r = new_rig(p, shape_at(i), 16, (int32_t[]){16, 5, 7});
        int32_t n_segs = make_segments(T, 5, start, slot);
        both_memory starts = upload_both(p, start, (size_t)(n_segs + 1) * 4),
                    slots = upload_both(p, slot, (size_t)n_segs * 4);
        both y = nan_act(p, T, r->n_out), base = nan_act(p, T, r->n_out);
        run(p, GPU, r, 0, T, n_segs, &starts, &slots, y.t[GPU], false);
        PASS(qv_op_linear(p->be[GPU], r->w[GPU], qv_tensor_rows(r->x.t[GPU], 0, T), base.t[GPU]));
        float *got = fetch(p, GPU, y.t[GPU]), *want = fetch(p, GPU, base.t[GPU]);
        for (int32_t seg = 0; seg < n_segs; seg++)
            for (int32_t t = start[seg]; t < start[seg + 1] && slot[seg] < 0; t++)
                check_same(r->shape->name, got + t * r->n_out, want + t * r->n_out, r->n_out);
        free(got);
        free(want);
        free_rig(p, r);
        close_pair(p);
    }
}
