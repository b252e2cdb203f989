#include "bench/engine_bench.h"

#include <string.h>

enum { MAX_ROWS = 128 };

qv_status bench_parse(const qv_option *rows, size_t n, const qv_program *program, int argc,
                      char **argv, void *settings, qv_options **options)
{
    static qv_option table[MAX_ROWS]; /* lives as long as the options */
    QV_ASSERT(n <= MAX_ROWS);
    for (size_t i = 0; i < n; i++) {
        table[i] = rows[i];
        if (strcmp(table[i].name, "model") == 0) {
            table[i].required = false;
            table[i].default_text = "demo/tiny-qwen3.5";
        }
    }
    return qv_options_parse(table, n, program, argc, argv, settings, options);
}
