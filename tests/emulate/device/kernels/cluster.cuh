/* kernels/cluster.cuh for the CPU: found in its place, with the same functions. */
#ifndef QV_KERNELS_CLUSTER_CUH
#define QV_KERNELS_CLUSTER_CUH

#include "kernels/ptx.cuh"

inline void cluster_arrive()
{
    if (emu::code() >= 90)
        emu::cluster_arrive();
}

inline void cluster_wait()
{
    if (emu::code() >= 90)
        emu::cluster_wait();
    else
        emu::barrier(0, 0);
}

template <typename T> inline void store_there(int rank, T *p, T x)
{
    *(emu::code() >= 90 ? (T *)emu::shared_of(rank, p) : p) = x;
}

inline void store_at(int rank, bf16 *p, bf16 x)
{
    store_there(rank, p, x);
}

inline void store_at(int rank, float *p, float x)
{
    store_there(rank, p, x);
}

inline void store_at(int rank, float *p, float4 x)
{
    store_there(rank, (float4 *)p, x);
}

#endif
