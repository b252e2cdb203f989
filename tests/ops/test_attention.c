/* rope_kv_write and attention over pages. */
#include "tests/ops/ops_test.h"

/* One or more sequences whose pages are scattered over the pool; pages that no sequence has been
 * given, and positions that no token has written, hold NaN. */
#define MAX_SEQS 4

typedef struct {
    qv_attention_shape shape;
    int n_seqs;
    int32_t n_tokens[MAX_SEQS]; /* the whole length of each sequence */
    int32_t page_stride, n_pages;
    int32_t *pages;   /* [n_seqs, page_stride] */
    float *q, *k, *v; /* [sum of n_tokens, heads, d]: what the model would compute for each token */
    float *k_pool, *v_pool;
    qv_kv_layer kv;
} fixture;

static int32_t n_all_tokens(const fixture *f)
{
    int32_t n = 0;
    for (int i = 0; i < f->n_seqs; i++)
        n += f->n_tokens[i];
    return n;
}

static fixture new_fixture(const qv_attention_shape *shape, int n_seqs, const int32_t *n_tokens)
{
    fixture f = {.shape = *shape, .n_seqs = n_seqs};
    qv_rng rng = qv_rng_seed(1);
    for (int i = 0; i < n_seqs; i++) {
        f.n_tokens[i] = n_tokens[i];
        int32_t n = (n_tokens[i] + shape->page_tokens - 1) / shape->page_tokens;
        f.page_stride = n > f.page_stride ? n : f.page_stride;
        f.n_pages += n;
    }
    f.n_pages += 3;
    int32_t *free_pages = must(malloc((size_t)f.n_pages * sizeof *free_pages));
    for (int32_t i = 0; i < f.n_pages; i++) {
        int32_t j = (int32_t)qv_rng_range(&rng, 0, i + 1);
        free_pages[i] = free_pages[j];
        free_pages[j] = i;
    }
    f.pages = must(malloc((size_t)(n_seqs * f.page_stride) * sizeof *f.pages));
    memset(f.pages, 0xFF, (size_t)(n_seqs * f.page_stride) * sizeof *f.pages);
    for (int i = 0, next = 0; i < n_seqs; i++)
        for (int32_t j = 0; j * shape->page_tokens < n_tokens[i]; j++)
            f.pages[i * f.page_stride + j] = free_pages[next++];
    free(free_pages);

    int64_t all = n_all_tokens(&f), d = shape->head_dim;
    f.q = random_floats(&rng, all * shape->n_heads * d, 2);
    f.k = random_floats(&rng, all * shape->n_kv_heads * d, 2);
    f.v = random_floats(&rng, all * shape->n_kv_heads * d, 1);
    int64_t pool = f.n_pages * shape->page_tokens * shape->n_kv_heads * d;
    f.k_pool = filled_floats(pool, NAN);
    f.v_pool = filled_floats(pool, NAN);
    f.kv = (qv_kv_layer){
        .k = qv_tensor_4d(f.k_pool, QV_F32, f.n_pages, shape->page_tokens, shape->n_kv_heads, d),
        .v = qv_tensor_4d(f.v_pool, QV_F32, f.n_pages, shape->page_tokens, shape->n_kv_heads, d),
        .page_tokens = shape->page_tokens,
    };
    return f;
}

static void poison_pool(fixture *f)
{
    int64_t n = qv_tensor_count(&f->kv.k);
    for (int64_t i = 0; i < n; i++)
        f->k_pool[i] = f->v_pool[i] = NAN;
}

static void free_fixture(fixture *f)
{
    free(f->pages);
    free(f->q);
    free(f->k);
    free(f->v);
    free(f->k_pool);
    free(f->v_pool);
}

/* Run all sequences to their ends, `chunk` tokens of each at most per step, sequences together or
 * one after the other. o, and q as it is after the rotation, in the order of the fixture. */
