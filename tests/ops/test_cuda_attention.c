/* rope_kv_write and attention over pages on the device against the CPU. */
#include "tests/ops/cuda_test.h"

static const qv_attention_shape more_shapes[] = {
    {8, 8, 64, 32, 16},
    {16, 2, 128, 128, 16},
    {16, 2, 256, 64, 64},
    {8, 1, 256, 256, 16},
};

/* A step: of each sequence, so many tokens after so many. */
typedef struct {
    const char *name;
    int n_seqs;
    int32_t before[6], now[6];
} step_case;

static const step_case cases[] = {
    {"one token", 1, {0}, {1}},
    {"decode", 5, {0, 15, 16, 700, 2500}, {1, 1, 1, 1, 1}},
    {"prompts", 3, {0, 0, 0}, {5, 129, 64}},
    {"chunks", 2, {100, 64}, {200, 33}},
    {"mixed", 6, {30, 0, 400, 17, 0, 90}, {1, 70, 1, 2, 1, 128}},
};

typedef struct {
    duo *d;
    twin q, k, v, o, k_pages, v_pages;
    qv_kv_layer cpu_kv, dev_kv;
    qv_batch cpu, dev;
    int32_t *pos, *start, *table;
} fixture;

static fixture new_fixture(duo *d, const qv_attention_shape *s, const step_case *c)
{
    fixture f = {.d = d};
    int32_t n = 0, n_pages = 0, stride = 1;
    for (int i = 0; i < c->n_seqs; i++) {
        int32_t pages = (c->before[i] + c->now[i] + s->page_tokens - 1) / s->page_tokens;
        stride = pages > stride ? pages : stride;
        n_pages += pages;
        n += c->now[i];
    }
    n_pages += 2;
    f.pos = must(malloc((size_t)n * sizeof *f.pos));
    f.start = must(malloc((size_t)(c->n_seqs + 1) * sizeof *f.start));
    f.table = must(malloc((size_t)(c->n_seqs * stride) * sizeof *f.table));
    memset(f.table, 0xFF, (size_t)(c->n_seqs * stride) * sizeof *f.table);
    int32_t t = 0, next = n_pages - 1; /* pages from the end, and two that nobody has */
    for (int i = 0; i < c->n_seqs; i++) {
        f.start[i] = t;
        for (int32_t j = 0; j < c->now[i]; j++)
            f.pos[t++] = c->before[i] + j;
        for (int32_t j = 0; j * s->page_tokens < c->before[i] + c->now[i]; j++)
            f.table[i * stride + j] = next--;
    }
    f.start[c->n_seqs] = t;
    f.cpu = (qv_batch){.n_tokens = n,
                       .n_seqs = c->n_seqs,
                       .pos = f.pos,
                       .seq_start = f.start,
                       .page_table = f.table,
                       .page_stride = stride};
    PASS(qv_backend_put_batch(d->dev, &f.cpu, &f.dev));
    /* q, k and v in one row, as a projection leaves them. */
    int64_t d_head = s->head_dim;
    f.q = NEW_TWIN(d, QV_BF16, n, s->n_heads, d_head);
    f.k = NEW_TWIN(d, QV_BF16, n, s->n_kv_heads, d_head);
    f.v = NEW_TWIN(d, QV_BF16, n, s->n_kv_heads, d_head);
    f.o = NEW_TWIN(d, QV_BF16, n, s->n_heads, d_head);
    f.k_pages = NEW_TWIN(d, QV_BF16, n_pages, s->page_tokens, s->n_kv_heads, d_head);
    f.v_pages = NEW_TWIN(d, QV_BF16, n_pages, s->page_tokens, s->n_kv_heads, d_head);
    fill_twin(d, &f.q, 2);
    fill_twin(d, &f.k, 2);
    fill_twin(d, &f.v, 1);
    poison_twin(d, &f.o);
    fill_twin(d, &f.k_pages, 2);
    fill_twin(d, &f.v_pages, 1);
    f.cpu_kv = (qv_kv_layer){f.k_pages.cpu, f.v_pages.cpu, s->page_tokens};
    f.dev_kv = (qv_kv_layer){f.k_pages.dev, f.v_pages.dev, s->page_tokens};
    return f;
}

static void free_fixture(fixture *f)
{
    twin *all[] = {&f->q, &f->k, &f->v, &f->o, &f->k_pages, &f->v_pages};
    for (size_t i = 0; i < QV_ROWS(all); i++)
        free_twin(f->d, all[i]);
    free(f->pos);
    free(f->start);
    free(f->table);
}

