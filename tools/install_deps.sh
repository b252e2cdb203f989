#!/usr/bin/env bash
# Installs the Debian packages that Quiver needs and that are missing. Says what it installs; does
# nothing when all are there.
#
#   tools/install_deps.sh [--tests] [--cuda]
#
# --tests adds what only the tests need. --cuda brings a CUDA compiler and cuBLAS where there is no
# nvcc: wheels from PyPI, unpacked into .cuda/ of this checkout, where CMake looks (cmake/cuda.cmake).
# No GPU is needed to compile and link.
set -euo pipefail

packages=(build-essential cmake ninja-build pkg-config
          libzmq3-dev libczmq-dev libmsgpack-dev libhiredis-dev libopenblas-dev libjansson-dev
          libpcre2-dev libutf8proc-dev libxxhash-dev libmicrohttpd-dev redis-server)
cuda=0
for arg in "$@"; do
    case $arg in
    --cuda) cuda=1 ;;
    --tests) packages+=(libcriterion-dev python3 python3-zmq python3-msgpack python3-numpy iproute2 util-linux) ;;
    *) echo "install_deps.sh: unknown option '$arg' (only --tests and --cuda)" >&2; exit 2 ;;
    esac
done

# Debian 12 has CUDA 11.8, which does not know sm_90a; the wheels are NVIDIA's own.
cuda_version=13.0
cuda_wheels=(nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cublas)
root=$(cd "$(dirname "$0")/.." && pwd)

have_nvcc() {
    command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
        [ -x "$root/.cuda/bin/nvcc" ]
}

# The wheels without pip's help in choosing: each of one release, nothing beside it.
install_cuda() {
    local dir specs=() wheel
    dir=$(mktemp -d)
    for wheel in "${cuda_wheels[@]}"; do specs+=("$wheel==$cuda_version.*"); done
    echo "installing CUDA $cuda_version into .cuda: ${cuda_wheels[*]}"
    python3 -m venv "$dir/venv"
    "$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$dir/site" "${specs[@]}"
    rm -rf "$root/.cuda"
    mv "$dir/site/nvidia/cu13" "$root/.cuda"
    rm -rf "$dir"
    # As an installed toolkit has them: the names that linkers look for.
    ln -sfn lib "$root/.cuda/lib64"
    local lib
    for lib in cublasLt cublas cudart; do
        ln -sf "$(basename "$(ls "$root/.cuda/lib/lib$lib.so."* | head -1)")" "$root/.cuda/lib/lib$lib.so"
    done
}

if [ $cuda = 1 ] && ! have_nvcc; then
    packages+=(python3 python3-venv)
fi

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
done

if [ ${#missing[@]} -gt 0 ]; then
    sudo=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || { echo "missing packages: ${missing[*]} (install them as root)" >&2; exit 1; }
        sudo=(sudo)
    fi
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    if ! { "${sudo[@]}" apt-get update -qq && "${sudo[@]}" env RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
        cat "$log" >&2
        echo "apt-get could not install ${missing[*]} (see above)" >&2
        exit 1
    fi
    rm -f "$log"
fi

if [ $cuda = 1 ] && ! have_nvcc; then
    install_cuda
fi
