/* Norms, pointwise ops, embedding and gathers on the device against the CPU. */
#include "tests/ops/cuda_test.h"

#define EPS 1e-6f

/* Rows of the shared table, and sizes of released models that take other variants of the kernels.
 */
static const qv_row_shape more_rows[] = {
    {9, 16, 256}, {5, 64, 128}, {4, 1, 2048}, {3, 1, 2688}, {3, 1, 4096},
    {2, 1, 8192}, {1, 1, 8200}, {33, 2, 40},  {3, 8, 512},
};

static const qv_row_shape *row_shape(size_t i)
{
    return i < QV_ROWS(qv_row_shapes) ? &qv_row_shapes[i] : &more_rows[i - QV_ROWS(qv_row_shapes)];
}

#define N_ROW_SHAPES (QV_ROWS(qv_row_shapes) + QV_ROWS(more_rows))

/* Padding before and after each row: 8 keeps rows on 16 bytes, 5 does not. */
static const int64_t pads[] = {8, 5};

static const char *label(const char *op, const qv_row_shape *s, int64_t pad, char *buf, size_t size)
{
    snprintf(buf, size, "%s [%lld, %lld, %lld], %lld apart", op, (long long)s->n_tokens,
             (long long)s->n, (long long)s->d, (long long)(2 * pad));
    return buf;
}

/* [T, n, d] in the middle of wider rows; `whole` is what to free and to compare, gaps included. */
static twin rows_of(duo *d, const qv_row_shape *s, int64_t pad, float scale, twin *whole)
{
    *whole = wide_twin(d, s->n_tokens, s->n * s->d, pad, scale);
    return split_of(cols_of(*whole, pad, s->n * s->d), s->n, s->d);
}

static twin flat(twin t)
{
    int64_t n = t.cpu.shape[1] * t.cpu.shape[2];
    t.cpu.n_dims = t.dev.n_dims = 2;
    t.cpu.shape[1] = t.dev.shape[1] = n;
    t.cpu.stride[1] = t.dev.stride[1] = 1;
    return t;
}

Test(cuda_dense, norms_agree_with_the_cpu)
{
    duo d = open_duo(1);
    char what[128];
    for (size_t i = 0; i < N_ROW_SHAPES; i++)
        for (size_t p = 0; p < QV_ROWS(pads); p++) {
            const qv_row_shape *s = row_shape(i);
            twin xw, yw, zw, x = rows_of(&d, s, pads[p], 3, &xw),
                             y = rows_of(&d, s, pads[p], 1, &yw);
            twin z = rows_of(&d, s, pads[p], 3, &zw);
            twin w = NEW_TWIN(&d, QV_F32, s->d), wide = NEW_TWIN(&d, QV_F32, s->n * s->d);
            fill_twin(&d, &w, 1);
            fill_twin(&d, &wide, 1);
            for (int plus_one = 0; plus_one < 2; plus_one++) {
                PASS(qv_op_rms_norm(d.cpu, x.cpu, w.cpu, EPS, plus_one, y.cpu));
                PASS(qv_op_rms_norm(d.dev, x.dev, w.dev, EPS, plus_one, y.dev));
                check_twin(&d, label("rms_norm", s, pads[p], what, sizeof what), &yw,
                           CLOSE_RELATIVE, CLOSE_ULPS, CLOSE_NOISE);
            }
            for (int first = 0; first < 2; first++) {
                qv_tensor wc = first ? wide.cpu : w.cpu, wd = first ? wide.dev : w.dev;
                PASS(qv_op_gated_rms_norm(d.cpu, x.cpu, z.cpu, wc, EPS, first, y.cpu));
                PASS(qv_op_gated_rms_norm(d.dev, x.dev, z.dev, wd, EPS, first, y.dev));
                check_twin(&d, label("gated_rms_norm", s, pads[p], what, sizeof what), &yw,
                           CLOSE_RELATIVE, CLOSE_ULPS, CLOSE_NOISE);
            }
            /* in place */
            PASS(qv_op_rms_norm(d.cpu, x.cpu, w.cpu, EPS, true, x.cpu));
            PASS(qv_op_rms_norm(d.dev, x.dev, w.dev, EPS, true, x.dev));
            check_twin(&d, label("rms_norm in place", s, pads[p], what, sizeof what), &xw,
                       CLOSE_RELATIVE, CLOSE_ULPS, CLOSE_NOISE);
            free_twin(&d, &xw);
            free_twin(&d, &yw);
            free_twin(&d, &zw);
            free_twin(&d, &w);
            free_twin(&d, &wide);
        }
    close_duo(&d);
}

