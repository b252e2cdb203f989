#!/usr/bin/env bash
# Builds the programs that bench/gpu.sh runs, so that they need nothing but libc, a driver, cuBLASLt and NCCL, and
# packs them into one archive for a machine with a GPU on which nothing can be built.
#
#   tools/pack_gpu.sh [OUT.tar.xz]   default build-portable/gpu.tar.xz
#   BUILD_DIR=dir                    where to build (default build-portable)
#   ARCHITECTURES=list               of GPUs (default 90a-real; "80;90a-real" for all that we support)
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
-h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
-*) echo "pack_gpu.sh: unknown option '$1'; see --help" >&2; exit 2 ;;
esac
build=${BUILD_DIR:-build-portable}
out=${1:-$build/gpu.tar.xz}
programs=(gpu_tests quiver-run bench_model bench_dense bench_gemm bench_kernels bench_experts bench_engine bench_adapters bench_comm)
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