static void run_steps(qv_backend *be, fixture *f, int32_t chunk, bool together, float *q, float *o)
{
    const qv_attention_shape *s = &f->shape;
    int64_t q_row = s->n_heads * s->head_dim, kv_row = s->n_kv_heads * s->head_dim;
    int32_t done[MAX_SEQS] = {0}, all = n_all_tokens(f), left = all;
    int32_t *pos = must(malloc((size_t)all * sizeof *pos)),
            *from = must(malloc((size_t)all * sizeof *from));
    float *step_q = filled_floats(all * q_row, NAN), *step_o = filled_floats(all * q_row, NAN);
    float *step_k = filled_floats(all * kv_row, NAN), *step_v = filled_floats(all * kv_row, NAN);
    while (left > 0) {
        int32_t seq_start[MAX_SEQS + 1] = {0}, n = 0, n_seqs = 0, base = 0;
        int32_t *table = must(malloc((size_t)(MAX_SEQS * f->page_stride) * sizeof *table));
        for (int i = 0; i < f->n_seqs; base += f->n_tokens[i++]) {
            int32_t more = f->n_tokens[i] - done[i] < chunk ? f->n_tokens[i] - done[i] : chunk;
            if (more == 0 || (!together && n_seqs > 0))
                continue;
            for (int32_t t = 0; t < more; t++, n++) {
                from[n] = base + done[i] + t;
                pos[n] = done[i] + t;
                memcpy(step_q + n * q_row, f->q + from[n] * q_row, (size_t)q_row * sizeof(float));
                memcpy(step_k + n * kv_row, f->k + from[n] * kv_row,
                       (size_t)kv_row * sizeof(float));
                memcpy(step_v + n * kv_row, f->v + from[n] * kv_row,
                       (size_t)kv_row * sizeof(float));
            }
            memcpy(table + n_seqs * f->page_stride, f->pages + i * f->page_stride,
                   (size_t)f->page_stride * sizeof *table);
            done[i] += more;
            seq_start[++n_seqs] = n;
        }
        qv_batch batch = {.n_tokens = n,
                          .n_seqs = n_seqs,
                          .pos = pos,
                          .seq_start = seq_start,
                          .page_table = table,
                          .page_stride = f->page_stride};
        qv_tensor qt = qv_tensor_3d(step_q, QV_F32, n, s->n_heads, s->head_dim);
        qv_tensor ot = qv_tensor_3d(step_o, QV_F32, n, s->n_heads, s->head_dim);
        PASS(qv_op_rope_kv_write(be, &batch, s->rotary_dim, 1e7, qt,
                                 qv_tensor_3d(step_k, QV_F32, n, s->n_kv_heads, s->head_dim),
                                 qv_tensor_3d(step_v, QV_F32, n, s->n_kv_heads, s->head_dim),
                                 &f->kv));
        PASS(qv_op_attention(be, &batch, &f->kv, 1.0f / sqrtf((float)s->head_dim), qt, ot));
        for (int32_t i = 0; i < n; i++) {
            memcpy(o + from[i] * q_row, step_o + i * q_row, (size_t)q_row * sizeof(float));
            memcpy(q + from[i] * q_row, step_q + i * q_row, (size_t)q_row * sizeof(float));
        }
        free(table);
        left -= n;
    }
    free(pos);
    free(from);
    free(step_q);
    free(step_k);
    free(step_v);
    free(step_o);
}

/* --- Oracle ------------------------------------------------------------------------------- */

static void rotate_d(const float *x, int32_t pos, const qv_attention_shape *s, double *y)
{
    int half = s->rotary_dim / 2;
    for (int64_t i = 0; i < s->head_dim; i++)
        y[i] = x[i];
    for (int i = 0; i < half; i++) {
        double angle = pos * pow(1e7, -2.0 * i / s->rotary_dim);
        y[i] = x[i] * cos(angle) - x[half + i] * sin(angle);
        y[half + i] = x[half + i] * cos(angle) + x[i] * sin(angle);
    }
}

static void oracle_row(const fixture *f, int32_t base, int32_t pos, int64_t head, double *out)
{
    const qv_attention_shape *s = &f->shape;
    int64_t d = s->head_dim, kv_head = head / (s->n_heads / s->n_kv_heads);
    double *q = new_doubles(d), *k = new_doubles(d), *score = new_doubles(pos + 1), max = -INFINITY;
    rotate_d(f->q + ((base + pos) * s->n_heads + head) * d, pos, s, q);
    for (int32_t p = 0; p <= pos; p++) {
        rotate_d(f->k + ((base + p) * s->n_kv_heads + kv_head) * d, p, s, k);
        for (int64_t i = 0; i < d; i++)
            score[p] += q[i] * k[i];
        score[p] /= sqrt((double)d);
        max = score[p] > max ? score[p] : max;
    }
    double sum = 0;
    for (int64_t i = 0; i < d; i++)
        out[i] = 0;
    for (int32_t p = 0; p <= pos; p++) {
        double weight = exp(score[p] - max);
        sum += weight;
        for (int64_t i = 0; i < d; i++)
            out[i] += weight * f->v[((base + p) * s->n_kv_heads + kv_head) * d + i];
    }
    for (int64_t i = 0; i < d; i++)
        out[i] /= sum;
    free(q);
    free(k);
    free(score);
}