/* The rest is compared where it means something: as a part of what y and it stand for together. */
static void check_sum(duo *d, const char *what, const twin *y, const twin *rest)
{
    float *high = fetch(d, &y->dev), *low = fetch(d, &rest->dev);
    float *want = host_numbers(&y->cpu), *want_low = host_numbers(&rest->cpu);
    int64_t n = qv_tensor_count(&y->cpu);
    for (int64_t i = 0; i < n; i++) {
        cr_assert_leq(fabsf(low[i]), fabsf(high[i]) / 256, "%s: rest %g of %g", what,
                      (double)low[i], (double)high[i]);
        high[i] += low[i];
        want[i] += want_low[i];
    }
    check_numbers(what, high, want, n, 2e-5, 0.02, 1e-5);
    free(high);
    free(low);
    free(want);
    free(want_low);
}

Test(cuda_dense, the_stream_is_added_and_normalised_as_on_the_cpu)
{
    duo d = open_duo(4);
    char what[128];
    for (size_t i = 0; i < N_ROW_SHAPES; i++)
        for (size_t p = 0; p < QV_ROWS(pads); p++)
            for (int kind = 0; kind < 4; kind++) { /* 1: a delta, 2: the rest is asked for */
                const qv_row_shape *s = row_shape(i);
                int64_t n = s->n * s->d, pad = pads[p];
                twin xw = NEW_TWIN(&d, QV_F32, s->n_tokens, n + 2 * pad);
                twin dw = NEW_TWIN(&d, QV_F32, s->n_tokens, n + 2 * pad);
                twin yw = wide_twin(&d, s->n_tokens, n, pad, 1);
                twin rw = wide_twin(&d, s->n_tokens, n, pad, 1), w = NEW_TWIN(&d, QV_F32, n);
                fill_twin(&d, &xw, 3), fill_twin(&d, &dw, 1), fill_twin(&d, &w, 1);
                twin x = cols_of(xw, pad, n),
                     delta = kind & 1 ? cols_of(dw, pad, n) : (twin){.n = 0};
                twin y = cols_of(yw, pad, n),
                     rest = kind & 2 ? cols_of(rw, pad, n) : (twin){.n = 0};
                PASS(
                    qv_op_add_rms_norm(d.cpu, x.cpu, delta.cpu, w.cpu, EPS, true, y.cpu, rest.cpu));
                PASS(
                    qv_op_add_rms_norm(d.dev, x.dev, delta.dev, w.dev, EPS, true, y.dev, rest.dev));
                label(kind & 1 ? "add_rms_norm" : "add_rms_norm of nothing", s, pad, what,
                      sizeof what);
                check_twin(&d, what, &xw, 0, 0, 0);
                check_twin(&d, what, &yw, CLOSE_RELATIVE, CLOSE_ULPS, CLOSE_NOISE);
                if (kind & 2)
                    check_sum(&d, what, &y, &rest);
                free_twin(&d, &xw), free_twin(&d, &dw), free_twin(&d, &yw);
                free_twin(&d, &rw), free_twin(&d, &w);
            }
    close_duo(&d);
}

