#!/usr/bin/env bash
# Builds and runs every benchmark and prints their tables.
#
#   bench/run.sh [--quick]     --quick takes a minute instead of several
set -euo pipefail
cd "$(dirname "$0")/.."
quick=()
case ${1-} in
--quick) quick=(--quick) ;;
'') ;;
*) echo "bench/run.sh: unknown option '$1' (only --quick)" >&2; exit 2 ;;
esac
tools/install_deps.sh
build=${BUILD_DIR:-build}
cmake -G Ninja -S . -B "$build" -DQV_BENCH=ON >/dev/null
cmake --build "$build" --target bench_ops bench_engine bench_prefix bench_adapters bench_broker simulate
printf 'machine: %s, %s cores, %s\ncommit: %s\n' "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" "$(nproc)" \
    "$(. /etc/os-release && echo "$PRETTY_NAME")" "$(git describe --always --dirty 2>/dev/null || echo unknown)"
for name in bench_ops bench_engine bench_prefix bench_adapters bench_broker; do
    printf '\n== %s\n' "$name"
    "$build/bin/$name" ${quick[@]+"${quick[@]}"}
done
printf '\n== simulate\n'
"$build/bin/simulate" --requests "$([ ${#quick[@]} -gt 0 ] && echo 20000 || echo 200000)"
