#include "ops/cuda/nccl.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static qv_nccl functions;
static char load_error[512];
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Names as they stand in the library, with the place of each pointer. */
static const struct {
    const char *name;
    size_t offset;
} symbols[] = {
    {"ncclGetErrorString", offsetof(qv_nccl, error_string)},
    {"ncclGetVersion", offsetof(qv_nccl, get_version)},
    {"ncclGetUniqueId", offsetof(qv_nccl, get_unique_id)},
    {"ncclCommInitRank", offsetof(qv_nccl, comm_init_rank)},
    {"ncclCommDestroy", offsetof(qv_nccl, comm_destroy)},
    {"ncclCommAbort", offsetof(qv_nccl, comm_abort)},
    {"ncclAllReduce", offsetof(qv_nccl, all_reduce)},
    {"ncclSend", offsetof(qv_nccl, send)},
    {"ncclRecv", offsetof(qv_nccl, recv)},
    {"ncclGroupStart", offsetof(qv_nccl, group_start)},
    {"ncclGroupEnd", offsetof(qv_nccl, group_end)},
};

static void load(void)
{
    void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        snprintf(load_error, sizeof load_error, "%s", dlerror());
        return;
    }
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *symbol = dlsym(library, symbols[i].name);
        if (symbol == NULL) {
            snprintf(load_error, sizeof load_error, "it has no %s", symbols[i].name);
            return;
        }
        memcpy((char *)&functions + symbols[i].offset, &symbol, sizeof symbol);
    }
}

qv_status qv_nccl_load(const qv_nccl **out)
{
    pthread_once(&once, load);
    if (load_error[0] != '\0')
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "cuda: ranks on several devices need NCCL (libnccl.so.2), which could not "
                       "be loaded: %s",
                       load_error);
    *out = &functions;
    return QV_OK;
}

qv_status qv_nccl_check(const qv_nccl *nccl, int result, const char *what)
{
    if (result == 0)
        return QV_OK;
    return qv_fail(QV_ERR_DEVICE, "cuda: NCCL: %s: %s", what, nccl->error_string(result));
}
