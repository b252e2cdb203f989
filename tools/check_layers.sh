#!/usr/bin/env bash
# Include directions of the layers:
#
#     common <- kernels <- ops <- models <- worker      common <- broker      common <- clients
#
#     tools/check_layers.sh [ROOT]        check the tree at ROOT (default: this one)
#     tools/check_layers.sh --self-test   plant violations in a scratch tree and expect each to be found
#
# tests, bench and tools may include anything; nothing includes them. kernels includes only
# common/status.h and common/dtype.h, so that a kernel can be lifted out and timed alone. Quoted
# includes name the full path from the root. Prints file:line: reason; exit 1 if there is any.
set -euo pipefail

check() {
    local root=$1 layer failed=0
    for layer in common kernels ops models worker broker clients; do
        [ -d "$root/$layer" ] || continue
        (cd "$root" && find "$layer" -type f \
            \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.def' \) -print0 |
            LC_ALL=C sort -z |
            xargs -0 -r awk -v layer="$layer" '
            BEGIN {
                allowed["common"]  = "common"
                allowed["kernels"] = "kernels"
                allowed["ops"]     = "common kernels ops"
                allowed["models"]  = "common kernels ops models"
                allowed["worker"]  = "common kernels ops models worker"
                allowed["broker"]  = "common broker"
                allowed["clients"] = "common clients"
                n = split("common kernels ops models worker broker clients tests bench tools", all)
                for (i = 1; i <= n; i++) is_folder[all[i]] = 1
                n = split(allowed[layer], list)
                for (i = 1; i <= n; i++) may[list[i]] = 1
                if (layer == "kernels") {
                    may_file["common/status.h"] = 1
                    may_file["common/dtype.h"] = 1
                }
            }
            function report(reason) {
                printf "%s:%d: %s\n", FILENAME, FNR, reason
                bad = 1
            }
            /^[ \t]*#[ \t]*include[ \t]*["<]/ {
                match($0, /["<][^">]*[">]/)
                quoted = substr($0, RSTART, 1) == "\""
                path = substr($0, RSTART + 1, RLENGTH - 2)
                folder = path
                sub(/\/.*/, "", folder)
                if (path in may_file || (folder in may && path ~ /\//)) {
                    if (path ~ /(^|\/)\.\.?\//) report("\"" path "\" is not a path from the root")
                } else if (path ~ /\// && folder in is_folder) {
                    report(layer " may not include " path)
                } else if (quoted) {
                    report("\"" path "\" is not a path from the root")
                }
            }
            END { exit bad }') || failed=1
    done
    return "$failed"
}

# Each row: file, include line, ok or bad.
self_test() {
    local scratch file line want got failed=0
    scratch=$(mktemp -d)
    while IFS='|' read -r file line want; do
        rm -rf "${scratch:?}"/*
        mkdir -p "$scratch/$(dirname "$file")"
        printf '/* A file. */\n%s\n' "$line" >"$scratch/$file"
        got=ok
        "$0" "$scratch" >/dev/null || got=bad
        if [ "$got" != "$want" ]; then
            echo "self test: $file with '$line' is $got, expected $want"
            failed=1
        fi
    done <<'ROWS'
common/a.c|#include "common/a.h"|ok
common/a.c|#include <stdio.h>|ok
common/a.c|#include <sys/socket.h>|ok
common/a.c|#include "ops/tensor.h"|bad
common/a.c|#include <ops/tensor.h>|bad
common/a.c|#include "a.h"|bad
common/a.c|#include "../ops/tensor.h"|bad
common/a.c|#include "common/../ops/tensor.h"|bad
common/a.c|#  include "tests/support.h"|bad
kernels/norm.cu|#include "common/dtype.h"|ok
kernels/norm.cu|#include "common/status.h"|ok
kernels/norm.cu|#include "kernels/device.cuh"|ok
kernels/norm.cu|#include "common/log.h"|bad
kernels/device.cuh|#include "ops/tensor.h"|bad
ops/cpu/norm.c|#include "ops/ops.h"|ok
ops/cuda/launch.c|#include "kernels/kernels.h"|ok
ops/ops.h|#include "models/model.h"|bad
models/qwen3_5.c|#include "ops/ops.h"|ok
models/model.h|#include "worker/engine.h"|bad
worker/engine.c|#include "models/model.h"|ok
worker/engine.c|#include "broker/pool.h"|bad
broker/broker.c|#include "common/mq.h"|ok
broker/broker.c|#include "ops/tensor.h"|bad
broker/broker.c|#include "clients/quiver_client.h"|bad
clients/quiver_cli.c|#include "common/options.h"|ok
clients/quiver_cli.c|#include "worker/worker.h"|bad
tools/quiver_run.c|#include "worker/engine.h"|ok
tests/ops/test_norm.c|#include "tests/support.h"|ok
bench/bench_ops.c|#include "ops/ops.h"|ok
ROWS
    rm -rf "$scratch"
    return "$failed"
}

if [ "${1-}" = --self-test ]; then
    self_test
else
    check "${1-$(dirname "$0")/..}"
fi
