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
