#!/usr/bin/env bash
# Tests and tables of the CUDA backend, on a machine with a GPU. Builds nothing: tools/pack_gpu.sh makes the programs.
#
#   bench/gpu.sh [OPTION...] PART...
#
#   tests           gpu_tests: every op against the CPU backend, golden models, ranks where there are several devices
#   sanitize        its tests of ops, collectives left out, under compute-sanitizer: all by memcheck; attention, linear
#                   layers with adapters, experts, recurrent layers and sampling by racecheck as well
#   ops             bench_dense, bench_kernels, bench_experts: kernels beside their floors; bench_gemm: the products of
#                   prefill with adapters, inside and apart
#   models          bench_model: decode and prefill of 4B, 9B, Nano and 35B, made-up weights
#   adapters        the same of 4B without adapters, with 8 and 64 of rank 16, and with 8 of rank 64
#   deterministic   4B, Nano and 35B with --deterministic and without, at two lengths of context
#   times           where a step of 4B, Nano and 35B goes, op by op
#   ranks           bench_comm, and Nano and 35B split over 2 and 4 devices, Super over 4, as far as there are devices
#   parity          bench/peer/hf_parity.py at full width against transformers (needs torch, transformers, peft)
#   peer            bench/peer/sgmv_triton.py against SGLang's kernels (needs torch, triton); --sglang
#
#   --bin DIR       the programs, unpacked (default build-portable/bin of this checkout)
#   --golden DIR    golden models (default ../shared/golden beside this checkout)
#   --sglang WHEEL  of SGLang, for `peer`
#   --limit SEC     of each program (default 120)
set -uo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
bin=$repo/build-portable/bin golden=$repo/../shared/golden sglang="" limit=120 parts=()
while [ $# -gt 0 ]; do
    case $1 in
    --bin | --golden | --sglang | --limit)
        [ $# -gt 1 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
        declare "${1#--}=$2"; shift 2 ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    tests | sanitize | ops | models | adapters | deterministic | times | ranks | parity | peer) parts+=("$1"); shift ;;
    *) echo "gpu.sh: unknown argument '$1'; see --help" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || { echo "gpu.sh: name at least one part; see --help" >&2; exit 2; }
bin=$(cd "$bin" 2>/dev/null && pwd) || { echo "gpu.sh: no folder of programs; see --bin" >&2; exit 2; }
tests=$bin/gpu_tests
[ -e "$tests" ] || tests=$(dirname "$bin")/tests/gpu_tests # in the folder of a build
nvidia-smi -L 2>/dev/null || { echo "gpu.sh: no GPU here" >&2; exit 1; }

# cuBLASLt and NCCL from wherever Python brings them, if the system does not.
for package in nvidia.cublas nvidia.cu13 nvidia.nccl; do
    path=$(python3 -c "import $package as p; print(list(p.__path__)[0])" 2>/dev/null) &&
        LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$path/lib
done
export LD_LIBRARY_PATH=/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} QV_GOLDEN_DIR=$golden QV_SOURCE_DIR=$repo
# Without multicast over NVLink, which containers often may not use; NCCL_NVLS_ENABLE=1 has it.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

failed=0
run() { # COMMAND...: says what it runs, how long it took, and goes on when it fails
    local start=$SECONDS status=0
    printf '\n== %s\n' "$*" | sed "s,$bin/,,g; s,$repo/,,g"
    timeout -k 5 "$limit" "$@" || status=$?
    [ $status = 0 ] || { failed=$((failed + 1)); echo "== failed with $status"; }
    echo "== $((SECONDS - start)) s"
}
config() { echo "$repo/bench/configs/$1"; }
model() { run "$bin/bench_model" "$(config "$1")" "${@:2}"; }
four_b=qwen3.5-4b nine_b=qwen3.5-9b nano=nemotron3-nano-30b-a3b moe=qwen3.5-35b-a3b super=nemotron3-super-120b-a12b
suites=(cuda_dense cuda_gemm cuda_linear cuda_linear_lora cuda_lora cuda_mixer cuda_moe cuda_recurrent cuda_sample
    cuda_attention cuda_gated_attention cuda_memory cuda_deterministic cuda_cuts)

for part in "${parts[@]}"; do
    case $part in
    tests) run "$tests" ;;
    sanitize)
        for suite in "${suites[@]}"; do
            run compute-sanitizer --target-processes all --tool memcheck --error-exitcode 9 "$tests" "$suite"
        done
        for suite in cuda_attention cuda_gated_attention cuda_linear_lora cuda_mixer cuda_moe cuda_recurrent \
            cuda_sample; do
            run compute-sanitizer --target-processes all --tool racecheck --error-exitcode 9 "$tests" "$suite"
        done ;;
    ops) run "$bin/bench_dense"; run "$bin/bench_gemm"; run "$bin/bench_kernels"; run "$bin/bench_experts" ;;
    models)
        model $four_b --sizes 1,4,8,16,32,64,256
        for name in $nine_b $nano $moe; do model "$name" --sizes 1,16,64; done ;;
    adapters)
        model $four_b --sizes 1,16,64,256
        model $four_b --sizes 1,16,64,256 --adapters 8
        model $four_b --sizes 16,64,256 --adapters 64
        model $four_b --sizes 16,64 --adapters 8 --rank 64 --prompt 0 ;;
    deterministic)
        for name in $four_b $nano $moe; do
            for context in 2048 32768; do
                model "$name" --sizes 1,16 --context $context
                model "$name" --sizes 1,16 --context $context --deterministic
            done
        done ;;
    times) for name in $four_b $nano $moe; do model "$name" --sizes 1,16,64 --ops; done ;;
    ranks)
        for ranks in 2 4; do
            [ "$(nvidia-smi -L | wc -l)" -ge $ranks ] || { echo "== fewer than $ranks devices: no $ranks ranks"; continue; }
            run "$bin/bench_comm" --ranks $ranks
            for name in $nano $moe; do model "$name" --sizes 1,16,64 --tp $ranks; done
            [ $ranks = 4 ] && model $super --sizes 1,16,64 --tp 4
        done ;;
    parity)
        for name in $four_b:4 $nine_b:4 $moe:4 $nano:6 $super:3; do # as many layers as have every kind
            folder=$(mktemp -d)
            run python3 "$repo/bench/peer/hf_parity.py" make "$(config "${name%:*}")" "$folder" --layers "${name#*:}"
            run python3 "$repo/bench/peer/hf_parity.py" check "$folder" --run "$bin/quiver-run" --backend cuda
            rm -rf "$folder"
        done ;;
    peer)
        [ -n "$sglang" ] || { echo "gpu.sh: peer needs --sglang WHEEL (pip download --no-deps sglang)" >&2; failed=$((failed + 1)); continue; }
        run python3 "$repo/bench/peer/sgmv_triton.py" --sglang "$sglang" --bench "$bin/bench_kernels" ;;
    esac
done
echo "$failed programs failed"
[ $failed = 0 ]
