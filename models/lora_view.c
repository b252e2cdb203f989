#include "models/lora_view.h"

#include <stdlib.h>

/* One dimension of a view: its extent, and the distance of neighbours in the tensor and in the
 * result. */
typedef struct {
    int64_t n, from, to;
} dim;

/* Copy what one step of the outermost dimension covers. */
static void copy_slab(const dim *mid, const dim *in, const float *from, float *to)
{
    for (int64_t i = 0; i < mid->n; i++) {
        const float *src = from + i * mid->from;
        float *dst = to + i * mid->to;
        for (int64_t j = 0; j < in->n; j++)
            dst[j * in->to] = src[j * in->from];
    }
}

/* The tensor is read once, in its own order: the dimension whose steps are largest goes outside,
 * and what one of its steps covers is contiguous. */
qv_status qv_lora_view_f32(const qv_lora_view *v, float *out)
{
    dim dims[3] = {{v->n, v->stride[0], v->rows * v->cols},
                   {v->rows, v->stride[1], v->cols},
                   {v->cols, v->stride[2], 1}};
    if (qv_lora_view_is_plain(v))
        return qv_stored_tensor_f32(v->tensor, 0, v->tensor->n_elems, out);
    for (int i = 0; i < 2; i++) {
        for (int k = i + 1; k < 3; k++) {
            if (dims[k].from > dims[i].from) {
                dim swap = dims[i];
                dims[i] = dims[k];
                dims[k] = swap;
            }
        }
    }
    int64_t slab = dims[1].n * dims[2].n;
    float *numbers = malloc((size_t)slab * sizeof *numbers);
    if (numbers == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to read %.200s", v->tensor->name);
    qv_status status = QV_OK;
    for (int64_t i = 0; i < dims[0].n && status == QV_OK; i++) {
        status = qv_stored_tensor_f32(v->tensor, i * slab, slab, numbers);
        if (status == QV_OK)
            copy_slab(&dims[1], &dims[2], numbers, out + i * dims[0].to);
    }
    free(numbers);
    return status;
}
