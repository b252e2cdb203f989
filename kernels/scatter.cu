/* Pieces of an upload to where they belong, from one block of memory that came in one copy. Reads
 * and writes every byte once; it runs beside steps, so it takes few blocks a piece.
 */
#include "kernels/device.cuh"
#include "kernels/kernels_upload.h"

namespace
{

constexpr int THREADS = 256;
constexpr int BLOCKS_A_PIECE = 4;

/* Units of type T; a piece that begins or ends between them is for the next smaller. */
template <typename T> __device__ void move_units(const qv_k_piece &p, const char *sent, T zero)
{
    T *dst = (T *)p.dst;
    const T *src = (const T *)(sent + (p.from == QV_K_ZEROS ? 0 : p.from));
    uint64_t n = p.bytes / sizeof(T), step = (uint64_t)BLOCKS_A_PIECE * THREADS;
    for (uint64_t i = (uint64_t)blockIdx.y * THREADS + threadIdx.x; i < n; i += step)
        dst[i] = p.from == QV_K_ZEROS ? zero : src[i];
}

__global__ void scatter_kernel(const qv_k_piece *pieces, const char *sent)
{
    qv_k_piece p = pieces[blockIdx.x];
    uint64_t odd = (uint64_t)(uintptr_t)p.dst | p.bytes;
    if (odd % 16 == 0)
        move_units<uint4>(p, sent, make_uint4(0, 0, 0, 0));
    else if (odd % 4 == 0)
        move_units<uint32_t>(p, sent, 0);
    else
        move_units<uint8_t>(p, sent, 0);
}

} // namespace

qv_status qv_k_scatter(const qv_k_piece *pieces, int32_t n, const void *sent, void *stream)
{
    scatter_kernel<<<dim3((unsigned)n, BLOCKS_A_PIECE), THREADS, 0, (cudaStream_t)stream>>>(
        pieces, (const char *)sent);
    return qv_k_check_launch("scatter");
}
