/* NCCL, found when it is first needed: a worker on one device runs without it, and the build needs
 * none of its files. Only what ranks of one process use is declared here, as NCCL 2.x has it. */
#ifndef QV_OPS_CUDA_NCCL_H
#define QV_OPS_CUDA_NCCL_H

#include "common/status.h"

#include <cuda_runtime_api.h>
#include <stddef.h>

typedef struct qv_nccl_comm qv_nccl_comm; /* NCCL's own */

typedef struct {
    char bytes[128];
} qv_nccl_id;

enum { QV_NCCL_FLOAT32 = 7 }; /* ncclDataType_t */
enum { QV_NCCL_SUM = 0 };     /* ncclRedOp_t */

/* Results are ncclResult_t: 0 is success. */
typedef struct {
    const char *(*error_string)(int result);
    int (*get_version)(int *version);
    int (*get_unique_id)(qv_nccl_id *id);
    int (*comm_init_rank)(qv_nccl_comm **comm, int n_ranks, qv_nccl_id id, int rank);
    int (*comm_destroy)(qv_nccl_comm *comm);
    int (*comm_abort)(qv_nccl_comm *comm);
    int (*all_reduce)(const void *send, void *recv, size_t count, int type, int op,
                      qv_nccl_comm *comm, cudaStream_t stream);
    int (*send)(const void *data, size_t count, int type, int peer, qv_nccl_comm *comm,
                cudaStream_t stream);
    int (*recv)(void *data, size_t count, int type, int peer, qv_nccl_comm *comm,
                cudaStream_t stream);
    int (*group_start)(void);
    int (*group_end)(void);
} qv_nccl;

/* The library's functions, loaded once; any thread. Errors: UNSUPPORTED (no libnccl.so.2, or one
 * that lacks a function; says what the loader says). */
qv_status qv_nccl_load(const qv_nccl **out);

/* QV_OK for result 0, else DEVICE with `what` and NCCL's words. */
qv_status qv_nccl_check(const qv_nccl *nccl, int result, const char *what);

#endif
