/* What the tests share: seeded numbers, error metrics, temporary folders, paths, ports, waiting,
 * and files that may be absent. A test runs in a process of its own, so there is no state to undo;
 * temporary folders go away when that process exits.
 *
 * Helpers assert with abort() and a message when their own work fails (no disk, say); what they
 * report about the code under test is returned, so that the test itself asserts.
 */
#ifndef QV_TESTS_SUPPORT_H
#define QV_TESTS_SUPPORT_H

#include "common/clock.h"
#include "common/dtype.h"
#include "common/status.h"

#include <stdint.h>

/* --- random numbers: the same on every machine ----------------------------------------------- */

typedef struct {
    uint64_t state;
} qv_rng;

/* Any seed is good, 0 too. */
qv_rng qv_rng_seed(uint64_t seed);
uint64_t qv_rng_u64(qv_rng *rng);
int64_t qv_rng_range(qv_rng *rng, int64_t low, int64_t high); /* low <= result < high */
double qv_rng_uniform(qv_rng *rng);                           /* [0, 1) */
double qv_rng_normal(qv_rng *rng);                            /* mean 0, deviation 1 */

/* Fill x[n]: uniform in [low, high), or normal times `scale`. */
void qv_fill_uniform(qv_rng *rng, float *x, int64_t n, float low, float high);
void qv_fill_normal(qv_rng *rng, float *x, int64_t n, float scale);

/* Fill n elements of a float dtype with normal numbers times `scale`, rounded to the dtype. */
void qv_fill_dtype(qv_rng *rng, qv_dtype dtype, void *x, int64_t n, float scale);

/* --- error metrics --------------------------------------------------------------------------- */

typedef struct {
    double max_abs;       /* largest |got - want| */
    double max_norm;      /* max_abs over the root mean square of want (1 if that is 0) */
    double rms_norm;      /* root mean square of got - want over that of want */
    int64_t worst;        /* index of the largest difference; -1 when n is 0 */
    int64_t n_not_finite; /* elements where exactly one is NaN, or infinities differ */
} qv_error_stats;

qv_error_stats qv_compare_f32(const float *got, const float *want, int64_t n);
qv_error_stats qv_compare_f64(const float *got, const double *want, int64_t n);

/* True when every element is finite where it should be and max_norm <= tolerance. Otherwise prints
 * one line to stderr: `what`, the errors, and index, got and want of the worst element. */
bool qv_close_f32(const char *what, const float *got, const float *want, int64_t n,
                  double tolerance);
bool qv_close_f64(const char *what, const float *got, const double *want, int64_t n,
                  double tolerance);

/* --- files ----------------------------------------------------------------------------------- */

/* A fresh folder, removed with all it holds when the process exits. Never freed by the caller. */
const char *qv_temp_dir(void);

/* Path "<dir>/<printf>". From a ring of 64 static buffers: copy what must live long. */
const char *qv_path(const char *dir, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Write or read a whole file; qv_read_file adds a 0 after the last byte and the caller frees it. */
void qv_write_file(const char *path, const void *data, size_t size);
void qv_write_text(const char *path, const char *text);
char *qv_read_file(const char *path, size_t *size);

/* Folders of the source (QV_SOURCE_DIR) and the build (QV_BUILD_DIR). */
const char *qv_source_dir(void);
const char *qv_build_dir(void);

/* A path inside the golden data (QV_GOLDEN_DIR, else ../shared/golden next to the source), or
 * inside the bundled demo. NULL, with a line on stderr, when it is not there; the test then skips.
 * Static buffers as qv_path. */
const char *qv_golden_path(const char *relative);
const char *qv_demo_path(const char *relative);

/* In a test: leave it as skipped when `path` is NULL. Needs criterion.h. */
#define QV_SKIP_WITHOUT(path)                                                                      \
    do {                                                                                           \
        if ((path) == NULL)                                                                        \
            cr_skip_test("data not present: %s", #path);                                           \
    } while (0)

/* --- time and network ------------------------------------------------------------------------ */

/* Call `done` until it is true; false after `deadline_ms`. Sleeps a little between calls, so it is
 * for events that cannot be awaited otherwise. */
bool qv_wait_until(bool (*done)(void *user), void *user, int64_t deadline_ms);

/* A TCP port on 127.0.0.1 that was free a moment ago, and that no outgoing connection is given. */
uint16_t qv_free_port(void);

/* "ipc://<temp dir>/<name>" and "tcp://127.0.0.1:<free port>". Static buffers as qv_path. */
const char *qv_ipc_endpoint(const char *name);
const char *qv_tcp_endpoint(void);

/* Send `request` to 127.0.0.1:port and nothing more; the socket that waits for an answer, or -1. */
int qv_http_send(uint16_t port, const char *request);

/* The same, and return all bytes of the answer (the caller frees) or NULL. */
char *qv_http_exchange(uint16_t port, const char *request);

/* The answer to GET of a path, NULL if nobody answers. The caller frees. */
char *qv_http_get(uint16_t port, const char *path);

#endif