/* Values are at most 1; a weight errs by what its score errs: about d roundings of size |q||k|. */
#define ATTENTION_ERROR 2e-5

static void check_fixture(qv_backend *be, fixture *f, const float *o)
{
    const qv_attention_shape *s = &f->shape;
    double *want = new_doubles(s->head_dim);
    int32_t base = 0;
    for (int i = 0; i < f->n_seqs; base += f->n_tokens[i++])
        for (int32_t pos = 0; pos < f->n_tokens[i]; pos += 1 + pos / 7)
            for (int64_t head = 0; head < s->n_heads; head++) {
                char what[128];
                snprintf(what, sizeof what,
                         "%s, head_dim %lld, sequence %d, position %d, head %lld",
                         qv_backend_describe(be), (long long)s->head_dim, i, pos, (long long)head);
                oracle_row(f, base, pos, head, want);
                check_close(what, o + ((base + pos) * s->n_heads + head) * s->head_dim, want,
                            s->head_dim, 0, ATTENTION_ERROR);
            }
    free(want);
}

/* --- Tests -------------------------------------------------------------------------------- */

static const int32_t lengths[MAX_SEQS] = {1, 150, 64, 33};

Test(attention, agrees_with_double_over_scattered_pages)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_attention_shapes); i++) {
        fixture f = new_fixture(&qv_attention_shapes[i], MAX_SEQS, lengths);
        int64_t n = (int64_t)n_all_tokens(&f) * f.shape.n_heads * f.shape.head_dim;
        float *q = filled_floats(n, NAN), *o = filled_floats(n, NAN);
        run_steps(be, &f, 1000, true, q, o);
        check_fixture(be, &f, o);
        free(q);
        free(o);
        free_fixture(&f);
    }
}

Test(attention, chunks_batches_and_threads_change_no_bit)
{
    static const int32_t chunks[] = {1, 7, 64, 100};
    for (size_t a = 0; a < QV_ROWS(isas); a++)
        for (size_t i = 0; i < QV_ROWS(qv_attention_shapes); i++) {
            qv_backend *one = open_isa(isas[a], 1), *many = open_isa(isas[a], 3);
            if (!one || !many)
                continue;
            fixture f = new_fixture(&qv_attention_shapes[i], MAX_SEQS, lengths);
            int64_t n = (int64_t)n_all_tokens(&f) * f.shape.n_heads * f.shape.head_dim;
            float *q = filled_floats(n, NAN), *o = filled_floats(n, NAN);
            float *q2 = filled_floats(n, NAN), *o2 = filled_floats(n, NAN);
            run_steps(one, &f, 1000, false, q, o);
            for (size_t c = 0; c < QV_ROWS(chunks); c++) {
                char what[128];
                snprintf(what, sizeof what, "%s, head_dim %lld, chunks of %d", isas[a],
                         (long long)f.shape.head_dim, chunks[c]);
                poison_pool(&f);
                run_steps(many, &f, chunks[c], true, q2, o2);
                check_same(what, q2, q, n);
                check_same(what, o2, o, n);
            }
            free(q);
            free(o);
            free(q2);
            free(o2);
            free_fixture(&f);
            qv_backend_close(one);
            qv_backend_close(many);
        }
}

Test(attention, avx2_and_avx512_give_the_same_bits)
{
    qv_backend *wide = open_isa("avx512", 1), *narrow = open_isa("avx2", 1);
    if (!wide || !narrow)
        cr_skip_test("this processor has no AVX-512");
    for (size_t i = 0; i < QV_ROWS(qv_attention_shapes); i++) {
        fixture f = new_fixture(&qv_attention_shapes[i], MAX_SEQS, lengths);
        int64_t n = (int64_t)n_all_tokens(&f) * f.shape.n_heads * f.shape.head_dim;
        float *q = filled_floats(n, NAN), *o = filled_floats(n, NAN), *o2 = filled_floats(n, NAN);
        run_steps(wide, &f, 64, true, q, o);
        poison_pool(&f);
        run_steps(narrow, &f, 64, true, q, o2);
        check_same("avx2", o2, o, n);
        free(q);
        free(o);
        free(o2);
        free_fixture(&f);
    }
    qv_backend_close(wide);
    qv_backend_close(narrow);
}

