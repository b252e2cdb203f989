/* Norms of q and k, RoPE and the write of pages in one kernel, and attention
 * that gates its heads itself. Each is compared with the ops that it stands for on the same device,
 * to the bit, and with the CPU.
 */
#include "tests/ops/cuda_test.h"

#define EPS 1e-6f

/* A normed number may be rounded the other way, and a rotation take most of it away. */
#define TURNED_NOISE 0.03

static const qv_attention_shape more_shapes[] = {
    {8, 8, 64, 32, 16},   {16, 2, 128, 128, 16}, {16, 2, 256, 64, 64}, {8, 1, 256, 256, 16},
    {6, 2, 128, 48, 16},  {4, 4, 96, 32, 16},    {48, 8, 64, 64, 32},  {2, 1, 40, 16, 16},
    {16, 4, 256, 64, 20}, {4, 2, 64, 24, 16}, /* 12 angles: three ops */
};

#define N_SHAPES (QV_ROWS(qv_attention_shapes) + QV_ROWS(more_shapes))

static const qv_attention_shape *shape_at(size_t i)
{
    return i < QV_ROWS(qv_attention_shapes) ? &qv_attention_shapes[i]
                                            : &more_shapes[i - QV_ROWS(qv_attention_shapes)];
}

/* A step: of each sequence, so many tokens after so many; `idle` sequences and tokens behind them
 * that are not there, as in a recorded step. */
typedef struct {
    const char *name;
    int n_seqs, idle;
    int32_t before[6], now[6];
} step_case;

static const step_case cases[] = {
    {"one token", 1, 0, {0}, {1}},
    {"decode", 5, 0, {0, 15, 16, 700, 2500}, {1, 1, 1, 1, 1}},
    {"decode, padded", 3, 5, {3, 900, 31}, {1, 1, 1}},
    {"prompts", 3, 0, {0, 0, 0}, {5, 129, 64}},
    {"mixed", 6, 0, {30, 0, 400, 17, 0, 90}, {1, 70, 1, 2, 1, 128}},
};

/* More tokens than blocks that a device has room for: a block goes round over a token's heads. */
static const step_case long_case = {"a long prompt", 2, 0, {0, 10}, {1400, 3}};

typedef struct {
    qv_batch cpu, dev;
    int32_t *pos, *start, *table;
    int32_t n_pages, n_real; /* n_real: tokens that are there */
} step;

static step new_step(duo *d, const step_case *c, int32_t page_tokens)
{
    step s = {.n_pages = 2};
    int32_t stride = 1, n = 0, n_seqs = c->n_seqs + c->idle;
    for (int i = 0; i < c->n_seqs; i++) {
        int32_t pages = (c->before[i] + c->now[i] + page_tokens - 1) / page_tokens;
        stride = pages > stride ? pages : stride;
        s.n_pages += pages;
        n += c->now[i];
    }
    s.n_real = n;
    s.pos = must(calloc((size_t)(n + c->idle), sizeof *s.pos));
    s.start = must(calloc((size_t)n_seqs + 1, sizeof *s.start));
    s.table = must(calloc((size_t)(n_seqs * stride), sizeof *s.table));
    int32_t t = 0, next = s.n_pages - 1;
    for (int i = 0; i < c->n_seqs; i++) {
        s.start[i] = t;
        for (int32_t j = 0; j < c->now[i]; j++)
            s.pos[t++] = c->before[i] + j;
        for (int32_t j = 0; j * page_tokens < c->before[i] + c->now[i]; j++)
            s.table[i * stride + j] = next--;
    }
    for (int i = c->n_seqs; i <= n_seqs; i++)
        s.start[i] = t;
    s.cpu = (qv_batch){.n_tokens = n,
                       .n_seqs = c->n_seqs,
                       .pos = s.pos,
                       .seq_start = s.start,
                       .page_table = s.table,
                       .page_stride = stride};
    qv_batch padded = s.cpu;
    padded.n_tokens += c->idle;
    padded.n_seqs = n_seqs;
    PASS(qv_backend_put_batch(d->dev, &padded, &s.dev));
    return s;
}

