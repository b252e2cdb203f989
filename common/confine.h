/* Confine: whether a folder lies inside one of the roots that people allow, once every symbolic
 * link is resolved, and so do the files in it. Any thread; it reads the file system.
 */
#ifndef QV_COMMON_CONFINE_H
#define QV_COMMON_CONFINE_H

#include "common/status.h"

#include <stddef.h>

/* OK with n = 0 roots: everything is allowed. Errors: NOT_FOUND (no such folder), ARG (outside,
 * with the sentence), LIMIT (more than 4096 entries), IO. */
qv_status qv_confine(const char *path, const char *const *roots, size_t n);

#endif