Test(attention, long_contexts_stay_accurate)
{
    static const qv_attention_shape shape = {2, 1, 64, 16, 16};
    static const int32_t length = 3000;
    qv_backend *be = open_cpu(2);
    fixture f = new_fixture(&shape, 1, &length);
    int64_t n = (int64_t)length * shape.n_heads * shape.head_dim;
    float *q = filled_floats(n, NAN), *o = filled_floats(n, NAN);
    run_steps(be, &f, 512, true, q, o);
    check_fixture(be, &f, o);
    free(q);
    free(o);
    free_fixture(&f);
    qv_backend_close(be);
}

/* Scores far apart, with the largest in any block; all equal; very negative. */
Test(attention, softmax_survives_large_scores)
{
    static const qv_attention_shape shape = {1, 1, 16, 0, 16};
    static const float scales[] = {0.0f, 50.0f, -50.0f, 1000.0f};
    static const int32_t length = 200;
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(scales); i++) {
        fixture f = new_fixture(&shape, 1, &length);
        int64_t n = (int64_t)length * 16;
        for (int64_t j = 0; j < n; j++)
            f.q[j] *= scales[i];
        float *q = filled_floats(n, NAN), *o = filled_floats(n, NAN);
        double *want = new_doubles(16);
        run_steps(be, &f, 64, true, q, o);
        for (int32_t pos = 0; pos < length; pos += 13) {
            oracle_row(&f, 0, pos, 0, want);
            check_close("large scores", o + pos * 16, want, 16, 0, 2e-3);
        }
        free(want);
        free(q);
        free(o);
        free_fixture(&f);
    }
    qv_backend_close(be);
}

Test(attention, no_rotary_dimensions_means_no_rotation)
{
    static const qv_attention_shape shape = {2, 2, 8, 0, 4};
    static const int32_t length = 5;
    qv_backend *be = open_cpu(1);
    fixture f = new_fixture(&shape, 1, &length);
    float *q = filled_floats(5 * 16, NAN), *o = filled_floats(5 * 16, NAN);
    run_steps(be, &f, 5, true, q, o);
    check_same("q", q, f.q, 5 * 16);
    free(q);
    free(o);
    free_fixture(&f);
    qv_backend_close(be);
}

Test(attention, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    float m[256] = {0};
    qv_batch batch = {.n_tokens = 2};
    qv_kv_layer kv = {.k = qv_tensor_4d(m, QV_F32, 2, 4, 2, 8),
                      .v = qv_tensor_4d(m, QV_F32, 2, 4, 2, 8),
                      .page_tokens = 4};
    qv_tensor q = qv_tensor_3d(m, QV_F32, 2, 4, 8), k = qv_tensor_3d(m, QV_F32, 2, 2, 8);
    FAIL_WITH(QV_ERR_SHAPE, "attention: q is f32[2, 4, 9], but needs f32[2, *, 8]",
              qv_op_attention(be, &batch, &kv, 1.0f, qv_tensor_3d(m, QV_F32, 2, 4, 9), q));
    FAIL_WITH(QV_ERR_SHAPE, "o is f32[2, 2, 8]", qv_op_attention(be, &batch, &kv, 1.0f, q, k));
    FAIL_WITH(QV_ERR_SHAPE, "3 heads do not share 2 heads evenly",
              qv_op_attention(be, &batch, &kv, 1.0f, qv_tensor_3d(m, QV_F32, 2, 3, 8),
                              qv_tensor_3d(m, QV_F32, 2, 3, 8)));
    FAIL_WITH(QV_ERR_SHAPE, "9 rotary dimensions of 8",
              qv_op_rope_kv_write(be, &batch, 9, 1e4, q, k, k, &kv));
    FAIL_WITH(QV_ERR_SHAPE, "3 rotary dimensions of 8",
              qv_op_rope_kv_write(be, &batch, 3, 1e4, q, k, k, &kv));
    FAIL_WITH(QV_ERR_ARG, "theta 0", qv_op_rope_kv_write(be, &batch, 4, 0, q, k, k, &kv));
    qv_kv_layer other = kv;
    other.page_tokens = 5;
    FAIL_WITH(QV_ERR_SHAPE, "k is f32[2, 4, 2, 8], but needs f32[*, 5, *, *]",
              qv_op_attention(be, &batch, &other, 1.0f, q, q));
    other = kv;
    other.v = qv_tensor_4d(m, QV_F32, 1, 4, 2, 8);
    FAIL_WITH(QV_ERR_SHAPE, "v is f32[1, 4, 2, 8]",
              qv_op_attention(be, &batch, &other, 1.0f, q, q));
    qv_backend_close(be);
}