static void free_step(step *s)
{
    free(s->pos);
    free(s->start);
    free(s->table);
}

/* What a projection leaves, each query head before its gate, and pages. */
typedef struct {
    twin row, q, gate, k, v, k_pages, v_pages;
    qv_kv_layer cpu_kv, dev_kv;
} operands;

static operands new_operands(duo *d, const qv_attention_shape *s, const step *st, int64_t pad)
{
    int64_t n = st->dev.n_tokens, dim = s->head_dim, n_q = 2 * s->n_heads * dim,
            n_kv = s->n_kv_heads * dim;
    operands o = {.row = wide_twin(d, n, n_q + 2 * n_kv, pad, 2)};
    twin heads = split_of(cols_of(o.row, pad, n_q), s->n_heads, 2 * dim);
    o.q = last_of(heads, 0, dim);
    o.gate = last_of(heads, dim, dim);
    o.k = split_of(cols_of(o.row, pad + n_q, n_kv), s->n_kv_heads, dim);
    o.v = split_of(cols_of(o.row, pad + n_q + n_kv, n_kv), s->n_kv_heads, dim);
    o.k_pages = NEW_TWIN(d, QV_BF16, st->n_pages, s->page_tokens, s->n_kv_heads, dim);
    o.v_pages = NEW_TWIN(d, QV_BF16, st->n_pages, s->page_tokens, s->n_kv_heads, dim);
    fill_twin(d, &o.k_pages, 2);
    fill_twin(d, &o.v_pages, 1);
    o.cpu_kv = (qv_kv_layer){o.k_pages.cpu, o.v_pages.cpu, s->page_tokens};
    o.dev_kv = (qv_kv_layer){o.k_pages.dev, o.v_pages.dev, s->page_tokens};
    return o;
}

/* The numbers of `from` in the blocks of `to`, on both sides. */
static void copy_twin(duo *d, const twin *from, twin *to)
{
    memcpy(to->cpu.data, from->cpu.data, (size_t)from->n * sizeof(float));
    send_twin(d, to);
}

static void free_operands(duo *d, operands *o)
{
    free_twin(d, &o->row);
    free_twin(d, &o->k_pages);
    free_twin(d, &o->v_pages);
}

static void check_equal(duo *d, const char *what, const char *name, const qv_tensor *want,
                        const qv_tensor *got)
{
    char both[200];
    snprintf(both, sizeof both, "%s: %s", what, name);
    float *x = fetch(d, want), *y = fetch(d, got);
    check_same(both, y, x, qv_tensor_count(want));
    free(x);
    free(y);
}

static twin real_rows(twin t, const step *st)
{
    t.cpu = qv_tensor_rows(t.cpu, 0, st->n_real);
    t.dev = qv_tensor_rows(t.dev, 0, st->n_real);
    return t;
}

static void check_attention(duo *d, const char *what, const qv_attention_shape *s, const step *st,
                            const operands *o)
{
    float scale = 1.0f / sqrtf((float)s->head_dim);
    int64_t n = st->dev.n_tokens;
    twin two = NEW_TWIN(d, QV_BF16, n, s->n_heads, s->head_dim);
    twin one = NEW_TWIN(d, QV_BF16, n, s->n_heads, s->head_dim);
    twin real = real_rows(one, st), gate = real_rows(o->gate, st), q = real_rows(o->q, st);
    qv_tensor two_real = qv_tensor_rows(two.dev, 0, st->n_real);
    fill_twin(d, &two, 1); /* rows that are not there: something finite to gate */
    poison_twin(d, &one);
    PASS(qv_op_attention(d->dev, &st->dev, &o->dev_kv, scale, o->q.dev, two.dev));
    PASS(qv_op_sigmoid_gate(d->dev, two.dev, o->gate.dev));
    for (int i = 0; i < 2; i++) { /* again: the counters must be as before */
        PASS(qv_op_gated_attention(d->dev, &st->dev, &o->dev_kv, scale, o->q.dev, o->gate.dev,
                                   one.dev));
        check_equal(d, what, "gated heads", &two_real, &real.dev);
    }
    PASS(qv_op_gated_attention(d->cpu, &st->cpu, &o->cpu_kv, scale, q.cpu, gate.cpu, real.cpu));
    check_twin(d, what, &real, 8e-3, 3, 0.02);
    free_twin(d, &one);
    free_twin(d, &two);
}

