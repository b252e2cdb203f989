#include "worker/adapter_stamp.h"

#include <dirent.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

/* Time stamps of files are coarse: 4 ms on local file systems, up to 2 s on others. A file that was
 * written just now may be written once more without a trace. */
#define SETTLED_S 3

#define MAX_FILES 256

typedef struct {
    uint64_t dev, ino, size, mtime_ns, ctime_ns;
} file_facts;

static uint64_t nanoseconds(struct timespec time)
{
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Add one file to the stamp; sums, since the order of a folder's entries means nothing. Opening it
 * makes network file systems ask their server instead of a cache. */
static void add_file(int dir_fd, const char *name, qv_adapter_stamp *stamp, time_t *newest)
{
    struct stat info;
    int fd = openat(dir_fd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return;
    if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode)) {
        file_facts facts = {
            .dev = info.st_dev,
            .ino = info.st_ino,
            .size = (uint64_t)info.st_size,
            .mtime_ns = nanoseconds(info.st_mtim),
            .ctime_ns = nanoseconds(info.st_ctim),
        };
        XXH128_hash_t of_name = XXH3_128bits(name, strlen(name));
        XXH128_hash_t hash = XXH3_128bits_withSeed(&facts, sizeof facts, of_name.low64);
        stamp->hash[0] += hash.low64;
        stamp->hash[1] += hash.high64;
        time_t changed =
            info.st_ctim.tv_sec > info.st_mtim.tv_sec ? info.st_ctim.tv_sec : info.st_mtim.tv_sec;
        *newest = changed > *newest ? changed : *newest;
    }
    close(fd);
}

qv_adapter_stamp qv_adapter_stamp_of(const char *dir)
{
    qv_adapter_stamp stamp = {0};
    time_t newest = 0, now = time(NULL);
    DIR *entries = opendir(dir);
    if (entries == NULL)
        return stamp;
    int n = 0;
    for (struct dirent *entry; n <= MAX_FILES && (entry = readdir(entries)) != NULL; n++)
        add_file(dirfd(entries), entry->d_name, &stamp, &newest);
    stamp.settled = n > 0 && n <= MAX_FILES && newest + SETTLED_S <= now;
    closedir(entries);
    return stamp;
}

bool qv_adapter_stamp_equal(const qv_adapter_stamp *a, const qv_adapter_stamp *b)
{
    return a->hash[0] == b->hash[0] && a->hash[1] == b->hash[1];
}
