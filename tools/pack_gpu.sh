#!/usr/bin/env bash
# Builds the programs that bench/gpu.sh runs, and bench_engine and bench_adapters, so that they need nothing but libc, a
# driver, cuBLASLt and, for several devices, NCCL; and packs them into one archive for a machine with a GPU on which
# nothing can be built. There bench/gpu.sh of a checkout runs them (--bin).
#
#   tools/pack_gpu.sh [OUT.tar.xz]   default gpu.tar.xz in the build's folder
#   BUILD_DIR=dir                    where to build (default build-portable)
#   ARCHITECTURES=list               of GPUs (default 90a-real; "80;90a-real" for all that we support)
set -euo pipefail
case ${1:-} in
-h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
-*) echo "pack_gpu.sh: unknown option '$1'; see --help" >&2; exit 2 ;;
esac
[ $# -le 1 ] || { echo "pack_gpu.sh: one archive, not '$2' too; see --help" >&2; exit 2; }
out=${1:+$(realpath -m "$1")} # before another folder is the current one
cd "$(dirname "$0")/.."
build=${BUILD_DIR:-build-portable}
out=${out:-$build/gpu.tar.xz}
programs=(gpu_tests quiver-run bench_model bench_dense bench_gemm bench_kernels bench_experts bench_comm bench_engine
    bench_adapters)
tools/install_deps.sh --tests --cuda
cmake -G Ninja -S . -B "$build" -DQV_WERROR=ON -DQV_PORTABLE=ON -DQV_TESTS=ON -DQV_BENCH=ON \
    -DCMAKE_CUDA_ARCHITECTURES="${ARCHITECTURES:-90a-real}" >/dev/null
cmake --build "$build" --target "${programs[@]}"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for program in "${programs[@]}"; do
    file=$build/bin/$program
    [ -e "$file" ] || file=$build/tests/$program
    strip -o "$folder/$program" "$file"
done
# The programs share most of their code, which a dictionary as large as all of them finds.
tar -C "$folder" -c . | xz --lzma2=preset=1,dict=256MiB >"$out"
echo "$out: $(du -h "$out" | cut -f 1)"