static void check_case(duo *d, const qv_attention_shape *s, const step_case *c, int64_t pad,
                       bool attend)
{
    char what[160];
    snprintf(what, sizeof what, "%s, %lld heads, %lld KV heads of %lld, %d turn, pages of %d",
             c->name, (long long)s->n_heads, (long long)s->n_kv_heads, (long long)s->head_dim,
             s->rotary_dim, s->page_tokens);
    step st = new_step(d, c, s->page_tokens);
    operands three = new_operands(d, s, &st, pad), one = new_operands(d, s, &st, pad);
    copy_twin(d, &three.row, &one.row);
    copy_twin(d, &three.k_pages, &one.k_pages);
    copy_twin(d, &three.v_pages, &one.v_pages);
    twin q_norm = NEW_TWIN(d, QV_F32, s->head_dim), k_norm = NEW_TWIN(d, QV_F32, s->head_dim);
    fill_twin(d, &q_norm, 1);
    fill_twin(d, &k_norm, 1);
    qv_norm_rope how = {.q_norm = q_norm.dev,
                        .k_norm = k_norm.dev,
                        .eps = EPS,
                        .plus_one = s->n_heads % 4 == 0,
                        .rotary_dim = s->rotary_dim,
                        .theta = 1e7};
    PASS(qv_op_rms_norm(d->dev, three.q.dev, q_norm.dev, EPS, how.plus_one, three.q.dev));
    PASS(qv_op_rms_norm(d->dev, three.k.dev, k_norm.dev, EPS, how.plus_one, three.k.dev));
    PASS(qv_op_rope_kv_write(d->dev, &st.dev, s->rotary_dim, 1e7, three.q.dev, three.k.dev,
                             three.v.dev, &three.dev_kv));
    PASS(qv_op_norm_rope_kv_write(d->dev, &st.dev, &how, one.q.dev, one.k.dev, one.v.dev,
                                  &one.dev_kv));
    twin q = real_rows(one.q, &st), k = real_rows(one.k, &st), v = real_rows(one.v, &st);
    qv_tensor three_q = qv_tensor_rows(three.q.dev, 0, st.n_real);
    check_equal(d, what, "q", &three_q, &q.dev);
    check_equal(d, what, "gates", &three.gate.dev, &one.gate.dev);
    check_equal(d, what, "v", &three.v.dev, &one.v.dev);
    check_equal(d, what, "pages of keys", &three.k_pages.dev, &one.k_pages.dev);
    check_equal(d, what, "pages of values", &three.v_pages.dev, &one.v_pages.dev);

    how.q_norm = q_norm.cpu;
    how.k_norm = k_norm.cpu;
    PASS(qv_op_norm_rope_kv_write(d->cpu, &st.cpu, &how, q.cpu, k.cpu, v.cpu, &one.cpu_kv));
    check_twin(d, what, &q, CLOSE_RELATIVE, CLOSE_ULPS, TURNED_NOISE);
    check_twin(d, what, &one.k_pages, CLOSE_RELATIVE, CLOSE_ULPS, TURNED_NOISE);
    check_twin(d, what, &one.v_pages, 0, 0, 0);
    if (attend)
        check_attention(d, what, s, &st, &one);
    free_operands(d, &three);
    free_operands(d, &one);
    free_twin(d, &q_norm);
    free_twin(d, &k_norm);
    free_step(&st);
}