Test(cuda_dense, gates_agree_with_the_cpu_and_leave_the_gaps_alone)
{
    duo d = open_duo(2);
    char what[128];
    for (size_t i = 0; i < N_ROW_SHAPES; i++)
        for (size_t p = 0; p < QV_ROWS(pads); p++) {
            const qv_row_shape *s = row_shape(i);
            twin xw, yw, zw, x = rows_of(&d, s, pads[p], 4, &xw),
                             y = rows_of(&d, s, pads[p], 1, &yw);
            twin z = rows_of(&d, s, pads[p], 4, &zw), fx = flat(x), fy = flat(y), fz = flat(z);
#define CHECK_OP(op, t, args_cpu, args_dev)                                                        \
    PASS(qv_op_##op args_cpu);                                                                     \
    PASS(qv_op_##op args_dev);                                                                     \
    check_twin(&d, label(#op, s, pads[p], what, sizeof what), &t, CLOSE_RELATIVE, CLOSE_ULPS,      \
               CLOSE_NOISE)
            CHECK_OP(swiglu, yw, (d.cpu, fx.cpu, fz.cpu, fy.cpu), (d.dev, fx.dev, fz.dev, fy.dev));
            CHECK_OP(relu2, yw, (d.cpu, fx.cpu, fy.cpu), (d.dev, fx.dev, fy.dev));
            CHECK_OP(sigmoid_gate, xw, (d.cpu, x.cpu, z.cpu), (d.dev, x.dev, z.dev));
            int64_t n = s->n * s->d, pad = pads[p];
            twin sw = NEW_TWIN(&d, QV_F32, s->n_tokens, n + 2 * pad);
            twin dw = NEW_TWIN(&d, QV_F32, s->n_tokens, n + 2 * pad);
            fill_twin(&d, &sw, 3), fill_twin(&d, &dw, 3);
            twin stream = cols_of(sw, pad, n), delta = cols_of(dw, pad, n),
                 gate = cols_of(fz, 0, 1);
            PASS(qv_op_add(d.cpu, stream.cpu, delta.cpu, (qv_tensor){0}));
            PASS(qv_op_add(d.dev, stream.dev, delta.dev, (qv_tensor){0}));
            check_twin(&d, label("add", s, pad, what, sizeof what), &sw, 0, 0, 0);
            PASS(qv_op_add(d.cpu, stream.cpu, delta.cpu, gate.cpu));
            PASS(qv_op_add(d.dev, stream.dev, delta.dev, gate.dev));
            check_twin(&d, label("add by a gate", s, pad, what, sizeof what), &sw, 1e-5, 0.01,
                       1e-6);
            free_twin(&d, &sw);
            free_twin(&d, &dw);
            free_twin(&d, &xw);
            free_twin(&d, &yw);
            free_twin(&d, &zw);
        }
    close_duo(&d);
}

Test(cuda_dense, rows_are_looked_up_and_absent_ones_are_zero)
{
    duo d = open_duo(3);
    static const int64_t widths[] = {1, 33, 192, 2560};
    const int32_t ids[] = {9, 10, 0, 57, 41, 10, 99};
    int32_t *dev_ids = to_device(&d, ids, sizeof ids);
    for (size_t i = 0; i < QV_ROWS(widths); i++)
        for (int f32 = 0; f32 < 2; f32++) {
            twin table = NEW_TWIN(&d, f32 ? QV_F32 : QV_BF16, 48, widths[i]);
            twin y = NEW_TWIN(&d, QV_F32, QV_ROWS(ids), widths[i]);
            fill_twin(&d, &table, 1);
            poison_twin(&d, &y);
            PASS(qv_op_embed(d.cpu, table.cpu, 10, ids, y.cpu));
            PASS(qv_op_embed(d.dev, table.dev, 10, dev_ids, y.dev));
            check_twin(&d, "embed", &y, 0, 0, 0);
            if (!f32) {
                const int32_t rows[] = {3, 3, 47, 0};
                int32_t *dev_rows = to_device(&d, rows, sizeof rows);
                twin some = NEW_TWIN(&d, QV_BF16, QV_ROWS(rows), widths[i]);
                poison_twin(&d, &some);
                PASS(qv_op_gather_rows(d.cpu, table.cpu, rows, some.cpu));
                PASS(qv_op_gather_rows(d.dev, table.dev, dev_rows, some.dev));
                check_twin(&d, "gather_rows", &some, 0, 0, 0);
                free_twin(&d, &some);
                qv_backend_free(d.dev, dev_rows);
            }
            free_twin(&d, &table);
            free_twin(&d, &y);
        }
    qv_backend_free(d.dev, dev_ids);
    close_duo(&d);
}
