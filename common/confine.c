#include "common/confine.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_ENTRIES 4096

static bool is_below(const char *path, const char *root)
{
    size_t n = strlen(root);
    while (n > 1 && root[n - 1] == '/')
        n--;
    return strncmp(path, root, n) == 0 && (n == 1 || path[n] == '/' || path[n] == '\0');
}

static qv_status check(const char *given, const char *real, const char *const *roots, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char *root = realpath(roots[i], NULL);
        bool inside = root != NULL && is_below(real, root);
        free(root);
        if (inside)
            return QV_OK;
    }
    return qv_fail(QV_ERR_ARG, "%s is outside of the folders that adapters may come from", given);
}

static qv_status resolve(const char *path, char **out)
{
    *out = realpath(path, NULL);
    if (*out != NULL)
        return QV_OK;
    return qv_fail(errno == ENOENT || errno == ENOTDIR ? QV_ERR_NOT_FOUND : QV_ERR_IO, "%s: %s",
                   path, strerror(errno));
}

/* What a folder has in it: a link there may lead out as well. */
static qv_status check_entries(const char *folder, const char *const *roots, size_t n)
{
    DIR *dir = opendir(folder);
    if (dir == NULL)
        return qv_fail(QV_ERR_IO, "%s: %s", folder, strerror(errno));
    qv_status status = QV_OK;
    int count = 0;
    for (struct dirent *entry; status == QV_OK && (entry = readdir(dir)) != NULL;) {
        if (++count > MAX_ENTRIES)
            status = qv_fail(QV_ERR_LIMIT, "%s has more than %d entries", folder, MAX_ENTRIES);
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 ||
            (entry->d_type != DT_LNK && entry->d_type != DT_UNKNOWN) || status != QV_OK)
            continue;
        char path[PATH_MAX], *real = NULL;
        if (snprintf(path, sizeof path, "%s/%s", folder, entry->d_name) >= (int)sizeof path)
            status = qv_fail(QV_ERR_LIMIT, "a path in %s is too long", folder);
        if (status == QV_OK)
            status = resolve(path, &real);
        if (status == QV_OK)
            status = check(path, real, roots, n);
        free(real);
    }
    closedir(dir);
    return status;
}

qv_status qv_confine(const char *path, const char *const *roots, size_t n)
{
    char *real;
    if (n == 0)
        return QV_OK;
    QV_TRY(resolve(path, &real));
    qv_status status = check(path, real, roots, n);
    if (status == QV_OK)
        status = check_entries(real, roots, n);
    free(real);
    return status;
}
