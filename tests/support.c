#include "tests/support.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ftw.h>
#include <inttypes.h>
#include <math.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FIRST_PORT = 10240 }; /* of those that tests listen on */

/* A helper that cannot do its work ends the test. */
#define DIE(...)                                                                                   \
    do {                                                                                           \
        fprintf(stderr, "test support: " __VA_ARGS__);                                             \
        fprintf(stderr, " (%s)\n", strerror(errno));                                               \
        abort();                                                                                   \
    } while (0)

/* --- random numbers: SplitMix64 --------------------------------------------------------------- */

qv_rng qv_rng_seed(uint64_t seed)
{
    return (qv_rng){seed};
}

uint64_t qv_rng_u64(qv_rng *rng)
{
    uint64_t z = rng->state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

int64_t qv_rng_range(qv_rng *rng, int64_t low, int64_t high)
{
    return low + (int64_t)(qv_rng_u64(rng) % ((uint64_t)high - (uint64_t)low));
}

double qv_rng_uniform(qv_rng *rng)
{
    return (double)(qv_rng_u64(rng) >> 11) * 0x1p-53;
}

double qv_rng_normal(qv_rng *rng)
{
    double radius = sqrt(-2 * log(1 - qv_rng_uniform(rng))); /* Box-Muller; 1 - u is never 0 */
    return radius * cos(2 * M_PI * qv_rng_uniform(rng));
}

void qv_fill_uniform(qv_rng *rng, float *x, int64_t n, float low, float high)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)(low + (high - low) * qv_rng_uniform(rng));
}

void qv_fill_normal(qv_rng *rng, float *x, int64_t n, float scale)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)(scale * qv_rng_normal(rng));
}

void qv_fill_dtype(qv_rng *rng, qv_dtype dtype, void *x, int64_t n, float scale)
{
    for (int64_t i = 0; i < n; i++) {
        float value = (float)(scale * qv_rng_normal(rng));
        if (qv_dtype_from_f32(dtype, &value, (char *)x + (size_t)i * qv_dtype_size(dtype), 1) !=
            QV_OK)
            DIE("%s", qv_error());
    }
}

/* --- error metrics ---------------------------------------------------------------------------- */

/* `want` has `want_bytes` per element: 4 for float, 8 for double. */
static double want_at(const void *want, size_t want_bytes, int64_t i)
{
    return want_bytes == sizeof(float) ? (double)((const float *)want)[i]
                                       : ((const double *)want)[i];
}

static qv_error_stats compare(const float *got, const void *want, size_t want_bytes, int64_t n)
{
    qv_error_stats stats = {.worst = -1};
    double sum_diff = 0, sum_want = 0;
    for (int64_t i = 0; i < n; i++) {
        double g = got[i], w = want_at(want, want_bytes, i);
        if (!isfinite(g) || !isfinite(w)) {
            bool same = (isnan(g) && isnan(w)) || g == w;
            if (!same && stats.n_not_finite++ == 0)
                stats.worst = i;
            continue;
        }
        double diff = fabs(g - w);
        sum_diff += diff * diff;
        sum_want += w * w;
        if (stats.n_not_finite == 0 && (stats.worst < 0 || diff > stats.max_abs))
            stats.worst = i;
        stats.max_abs = fmax(stats.max_abs, diff);
    }
    double rms_want = n > 0 ? sqrt(sum_want / (double)n) : 0;
    double unit = rms_want > 0 ? rms_want : 1;
    stats.max_norm = stats.max_abs / unit;
    stats.rms_norm = n > 0 ? sqrt(sum_diff / (double)n) / unit : 0;
    return stats;
}

