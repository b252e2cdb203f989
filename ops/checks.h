/* What the files of ops/ops.h's functions share: how an op of a backend is called, and checks of
 * its arguments. Private to ops/. */
#ifndef QV_OPS_CHECKS_H
#define QV_OPS_CHECKS_H

#include "ops/backend.h"
#include "ops/op_times.h"
#include "ops/ops.h"

/* An op of the backend; with the clock on, timed under its name and the shape of its matrix. */
#define CALL_ON(table_, op, n_out, n_in, ...)                                                      \
    (be->times == NULL ? (table_)->op(__VA_ARGS__)                                                 \
                       : qv_op_times_note(be->times, #op, n_out, n_in, (table_)->op(__VA_ARGS__)))
#define CALL_SHAPED(op, n_out, n_in, ...) CALL_ON(be->ops, op, n_out, n_in, __VA_ARGS__)
#define CALL(op, ...)                     CALL_ON(be->ops, op, 0, 0, __VA_ARGS__)
#define COLLECT(op, ...)                  CALL_ON(be->table, op, 0, 0, be, __VA_ARGS__)

#define ANY (-1) /* a size that may be anything */

/* The sizes follow the dtype: EXPECT("add", delta, QV_F32, n_tokens, ANY). */
#define EXPECT(op, t, dtype, ...)                                                                  \
    QV_TRY(qv_expect(op, #t, &(t), dtype,                                                          \
                     (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                    \
                     (int64_t[]){__VA_ARGS__}))
#define EXPECT_CONTIGUOUS(op, t, dtype, ...)                                                       \
    do {                                                                                           \
        EXPECT(op, t, dtype, __VA_ARGS__);                                                         \
        QV_TRY(qv_expect_contiguous(op, #t, &(t)));                                                \
    } while (0)

/* Errors: SHAPE, a sentence with the op, the argument, what it is and what it should be; ARG: there
 * is no memory. */
qv_status qv_expect(const char *op, const char *arg, const qv_tensor *t, qv_dtype dtype, int n_dims,
                    const int64_t *shape);
qv_status qv_expect_contiguous(const char *op, const char *arg, const qv_tensor *t);

static inline bool qv_is_weight_dtype(qv_dtype dtype)
{
    return dtype == QV_F32 || dtype == QV_BF16;
}

/* Whether a collective has anybody to meet. */
static inline bool qv_has_peers(const qv_backend *be)
{
    return be->comm != NULL && qv_comm_n_ranks(be->comm) > 1;
}

/* Of ops that others contain. */
qv_status qv_check_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y,
                          qv_dtype y_dtype);
qv_status qv_check_add_rms_norm(const qv_backend *be, qv_tensor residual, qv_tensor delta,
                                qv_tensor w, qv_tensor y, qv_tensor rest);
qv_status qv_check_delta(qv_backend *be, const char *op, qv_tensor delta, qv_tensor gate, int64_t n,
                         int64_t d);
qv_status qv_check_gated_norm(const qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w,
                              bool gate_first, qv_tensor y);
qv_status qv_check_slices(const char *op, int32_t n_slices, const int64_t *start, int64_t n_out);
qv_status qv_check_scratch(const char *op, qv_tensor scratch, const char *rows, int64_t n_rows,
                           int32_t n_slices, int32_t max_rank);
qv_status qv_check_head_groups(const char *op, int64_t n_heads, int64_t n_groups);

#endif
