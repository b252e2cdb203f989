/* What the forms of the routed experts' grouped GEMM share. */
#ifndef QV_KERNELS_MOE_GEMM_CUH
#define QV_KERNELS_MOE_GEMM_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_moe.h"

constexpr int EXPERT_MASK = (1 << QV_K_MOE_EXPERT_BITS) - 1;

/* Columns of y. */
__host__ __device__ __forceinline__ int64_t y_columns(const qv_k_moe_linear_args &c)
{
    return c.act == QV_K_MOE_SWIGLU ? c.n_out / 2 : c.n_out;
}

/* qv_k_moe_linear for many pairs, on Hopper: experts without gaps, rows of x, w and y at multiples
 * of 16 bytes, columns of y a multiple of 8, less than 2^32 times 16 bytes of x. n_active: experts
 * that may have pairs. Errors: DEVICE. */
qv_status qv_k_moe_linear_hopper(const qv_k_list *list, const qv_k_moe_linear_args *args,
                                 int64_t n_active, void *stream);

/* The same for n_in up to MOE_STAY_K, n_out a multiple of 16, nothing done to the products. */
constexpr int MOE_STAY_K = 512;
qv_status qv_k_moe_linear_stay(const qv_k_list *list, const qv_k_moe_linear_args *args,
                               int64_t n_active, void *stream);

#endif