static void check_case(duo *d, const qv_attention_shape *s, const step_case *c)
{
    char what[160];
    snprintf(what, sizeof what, "%s, %lld heads, %lld KV heads of %lld, pages of %d", c->name,
             (long long)s->n_heads, (long long)s->n_kv_heads, (long long)s->head_dim,
             s->page_tokens);
    fixture f = new_fixture(d, s, c);
    float scale = 1.0f / sqrtf((float)s->head_dim);
    PASS(qv_op_rope_kv_write(d->cpu, &f.cpu, s->rotary_dim, 1e7, f.q.cpu, f.k.cpu, f.v.cpu,
                             &f.cpu_kv));
    PASS(qv_op_rope_kv_write(d->dev, &f.dev, s->rotary_dim, 1e7, f.q.dev, f.k.dev, f.v.dev,
                             &f.dev_kv));
    check_twin(d, what, &f.q, 1e-3, 2, 1e-6);
    check_twin(d, what, &f.k_pages, 1e-3, 2, 1e-6);
    check_twin(d, what, &f.v_pages, 0, 0, 0);
    PASS(qv_op_attention(d->cpu, &f.cpu, &f.cpu_kv, scale, f.q.cpu, f.o.cpu));
    for (int i = 0; i < 2; i++) { /* again: the counters must be as before */
        PASS(qv_op_attention(d->dev, &f.dev, &f.dev_kv, scale, f.q.dev, f.o.dev));
        check_twin(d, what, &f.o, 6e-3, 2, 0.02); /* probabilities are rounded to BF16 */
    }
    /* Not told the bounds, the op takes the worst. */
    f.dev.max_seq_tokens = f.dev.max_context = 0;
    poison_twin(d, &f.o);
    PASS(qv_op_attention(d->cpu, &f.cpu, &f.cpu_kv, scale, f.q.cpu, f.o.cpu));
    PASS(qv_op_attention(d->dev, &f.dev, &f.dev_kv, scale, f.q.dev, f.o.dev));
    check_twin(d, what, &f.o, 6e-3, 2, 0.02);
    free_fixture(&f);
}

Test(cuda_attention, agrees_with_the_cpu_over_scattered_pages)
{
    duo d = open_duo(1);
    for (size_t c = 0; c < QV_ROWS(cases); c++) {
        for (size_t i = 0; i < QV_ROWS(qv_attention_shapes); i++)
            check_case(&d, &qv_attention_shapes[i], &cases[c]);
        for (size_t i = 0; i < QV_ROWS(more_shapes); i++)
            check_case(&d, &more_shapes[i], &cases[c]);
    }
    close_duo(&d);
}

Test(cuda_attention, leaves_padding_alone)
{
    duo d = open_duo(2);
    const qv_attention_shape s = {8, 2, 128, 64, 16};
    const step_case c = {"padded", 2, {40, 300}, {1, 1}};
    fixture f = new_fixture(&d, &s, &c);
    /* Two sequences and two tokens more, which are not there. */
    const int32_t start[] = {0, 1, 2, 2, 2}, pos[] = {40, 300, 0, 0};
    int32_t *table = must(calloc((size_t)(4 * f.cpu.page_stride), sizeof *table));
    memcpy(table, f.table, (size_t)(2 * f.cpu.page_stride) * sizeof *table);
    qv_batch padded = f.cpu;
    padded.n_tokens = padded.n_seqs = 4;
    padded.seq_start = start;
    padded.pos = pos;
    padded.page_table = table;
    PASS(qv_backend_put_batch(d.dev, &padded, &f.dev));
    twin q = NEW_TWIN(&d, QV_BF16, 4, s.n_heads, s.head_dim), o, k, v;
    o = NEW_TWIN(&d, QV_BF16, 4, s.n_heads, s.head_dim);
    k = NEW_TWIN(&d, QV_BF16, 4, s.n_kv_heads, s.head_dim);
    v = NEW_TWIN(&d, QV_BF16, 4, s.n_kv_heads, s.head_dim);
    fill_twin(&d, &q, 1);
    fill_twin(&d, &k, 1);
    fill_twin(&d, &v, 1);
    poison_twin(&d, &o);
    PASS(qv_op_rope_kv_write(d.dev, &f.dev, 64, 1e4, q.dev, k.dev, v.dev, &f.dev_kv));
    PASS(qv_op_attention(d.dev, &f.dev, &f.dev_kv, 0.1f, q.dev, o.dev));
    PASS(qv_op_rope_kv_write(d.cpu, &f.cpu, 64, 1e4, qv_tensor_rows(q.cpu, 0, 2),
                             qv_tensor_rows(k.cpu, 0, 2), qv_tensor_rows(v.cpu, 0, 2), &f.cpu_kv));
    PASS(qv_op_attention(d.cpu, &f.cpu, &f.cpu_kv, 0.1f, qv_tensor_rows(q.cpu, 0, 2),
                         qv_tensor_rows(o.cpu, 0, 2)));
    check_twin(&d, "pages", &f.k_pages, 1e-3, 2, 1e-6);
    check_twin(&d, "values", &f.v_pages, 0, 0, 0);
    twin real = o;
    real.cpu = qv_tensor_rows(o.cpu, 0, 2);
    real.dev = qv_tensor_rows(o.dev, 0, 2);
    check_twin(&d, "attention", &real, 6e-3, 2, 0.02);
    free_twin(&d, &q);
    free_twin(&d, &o);
    free_twin(&d, &k);
    free_twin(&d, &v);
    free(table);
    free_fixture(&f);
    close_duo(&d);
}