static bool is_close(const char *what, const float *got, const void *want, size_t want_bytes,
                     int64_t n, double tolerance)
{
    qv_error_stats stats = compare(got, want, want_bytes, n);
    if (stats.n_not_finite == 0 && stats.max_norm <= tolerance)
        return true;
    fprintf(stderr,
            "%s: max_norm %.3g > %.3g (max_abs %.3g, rms_norm %.3g, %" PRId64
            " not finite) at %" PRId64 " of %" PRId64 ": got %.9g, want %.9g\n",
            what, stats.max_norm, tolerance, stats.max_abs, stats.rms_norm, stats.n_not_finite,
            stats.worst, n, (double)got[stats.worst], want_at(want, want_bytes, stats.worst));
    return false;
}

qv_error_stats qv_compare_f32(const float *got, const float *want, int64_t n)
{
    return compare(got, want, sizeof *want, n);
}

qv_error_stats qv_compare_f64(const float *got, const double *want, int64_t n)
{
    return compare(got, want, sizeof *want, n);
}

bool qv_close_f32(const char *what, const float *got, const float *want, int64_t n,
                  double tolerance)
{
    return is_close(what, got, want, sizeof *want, n, tolerance);
}

bool qv_close_f64(const char *what, const float *got, const double *want, int64_t n,
                  double tolerance)
{
    return is_close(what, got, want, sizeof *want, n, tolerance);
}

/* --- files ------------------------------------------------------------------------------------ */

#define N_PATHS    64
#define PATH_BYTES 1024
#define N_DIRS     64

static char temp_dirs[N_DIRS][64];
static size_t n_temp_dirs;
static pid_t temp_dirs_owner; /* a forked child must not remove its parent's folders */

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *walk)
{
    (void)info;
    (void)type;
    (void)walk;
    remove(path);
    return 0;
}

