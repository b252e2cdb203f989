#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test that this machine can run.
#
#   tools/test.sh              everything: build, tests, CUDA tests on an emulated device, address and undefined
#                              sanitizers, threads
#   tools/test.sh --quick      no sanitizers
#   BUILD_DIR=dir              where to build (default build/; the others beside it)
set -euo pipefail

quick=0
for arg in "$@"; do
    case $arg in
    --quick) quick=1 ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "test.sh: unknown option '$arg'; see --help" >&2; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."

started=$SECONDS
say() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }
build=${BUILD_DIR:-build}
passed=0 failed=0 skipped=0

# Run ctest in a build folder and add its counts to the totals.
run_ctest() {
    local dir=$1 junit counts
    shift
    junit=$PWD/$dir/junit.xml
    rm -f "$junit"
    ctest --test-dir "$dir" --output-on-failure --output-junit "$junit" "$@" || true
    [ -s "$junit" ] || { echo "ctest wrote no report in $dir" >&2; failed=$((failed + 1)); return; }
    counts=$(tr '\n' ' ' <"$junit" | sed -n 's/.*<testsuite[^>]*tests="\([0-9]*\)"[^>]*failures="\([0-9]*\)"[^>]*skipped="\([0-9]*\)".*/\1 \2 \3/p')
    read -r tests bad skip <<<"$counts"
    passed=$((passed + tests - bad - skip)) failed=$((failed + bad)) skipped=$((skipped + skip))
}

say "packages"
tools/install_deps.sh --tests --cuda

say "build in $build/"
cmake -G Ninja -S . -B "$build" -DQV_WERROR=ON -DQV_TESTS=ON -DQV_BENCH=ON -DQV_CUDA=AUTO >/dev/null
cmake --build "$build"

say "tests"
run_ctest "$build" --timeout 600

# Golden models take many minutes there, and ranks that wait for each other on the device do not end in time:
# by hand, with `ctest -R cuda` in that folder.
say "CUDA tests on an emulated device"
cmake -G Ninja -S . -B "$build-emulated" -DQV_WERROR=ON -DQV_BENCH=OFF -DQV_CUDA=EMULATED >/dev/null
cmake --build "$build-emulated" --target gpu_programs
run_ctest "$build-emulated" -L gpu -E "models_cuda_(golden|ranks)|ops_cuda_comm" --timeout 1200

if [ $quick = 0 ]; then
    # System tests run real processes many times over: once, without sanitizers, is enough for them, as it is for
    # tests of the engine that come again with steps that overlap. These builds have no CUDA backend to test.
    # Warnings are errors in the first build only: gcc finds some under sanitizers that are none.
    say "tests under the address and undefined sanitizers"
    cmake -G Ninja -S . -B "$build-asan" -DQV_WERROR=OFF -DQV_BENCH=OFF -DQV_CUDA=OFF -DQV_SANITIZE=address,undefined >/dev/null
    cmake --build "$build-asan"
    run_ctest "$build-asan" -LE system -E "worker_(engine|prefix|lifecycle)$" --timeout 1200

    say "tests with threads under the thread sanitizer"
    cmake -G Ninja -S . -B "$build-tsan" -DQV_WERROR=OFF -DQV_BENCH=OFF -DQV_CUDA=OFF -DQV_SANITIZE=thread >/dev/null
    cmake --build "$build-tsan" --target threads_programs
    # Programs that tests start: libzmq is not instrumented, and what it does looks like races.
    export TSAN_OPTIONS=ignore_noninstrumented_modules=1
    run_ctest "$build-tsan" -L threads --timeout 1200
fi

say "done"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