/* --- The same bits in any company --------------------------------------------------------- */

/* A sequence whose numbers follow from `id`, whatever its place in the batch and in the pages. */
typedef struct {
    uint64_t id;
    int32_t before, now;
} member;

static void fill_rows(uint16_t *bits, uint64_t seed, int64_t n)
{
    qv_rng rng = qv_rng_seed(seed);
    float *x = must(malloc((size_t)n * sizeof *x));
    qv_fill_uniform(&rng, x, n, -2, 2);
    round_to_bf16(x, n);
    uint16_t *rounded = to_bf16(x, n);
    memcpy(bits, rounded, (size_t)n * sizeof *bits);
    free(rounded);
    free(x);
}

/* The step's output for member `which`, as bits: [now, n_heads, head_dim]; owned. `padding` is how
 * many sequences without tokens follow. */
static uint16_t *run_members(duo *d, const qv_attention_shape *s, const member *m, int n_members,
                             int which, int padding)
{
    int32_t stride = 1, n_tokens = 0, n_pages = 1, n_seqs = n_members + padding;
    for (int i = 0; i < n_members; i++) {
        int32_t pages = (m[i].before + m[i].now + s->page_tokens - 1) / s->page_tokens;
        stride = pages > stride ? pages : stride;
        n_pages += pages;
        n_tokens += m[i].now;
    }
    int64_t q_row = s->n_heads * s->head_dim, kv_row = s->n_kv_heads * s->head_dim;
    int64_t pool = (int64_t)n_pages * s->page_tokens * kv_row;
    int32_t *pos = must(calloc((size_t)n_tokens, sizeof *pos)), t = 0, next = 0;
    int32_t *start = must(calloc((size_t)n_seqs + 1, sizeof *start));
    int32_t *table = must(calloc((size_t)(n_seqs * stride), sizeof *table));
    uint16_t *q = must(malloc((size_t)(n_tokens * q_row) * sizeof *q));
    uint16_t *k = must(malloc((size_t)pool * sizeof *k)), *v = must(malloc((size_t)pool * 2));
    memset(k, 0xff, (size_t)pool * sizeof *k); /* NaN where nobody is */
    memset(v, 0xff, (size_t)pool * sizeof *v);
    for (int i = 0; i < n_members; i++) {
        start[i] = t;
        for (int32_t p = 0; p < m[i].before + m[i].now; p++) {
            if (p % s->page_tokens == 0)
                table[i * stride + p / s->page_tokens] = next++;
            int64_t row = (int64_t)(next - 1) * s->page_tokens + p % s->page_tokens;
            fill_rows(k + row * kv_row, m[i].id * 100003 + 3 * (uint64_t)p, kv_row);
            fill_rows(v + row * kv_row, m[i].id * 100003 + 3 * (uint64_t)p + 1, kv_row);
            if (p < m[i].before)
                continue;
            pos[t] = p;
            fill_rows(q + t++ * q_row, m[i].id * 100003 + 3 * (uint64_t)p + 2, q_row);
        }
    }
    for (int i = n_members; i <= n_seqs; i++)
        start[i] = t;
    qv_batch host = {.n_tokens = n_tokens,
                     .n_seqs = n_seqs,
                     .pos = pos,
                     .seq_start = start,
                     .page_table = table,
                     .page_stride = stride};
    qv_batch batch;
    PASS(qv_backend_put_batch(d->dev, &host, &batch));
    void *q_dev = to_device(d, q, (size_t)(n_tokens * q_row) * 2);
    void *k_dev = to_device(d, k, (size_t)pool * 2), *v_dev = to_device(d, v, (size_t)pool * 2);
    void *o_dev = to_device(d, q, (size_t)(n_tokens * q_row) * 2);
    qv_kv_layer kv = {
        qv_tensor_4d(k_dev, QV_BF16, n_pages, s->page_tokens, s->n_kv_heads, s->head_dim),
        qv_tensor_4d(v_dev, QV_BF16, n_pages, s->page_tokens, s->n_kv_heads, s->head_dim),
        s->page_tokens};
    PASS(qv_op_attention(d->dev, &batch, &kv, 1.0f / sqrtf((float)s->head_dim),
                         qv_tensor_3d(q_dev, QV_BF16, n_tokens, s->n_heads, s->head_dim),
                         qv_tensor_3d(o_dev, QV_BF16, n_tokens, s->n_heads, s->head_dim)));
    size_t bytes = (size_t)(m[which].now * q_row) * 2;
    uint16_t *out = must(malloc(bytes));
    PASS(qv_backend_download(d->dev, out, (uint16_t *)o_dev + start[which] * q_row, bytes));
    void *on_device[] = {q_dev, k_dev, v_dev, o_dev}, *here[] = {pos, start, table, q, k, v};
    for (size_t i = 0; i < QV_ROWS(on_device); i++)
        qv_backend_free(d->dev, on_device[i]);
    for (size_t i = 0; i < QV_ROWS(here); i++)
        free(here[i]);
    return out;
}