static void remove_temp_dirs(void)
{
    for (size_t i = 0; i < n_temp_dirs && getpid() == temp_dirs_owner; i++)
        nftw(temp_dirs[i], remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

const char *qv_temp_dir(void)
{
    if (temp_dirs_owner != getpid()) {
        temp_dirs_owner = getpid();
        n_temp_dirs = 0;
        atexit(remove_temp_dirs);
    }
    if (n_temp_dirs == N_DIRS)
        DIE("more than %d temporary folders", N_DIRS);
    char *dir = temp_dirs[n_temp_dirs];
    strcpy(dir, "/tmp/quiver-test-XXXXXX"); /* short: socket paths have 108 bytes */
    if (mkdtemp(dir) == NULL)
        DIE("cannot make %s", dir);
    n_temp_dirs++;
    return dir;
}

static char *path_buffer(void)
{
    static char buffers[N_PATHS][PATH_BYTES];
    static _Atomic unsigned next;
    return buffers[next++ % N_PATHS];
}

const char *qv_path(const char *dir, const char *format, ...)
{
    char *path = path_buffer();
    int used = snprintf(path, PATH_BYTES, "%s/", dir);
    va_list args;
    va_start(args, format);
    if (used < PATH_BYTES)
        used += vsnprintf(path + used, (size_t)(PATH_BYTES - used), format, args);
    va_end(args);
    if (used >= PATH_BYTES)
        DIE("path too long: %s", path);
    return path;
}

void qv_write_file(const char *path, const void *data, size_t size)
{
    FILE *file = fopen(path, "wbe");
    if (file == NULL || fwrite(data, 1, size, file) != size || fclose(file) != 0)
        DIE("cannot write %s", path);
}

void qv_write_text(const char *path, const char *text)
{
    qv_write_file(path, text, strlen(text));
}

char *qv_read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rbe");
    struct stat info;
    if (file == NULL || fstat(fileno(file), &info) != 0)
        DIE("cannot read %s", path);
    size_t bytes = (size_t)info.st_size;
    char *data = malloc(bytes + 1);
    if (data == NULL || fread(data, 1, bytes, file) != bytes)
        DIE("cannot read %s", path);
    fclose(file);
    data[bytes] = '\0';
    if (size != NULL)
        *size = bytes;
    return data;
}

static const char *env_dir(const char *variable)
{
    const char *dir = getenv(variable);
    if (dir == NULL)
        DIE("%s is not set; run the test through ctest", variable);
    return dir;
}

const char *qv_source_dir(void)
{
    return env_dir("QV_SOURCE_DIR");
}

const char *qv_build_dir(void)
{
    return env_dir("QV_BUILD_DIR");
}

static const char *existing(const char *path)
{
    if (access(path, R_OK) == 0)
        return path;
    fprintf(stderr, "not present: %s\n", path);
    return NULL;
}

const char *qv_golden_path(const char *relative)
{
    const char *golden = getenv("QV_GOLDEN_DIR");
    return existing(golden != NULL ? qv_path(golden, "%s", relative)
                                   : qv_path(qv_source_dir(), "../shared/golden/%s", relative));
}

const char *qv_demo_path(const char *relative)
{
    return existing(qv_path(qv_source_dir(), "demo/%s", relative));
}

/* --- time and network ------------------------------------------------------------------------- */

bool qv_wait_until(bool (*done)(void *user), void *user, int64_t deadline_ms)
{
    uint64_t start = qv_now_ms();
    while (!done(user)) {
        if (qv_now_ms() - start >= (uint64_t)deadline_ms)
            return false;
        usleep(1000);
    }
    return true;
}

/* Where the kernel begins with the ports that it gives to outgoing connections. */
static int outgoing_ports_begin(void)
{
    int begin = 0;
    FILE *file = fopen("/proc/sys/net/ipv4/ip_local_port_range", "re");
    if (file != NULL) {
        if (fscanf(file, "%d", &begin) != 1)
            begin = 0;
        fclose(file);
    }
    return begin > FIRST_PORT && begin < 65536 ? begin : 32768;
}

uint16_t qv_free_port(void)
{
    static qv_rng rng;
    if (rng.state == 0)
        rng = qv_rng_seed(qv_now_ms() * 1000003 + (uint64_t)getpid());
    int begin = outgoing_ports_begin();
    for (int attempt = 0; attempt < 1000; attempt++) {
        uint16_t port = (uint16_t)qv_rng_range(&rng, FIRST_PORT, begin - 1);
        struct sockaddr_in address = {.sin_family = AF_INET,
                                      .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                      .sin_port = htons(port)};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        bool is_free = fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0;
        if (fd >= 0)
            close(fd);
        if (is_free)
            return port;
    }
    DIE("no free port");
}

const char *qv_ipc_endpoint(const char *name)
{
    char *endpoint = path_buffer();
    snprintf(endpoint, PATH_BYTES, "ipc://%s/%s", qv_temp_dir(), name);
    return endpoint;
}

const char *qv_tcp_endpoint(void)
{
    char *endpoint = path_buffer();
    snprintf(endpoint, PATH_BYTES, "tcp://127.0.0.1:%u", qv_free_port());
    return endpoint;
}

int qv_http_send(uint16_t port, const char *request)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval timeout = {.tv_sec = 10};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        DIE("no socket");
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    size_t size = strlen(request);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        send(fd, request, size, MSG_NOSIGNAL) != (ssize_t)size) {
        close(fd);
        return -1;
    }
    shutdown(fd, SHUT_WR);
    return fd;
}

char *qv_http_exchange(uint16_t port, const char *request)
{
    int fd = qv_http_send(port, request);
    if (fd < 0)
        return NULL;
    size_t used = 0, room = 1 << 20;
    char *answer = malloc(room + 1);
    for (ssize_t n = 1; answer != NULL && n > 0 && used < room;) {
        n = recv(fd, answer + used, room - used, 0);
        used += n > 0 ? (size_t)n : 0;
    }
    if (answer != NULL)
        answer[used] = '\0';
    close(fd);
    return answer;
}

char *qv_http_get(uint16_t port, const char *path)
{
    char request[256];
    snprintf(request, sizeof request,
             "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", path);
    return qv_http_exchange(port, request);
}
