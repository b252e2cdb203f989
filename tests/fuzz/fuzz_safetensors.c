/* Any bytes, as a safetensors file. Every tensor of what opens lies inside the input and is read.
 */
#include "models/safetensors.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Read all numbers and find the tensor again by its name. */
static void check_tensor(const qv_safetensors *st, const qv_stored_tensor *tensor,
                         const uint8_t *data, size_t size)
{
    const uint8_t *first = tensor->data;
    QV_ASSERT(first >= data && first + tensor->bytes <= data + size);
    QV_ASSERT(tensor->bytes == (uint64_t)tensor->n_elems * qv_dtype_size(tensor->dtype));
    QV_ASSERT(qv_safetensors_find(st, tensor->name) == tensor);
    char text[64];
    qv_stored_tensor_describe(tensor, text, sizeof text);
    (void)qv_stored_tensor_require_finite(tensor, 0, tensor->n_elems);
    float *numbers = malloc(((size_t)tensor->n_elems + 1) * sizeof *numbers);
    if (numbers != NULL)
        (void)qv_stored_tensor_f32(tensor, 0, tensor->n_elems, numbers);
    free(numbers);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    qv_safetensors *st;
    if (qv_safetensors_open_memory(data, size, "fuzz", &st) != QV_OK)
        return 0;
    for (size_t i = 0; i < qv_safetensors_count(st); i++)
        check_tensor(st, qv_safetensors_at(st, i), data, size);
    qv_safetensors_close(st);
    return 0;
}