Test(cuda_attention, deterministic_bits_do_not_depend_on_the_batch)
{
    qv_backend_options options = {.name = "cuda", .deterministic = true};
    duo d = open_duo(3);
    qv_backend_close(d.dev);
    PASS(qv_backend_open(&options, &d.dev));
    static const qv_attention_shape shapes[] = {
        {4, 2, 64, 16, 16}, {16, 4, 256, 64, 16}, {32, 2, 128, 0, 32}, {6, 2, 128, 0, 5}};
    static const member watched[] = {{1, 2499, 1}, {2, 700, 1}, {3, 333, 90}, {4, 0, 150}};
    for (size_t i = 0; i < QV_ROWS(shapes); i++)
        for (size_t w = 0; w < QV_ROWS(watched); w++) {
            member crowd[24] = {{11, 5, 1}, {12, 0, 77}, {13, 130, 3}};
            for (int k = 3; k < 24; k++)
                crowd[k] = (member){.id = 20 + (uint64_t)k, .before = 9 * k, .now = 1};
            uint16_t *alone = run_members(&d, &shapes[i], &watched[w], 1, 0, 0);
            size_t bytes = (size_t)(watched[w].now * shapes[i].n_heads * shapes[i].head_dim) * 2;
            for (size_t k = 0; k < bytes / 2; k++)
                cr_assert((alone[k] & 0x7f80) != 0x7f80,
                          "number %zu of %d tokens after %d: not finite", k, watched[w].now,
                          watched[w].before);
            for (int place = 0; place < 24; place += is_emulated(d.dev) ? 22 : 11) {
                member all[24];
                memcpy(all, crowd, sizeof all);
                all[place] = watched[w];
                uint16_t *beside = run_members(&d, &shapes[i], all, 24, place, place);
                cr_assert(memcmp(alone, beside, bytes) == 0,
                          "%d tokens after %d, heads of %lld: other bits as sequence %d of 24 than "
                          "alone",
                          watched[w].now, watched[w].before, (long long)shapes[i].head_dim, place);
                free(beside);
            }
            free(alone);
        }
    close_duo(&d);
}

/* A sequence in one step, in steps of some tokens, and its last token alone, which decode would do:
 * each token gets the same bits. */
Test(cuda_attention, deterministic_bits_do_not_depend_on_how_a_sequence_is_cut)
{
    enum { N = 301 };
    static const int32_t cuts[] = {1, 2, 7, 64, 130};
    qv_backend_options options = {.name = "cuda", .deterministic = true};
    duo d = open_duo(4);
    qv_backend_close(d.dev);
    PASS(qv_backend_open(&options, &d.dev));
    static const qv_attention_shape shapes[] = {
        {4, 2, 64, 16, 16}, {16, 4, 256, 64, 16}, {32, 2, 128, 0, 32}, {6, 2, 128, 0, 5}};
    for (size_t i = 0; i < QV_ROWS(shapes); i++) {
        const qv_attention_shape *s = &shapes[i];
        int64_t row = s->n_heads * s->head_dim;
        const member whole = {7, 0, N};
        uint16_t *all = run_members(&d, s, &whole, 1, 0, 0);
        for (size_t j = 0; j < QV_ROWS(cuts); j++)
            for (int32_t before = cuts[j] > 7 ? 0 : N - 3 * cuts[j]; before < N;
                 before += cuts[j]) {
                int32_t now = N - before < cuts[j] ? N - before : cuts[j];
                const member part = {7, before, now};
                uint16_t *got = run_members(&d, s, &part, 1, 0, 0);
                cr_assert(memcmp(got, all + before * row, (size_t)(now * row) * 2) == 0,
                          "%d tokens after %d, heads of %lld: other bits than in one step", now,
                          before, (long long)s->head_dim);
                free(got);
            }
        free(all);
    }
    close_duo(&d);
}
