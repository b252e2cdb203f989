/* The table through which ops.c calls the CUDA backend. */
#include "ops/cuda/cuda.h"

const qv_op_table qv_cuda_ops = {
#define QV_CUDA_OP_ENTRY(name, args) .name = qv_cuda_##name,
    QV_OP_LIST(QV_CUDA_OP_ENTRY)
#undef QV_CUDA_OP_ENTRY
};
