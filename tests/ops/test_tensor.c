#include "ops/tensor.h"

#include <criterion/criterion.h>
#include <string.h>

static float memory[120];

Test(tensor, contiguous_tensors_have_row_major_strides)
{
    qv_tensor t = qv_tensor_4d(memory, QV_F32, 2, 3, 4, 5);
    cr_assert_eq(t.n_dims, 4);
    const int64_t want[] = {60, 20, 5, 1};
    for (int i = 0; i < 4; i++)
        cr_assert_eq(t.stride[i], want[i], "stride %d is %lld", i, (long long)t.stride[i]);
    cr_assert_eq(qv_tensor_count(&t), 120);
    cr_assert(qv_tensor_is_contiguous(&t));
}

Test(tensor, views_move_the_start_and_keep_the_row_stride)
{
    qv_tensor t = qv_tensor_2d(memory, QV_F32, 6, 20);
    qv_tensor rows = qv_tensor_rows(t, 2, 3);
    cr_assert_eq(rows.data, memory + 40);
    cr_assert_eq(rows.shape[0], 3);
    qv_tensor cols = qv_tensor_cols(t, 5, 10);
    cr_assert_eq(cols.data, memory + 5);
    cr_assert_eq(cols.shape[1], 10);
    cr_assert_eq(cols.stride[0], 20);
    cr_assert_not(qv_tensor_is_contiguous(&cols));
    qv_tensor heads = qv_tensor_split(cols, 2, 5);
    cr_assert_eq(heads.n_dims, 3);
    cr_assert_eq(heads.stride[0], 20);
    cr_assert_eq(heads.stride[1], 5);
    qv_tensor last = qv_tensor_last(heads, 3, 2);
    cr_assert_eq(last.data, memory + 8);
    cr_assert_eq(last.shape[2], 2);
    cr_assert_eq(last.stride[1], 5);
}

Test(tensor, element_size_scales_offsets)
{
    qv_tensor t = qv_tensor_2d(memory, QV_BF16, 4, 10);
    cr_assert_eq((char *)qv_tensor_rows(t, 1, 1).data, (char *)memory + 20);
}

Test(tensor, one_row_is_contiguous_whatever_its_stride)
{
    qv_tensor row = qv_tensor_cols(qv_tensor_rows(qv_tensor_2d(memory, QV_F32, 6, 20), 3, 1), 0, 7);
    cr_assert(qv_tensor_is_contiguous(&row));
}

Test(tensor, empty_tensors_may_have_no_memory)
{
    qv_tensor t = qv_tensor_2d(NULL, QV_F32, 0, 20);
    cr_assert_eq(qv_tensor_count(&t), 0);
    cr_assert_null(qv_tensor_cols(t, 4, 8).data);
    cr_assert_null(qv_tensor_rows(t, 0, 0).data);
}

Test(tensor, description_names_dtype_and_shape)
{
    char buf[64];
    qv_tensor t = qv_tensor_2d(memory, QV_BF16, 4, 192);
    cr_assert_str_eq(qv_tensor_describe(&t, buf, sizeof buf), "bf16[4, 192]");
    qv_tensor none = {.dtype = QV_F32};
    cr_assert_str_eq(qv_tensor_describe(&none, buf, sizeof buf), "f32[]");
}

Test(tensor, description_is_cut_where_the_buffer_ends)
{
    char buf[8];
    qv_tensor t = qv_tensor_2d(memory, QV_BF16, 4, 192);
    cr_assert_str_eq(qv_tensor_describe(&t, buf, sizeof buf), "bf16[4,");
}
