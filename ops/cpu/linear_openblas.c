/* qv_op_linear through OpenBLAS: a tile of rows of the weight is widened to float32 in the thread's
 * scratch and multiplied with all tokens. The pool splits the rows; OpenBLAS itself runs on one
 * thread. Its kernels differ by the number of tokens, so a row's last bits may depend on the batch.
 */
#include "ops/cpu/cpu.h"

#include <cblas.h>

typedef struct {
    qv_cpu_backend *cpu;
    const qv_cpu_weight *w;
    qv_tensor x, y;
    int64_t tile_rows;
} linear_ctx;

static const float *widen_rows(const linear_ctx *c, int64_t first, int64_t n_rows, int thread)
{
    int64_t n_in = c->w->base.n_in;
    if (c->w->base.dtype == QV_F32)
        return (const float *)c->w->data + first * n_in;
    const uint16_t *src = (const uint16_t *)c->w->data + first * n_in;
    float *dst = c->cpu->blas_tile + (int64_t)thread * QV_BLAS_TILE;
    for (int64_t i = 0; i < n_rows * n_in; i++)
        dst[i] = qv_bf16_to_f32(src[i]);
    return dst;
}

static void linear_tiles(void *ctx, int64_t begin, int64_t end, int thread)
{
    const linear_ctx *c = ctx;
    int64_t n_in = c->w->base.n_in, n_out = c->w->base.n_out, n_tokens = c->x.shape[0];
    for (int64_t tile = begin; tile < end; tile++) {
        int64_t first = tile * c->tile_rows, left = n_out - first;
        int64_t n_rows = left < c->tile_rows ? left : c->tile_rows;
        const float *w = widen_rows(c, first, n_rows, thread);
        float *y = (float *)c->y.data + first;
        if (n_tokens == 1)
            cblas_sgemv(CblasRowMajor, CblasNoTrans, (int)n_rows, (int)n_in, 1.0f, w, (int)n_in,
                        c->x.data, 1, 0.0f, y, 1);
        else
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)n_tokens, (int)n_rows,
                        (int)n_in, 1.0f, c->x.data, (int)c->x.stride[0], w, (int)n_in, 0.0f, y,
                        (int)c->y.stride[0]);
    }
}

qv_status qv_cpu_linear_openblas(qv_cpu_backend *cpu, const qv_cpu_weight *w, qv_tensor x,
                                 qv_tensor y)
{
    linear_ctx c = {.cpu = cpu, .w = w, .x = x, .y = y};
    int64_t fit = QV_BLAS_TILE / w->base.n_in, share = w->base.n_out / qv_pool_n_threads(cpu->pool);
    c.tile_rows = w->base.dtype == QV_F32 || share < fit ? share : fit;
    if (c.tile_rows < 1)
        c.tile_rows = 1;
    int64_t n_tiles = (w->base.n_out + c.tile_rows - 1) / c.tile_rows;
    int64_t flop = 2 * x.shape[0] * c.tile_rows * w->base.n_in;
    qv_pool_run(cpu->pool, n_tiles, flop / 50, linear_tiles, &c);
    return QV_OK;
}
