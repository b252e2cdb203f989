/* What the benchmarks of the engine share. */
#ifndef QV_BENCH_ENGINE_BENCH_H
#define QV_BENCH_ENGINE_BENCH_H

#include "common/options.h"

/* qv_options_parse of rows that have the engine's (QV_ENGINE_OPTIONS), with a default for the
 * model, so that the program runs without arguments. */
qv_status bench_parse(const qv_option *rows, size_t n, const qv_program *program, int argc,
                      char **argv, void *settings, qv_options **options);

#endif