Test(cuda_gated_attention, gives_the_bits_of_the_ops_that_it_stands_for, .timeout = 600)
{
    duo d = open_duo(1);
    for (size_t c = 0; c < QV_ROWS(cases); c++)
        for (size_t i = 0; i < N_SHAPES; i++)
            if (!is_emulated(d.dev) || (c + i) % 2 == 0)
                check_case(&d, shape_at(i), &cases[c], 8, true);
    close_duo(&d);
}

Test(cuda_gated_attention, goes_round_where_there_are_many_tokens)
{
    static const qv_attention_shape shapes[] = {
        {4, 2, 64, 16, 16}, {16, 4, 256, 64, 16}, {6, 2, 128, 48, 16}};
    duo d = open_duo(2);
    for (size_t i = 0; i < QV_ROWS(shapes); i++)
        check_case(&d, &shapes[i], &long_case, 8, false);
    close_duo(&d);
}

/* Rows that are not on 16 bytes. */
Test(cuda_gated_attention, leaves_odd_rows_to_the_ops_apart)
{
    duo d = open_duo(3);
    const qv_attention_shape s = {4, 2, 64, 16, 16};
    check_case(&d, &s, &cases[1], 5, true);
    check_case(&d, &s, &cases[4], 5, true);
    close_duo(&d);
}

Test(cuda_gated_attention, leaves_tokens_that_are_not_there_alone)
{
    duo d = open_duo(4);
    const qv_attention_shape s = {8, 2, 128, 64, 16};
    step st = new_step(&d, &cases[2], s.page_tokens);
    operands o = new_operands(&d, &s, &st, 8);
    twin w = NEW_TWIN(&d, QV_F32, s.head_dim);
    fill_twin(&d, &w, 1);
    const qv_norm_rope how = {w.dev, w.dev, EPS, true, s.rotary_dim, 1e4};
    qv_tensor idle = qv_tensor_rows(o.row.dev, st.n_real, cases[2].idle);
    float *before = fetch(&d, &idle);
    PASS(qv_op_norm_rope_kv_write(d.dev, &st.dev, &how, o.q.dev, o.k.dev, o.v.dev, &o.dev_kv));
    float *after = fetch(&d, &idle);
    for (int64_t i = 0; i < qv_tensor_count(&idle); i++)
        cr_assert_eq(before[i], after[i], "number %lld behind the step has changed", (long long)i);
    free(before);
    free(after);
    free_twin(&d, &w);
    free_operands(&d, &o);
    free_step(&st);
    close_duo(&d);
}

Test(cuda_gated_attention, refuses_norms_of_other_sizes)
{
    duo d = open_duo(5);
    const qv_attention_shape s = {4, 2, 64, 16, 16};
    step st = new_step(&d, &cases[0], s.page_tokens);
    operands o = new_operands(&d, &s, &st, 8);
    twin w = NEW_TWIN(&d, QV_F32, 32);
    const qv_norm_rope how = {w.dev, w.dev, EPS, true, s.rotary_dim, 1e4};
    FAIL_WITH(QV_ERR_SHAPE, "q_norm is f32[32]",
              qv_op_norm_rope_kv_write(d.dev, &st.dev, &how, o.q.dev, o.k.dev, o.v.dev, &o.dev_kv));
    FAIL_WITH(QV_ERR_SHAPE, "gate is",
              qv_op_gated_attention(d.dev, &st.dev, &o.dev_kv, 1, o.q.dev,
                                    qv_tensor_last(o.gate.dev, 0, 32), o.q.dev));
    free_twin(&d, &w);
    free_operands(&d, &o);
    free_step(&st);
    close_duo(&d);
}
