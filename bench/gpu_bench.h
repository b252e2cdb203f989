/* What the benchmarks of the GPU share, below the ops layer: memory with made-up numbers, the time
 * of a call in a graph, the rate of a copy, floors, and the names on the command line.
 *
 * One thread, the device that is current. Nothing here returns an error: the program ends with its
 * name and a sentence on stderr.
 */
#ifndef QV_BENCH_GPU_BENCH_H
#define QV_BENCH_GPU_BENCH_H

#include "common/dtype.h"
#include "common/status.h"

#include <cuda_runtime_api.h>
#include <stdint.h>

/* --- Errors ------------------------------------------------------------------------------- */

/* Go on if all is well. */
void bench_pass(qv_status status);
void bench_check(cudaError_t error, const char *what);

/* --- The command line --------------------------------------------------------------------- */

/* End the program if one of the n arguments is not in `known`, which ends with NULL. */
void bench_know(int n, char **arguments, const char *const *known);

/* Whether `name` is among the n arguments, or there are none. */
bool bench_wanted(int n, char **arguments, const char *name);

/* --- Device memory: freed with bench_free, complete on return ------------------------------ */

void *bench_alloc(size_t bytes); /* zeros */
void *bench_sent(const void *host, size_t bytes);

/* n numbers of `dtype`, BF16 or F32, in (-scale, scale), others at each call; of I32, zeros. */
void *bench_made_up(qv_dtype dtype, int64_t n, float scale);

void bench_free(void *block);

/* --- Time --------------------------------------------------------------------------------- */

/* Enqueue one call. `round` counts from 0, to go round over copies of what it reads. */
typedef void bench_call(void *ctx, int round);

/* Median seconds of a call over replays of a graph of `rounds` of them on `stream`, so that neither
 * launches nor the host are in it. All rounds run once outside of the graph before. */
double bench_time(cudaStream_t stream, bench_call *call, void *ctx, int rounds);

/* Of an even number, the upper one of the two in the middle. Sorts. */
double bench_median(double *values, int n);

/* How many copies of `bytes` to go round over, for the L2 cache to hold none when its turn comes:
 * between 1 and `most`. */
int bench_copies(double bytes, int most);

/* --- Floors ------------------------------------------------------------------------------- */

typedef struct {
    double copy; /* bytes a second, read and written */
    double gemm; /* FLOP a second */
} bench_rates;

/* The seconds that bytes or FLOP take, whichever is more. */
double bench_floor(const bench_rates *rates, double bytes, double flop);

/* Bytes a second, read and written, of 1 GiB copied by our own kernel, which is faster than the
 * driver's. */
double bench_copy_rate(cudaStream_t stream);

#endif
