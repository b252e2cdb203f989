#!/usr/bin/env bash
# Builds and runs benchmarks and prints their tables.
#
#   bench/run.sh [--quick]          all of them; --quick takes some minutes less
#   bench/run.sh broker [--quick]   the broker's: bench_broker, faults with real processes, and a million
#                                   simulated requests with faults
set -euo pipefail
cd "$(dirname "$0")/.."
part=all
quick=()
for argument in "$@"; do
    case $argument in
    broker) part=broker ;;
    --quick) quick=(--quick) ;;
    *) echo "bench/run.sh: unknown argument '$argument' (only broker and --quick)" >&2; exit 2 ;;
    esac
done
is_quick() { [ ${#quick[@]} -gt 0 ]; }
tools/install_deps.sh
build=${BUILD_DIR:-build}
if [ $part = broker ]; then
    programs=(bench_broker)
    more=(quiver-broker quiver-worker quiver)
    simulated=$(is_quick && echo 100000 || echo 1000000)
    policy=score
else
    programs=(bench_ops bench_engine bench_prefix bench_adapters bench_broker)
    more=()
    simulated=$(is_quick && echo 20000 || echo 200000)
    policy=all
fi
cmake -G Ninja -S . -B "$build" -DQV_BENCH=ON $([ $part = broker ] && echo -DQV_TESTS=ON) >/dev/null
cmake --build "$build" --target "${programs[@]}" simulate ${more[@]+"${more[@]}"}
printf 'machine: %s, %s cores, %s\ncommit: %s\nload: %s\n' \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" "$(nproc)" \
    "$(. /etc/os-release && echo "$PRETTY_NAME")" "$(git describe --always --dirty 2>/dev/null || echo unknown)" \
    "$(cut -d ' ' -f 1-3 /proc/loadavg)"
for name in "${programs[@]}"; do
    printf '\n== %s\n' "$name"
    "$build/bin/$name" ${quick[@]+"${quick[@]}"}
done
printf '\n== simulate\n'
"$build/bin/simulate" --requests "$simulated" --policy $policy
if [ $part = broker ]; then
    printf '\n== faults, with real processes\n'
    status=0
    ctest --test-dir "$build" -R '^system_(delivery|network|redis)$' -V > "$build/faults.txt" 2>&1 || status=$?
    grep -oE '[^.]*: ([0-9]+ acknowledged|confirmed).*|.*skipped:.*' "$build/faults.txt" || true
    [ $status -eq 0 ] || { tail -n 40 "$build/faults.txt"; exit $status; }
fi
