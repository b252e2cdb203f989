/* Descriptions of arrays in device memory for Hopper's copy engine. Host code. */
#ifndef QV_KERNELS_TENSOR_MAP_CUH
#define QV_KERNELS_TENSOR_MAP_CUH

#include "kernels/device.cuh"

#include <cuda.h>

typedef CUresult qv_map_encode_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                  const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                  const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* data[sizes[RANK - 1]]..[sizes[0]], `strides` bytes from one to the next of the outer ones, in
 * boxes of box[RANK - 1] x .. x box[0] numbers, box[0] being 128 bytes: they arrive with a swizzle
 * of 128 bytes, of BF16 the arrangement of tile_at<64>, with zeros for what is outside. `name` is
 * the op's, for errors: DEVICE. */
template <int RANK>
static inline qv_status qv_k_tensor_map_of(const char *name, CUtensorMapDataType type,
                                           const void *data, const cuuint64_t (&sizes)[RANK],
                                           const cuuint64_t (&strides)[RANK - 1],
                                           const cuuint32_t (&box)[RANK], CUtensorMap *map)
{
    static void *encode; /* the same for all threads that may find it */
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSuccess;
    if (!encode && (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                                     cudaEnableDefault, &found) != cudaSuccess ||
                    found != cudaDriverEntryPointSuccess))
        return qv_fail(QV_ERR_DEVICE, "%s: the driver has no tensor maps", name);
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    static_assert(RANK <= 4, "steps");
    CUresult result = ((qv_map_encode_fn *)encode)(
        map, type, RANK, const_cast<void *>(data), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        return qv_fail(QV_ERR_DEVICE, "%s: no tensor map of [.., %llu, %llu]: error %d", name,
                       (unsigned long long)sizes[1], (unsigned long long)sizes[0], (int)result);
    return QV_OK;
}

/* The same of BF16. */
template <int RANK>
static inline qv_status qv_k_tensor_map(const char *name, const void *data,
                                        const cuuint64_t (&sizes)[RANK],
                                        const cuuint64_t (&strides)[RANK - 1],
                                        const cuuint32_t (&box)[RANK], CUtensorMap *map)
{
    return qv_k_tensor_map_of(name, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, sizes, strides, box,
                              map);
}

#endif
