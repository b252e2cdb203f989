#!/usr/bin/env bash
# Installs the Debian packages that Quiver needs and that are missing. Says what it installs; does
# nothing when all are there.
#
#   tools/install_deps.sh [--tests]     --tests adds what only the tests need
set -euo pipefail

packages=(build-essential cmake ninja-build pkg-config
          libzmq3-dev libczmq-dev libmsgpack-dev libhiredis-dev libopenblas-dev libjansson-dev
          libpcre2-dev libutf8proc-dev libxxhash-dev libmicrohttpd-dev redis-server)
for arg in "$@"; do
    case $arg in
    --tests) packages+=(libcriterion-dev python3 python3-zmq python3-msgpack python3-numpy) ;;
    *) echo "install_deps.sh: unknown option '$arg' (only --tests)" >&2; exit 2 ;;
    esac
done

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

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
