/* The stamp of an adapter's folder: what the file system says about its files, so that a folder
 * that was read before and has not changed need not be read again, and one that changes while it is
 * read is noticed. Any thread; blocks on the disk.
 */
#ifndef QV_WORKER_ADAPTER_STAMP_H
#define QV_WORKER_ADAPTER_STAMP_H

#include "common/status.h"

#include <stdint.h>

typedef struct {
    uint64_t hash[2]; /* over each regular file's name, device, inode, size and times */
    bool settled;     /* the last change is so long ago that a later one changes the stamp too */
} qv_adapter_stamp;

/* A folder that cannot be looked at, or has very many files, gives a stamp that is not settled. */
qv_adapter_stamp qv_adapter_stamp_of(const char *dir);

/* The same files, as far as one can tell; true of an unsettled stamp says only that no change was
 * seen. */
bool qv_adapter_stamp_equal(const qv_adapter_stamp *a, const qv_adapter_stamp *b);

#endif
