#include "worker/model_digest.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

#define HEAD_BYTES (1 << 20)

static bool has_suffix(const char *name, const char *suffix)
{
    size_t n = strlen(name), m = strlen(suffix);
    return n >= m && strcmp(name + n - m, suffix) == 0;
}

static int is_of_model(const struct dirent *entry)
{
    return has_suffix(entry->d_name, ".safetensors") || has_suffix(entry->d_name, ".json") ||
           has_suffix(entry->d_name, ".jinja");
}

/* Add a file: its name, its size, and all of it or its head. */
static qv_status add_file(XXH3_state_t *state, const char *dir, const char *name, char *buffer)
{
    char path[4352];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "rb");
    struct stat st;
    if (file == NULL || fstat(fileno(file), &st) != 0) {
        if (file != NULL)
            fclose(file);
        return qv_fail(QV_ERR_IO, "%s: %s", path, strerror(errno));
    }
    uint64_t size = (uint64_t)st.st_size;
    XXH3_128bits_update(state, name, strlen(name) + 1);
    XXH3_128bits_update(state, &size, sizeof size);
    bool whole = !has_suffix(name, ".safetensors");
    size_t n;
    while ((n = fread(buffer, 1, HEAD_BYTES, file)) > 0) {
        XXH3_128bits_update(state, buffer, n);
        if (!whole)
            break;
    }
    qv_status status = ferror(file) ? qv_fail(QV_ERR_IO, "%s: %s", path, strerror(errno)) : QV_OK;
    fclose(file);
    return status;
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name); /* alphasort depends on the locale */
}

qv_status qv_model_digest(const char *model_dir, char digest[QV_MODEL_DIGEST_SIZE])
{
    struct dirent **names;
    int n = scandir(model_dir, &names, is_of_model, by_name);
    if (n < 0)
        return qv_fail(QV_ERR_NOT_FOUND, "%s: %s", model_dir, strerror(errno));
    XXH3_state_t *state = XXH3_createState();
    char *buffer = malloc(HEAD_BYTES);
    qv_status status = QV_OK;
    if (state == NULL || buffer == NULL)
        status = qv_fail(QV_ERR_NOMEM, "%s: no memory to read it", model_dir);
    else if (n == 0)
        status = qv_fail(QV_ERR_NOT_FOUND, "%s: nothing of a model in it", model_dir);
    else
        XXH3_128bits_reset(state);
    for (int i = 0; i < n; i++) {
        if (status == QV_OK)
            status = add_file(state, model_dir, names[i]->d_name, buffer);
        free(names[i]);
    }
    free(names);
    if (status == QV_OK) {
        XXH128_hash_t hash = XXH3_128bits_digest(state);
        snprintf(digest, QV_MODEL_DIGEST_SIZE, "%016" PRIx64 "%016" PRIx64, hash.high64,
                 hash.low64);
    }
    XXH3_freeState(state);
    free(buffer);
    return status;
}
