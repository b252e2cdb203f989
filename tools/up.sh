#!/usr/bin/env bash
# Brings up a whole pool on this machine: installs what is missing, builds, starts Redis, a broker and
# workers, publishes a mixed set of jobs and prints the answers. Then it stays up until Ctrl-C.
#
#   tools/up.sh [options]
#     --model DIR            a Hugging Face model directory (default: the bundled demo/tiny-qwen3.5)
#     --adapter NAME=DIR     an adapter to place, any number (default with the demo: json, french, emoji)
#     --replicas N           workers that hold each adapter (default: all)
#     --workers N            worker processes (default 2)
#     --backend cpu|cuda     what the workers compute on (default cpu)
#     --threads N            CPU threads of each worker (default: the cores shared out)
#     --tp N                 devices that each worker's model is split over (default 1)
#     --ep N                 groups of them that experts are shared out to (default 1)
#     --devices LIST         devices to share out, tp to each worker (cuda; default 0,1,2,...)
#     --worker-arg ARG       passed on to every quiver-worker, any number (see quiver-worker --help)
#     --jobs FILE            jobs to publish, JSON lines (default: demo/jobs.jsonl, or one a model)
#     --redis URL            use this Redis instead of starting one
#     --broker-port P        clients connect here, workers to P+1 (default 5555)
#     --redis-port P         port of the Redis that is started (default 6380)
#     --metrics-port P       broker's metrics on P, workers' on P+1, ... (default 9100)
#     --build DIR            build folder (default build/)
#     --no-build             use the programs in the build folder as they are
#     --once                 stop after the answers; exit code 0 when all arrived
#     --no-jobs              publish nothing, just stay up
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

die() { echo "up.sh: $*" >&2; exit 2; }
say() { printf '\033[1m==\033[0m %s\n' "$*"; }

model="" workers=2 backend=cpu threads="" redis="" broker_port=5555 redis_port=6380 metrics_port=9100
build=build do_build=1 once=0 publish=1 jobs="" replicas="" adapters=() worker_args=() tp=1 ep=1 devices=""
while [ $# -gt 0 ]; do
    case $1 in
    --once) once=1 ;;
    --no-jobs) publish=0 ;;
    --no-build) do_build=0 ;;
    -h | --help) sed -n '2,27s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --model | --adapter | --replicas | --workers | --backend | --threads | --tp | --ep | --devices | --worker-arg | --jobs | --redis | --broker-port | --redis-port | --metrics-port | --build)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
        --model) model=$2 ;;
        --adapter) adapters+=("$2") ;;
        --replicas) replicas=$2 ;;
        --workers) workers=$2 ;;
        --backend) backend=$2 ;;
        --threads) threads=$2 ;;
        --tp) tp=$2 ;;
        --ep) ep=$2 ;;
        --devices) devices=$2 ;;
        --worker-arg) worker_args+=("$2") ;;
        --jobs) jobs=$2 ;;
        --redis) redis=$2 ;;
        --broker-port) broker_port=$2 ;;
        --redis-port) redis_port=$2 ;;
        --metrics-port) metrics_port=$2 ;;
        --build) build=$2 ;;
        esac
        shift ;;
    *) die "unknown option '$1'; see --help" ;;
    esac
    shift
done
for number in "$workers" "$broker_port" "$redis_port" "$metrics_port" "$tp" "$ep" ${threads:-1} ${replicas:-1}; do
    case $number in '' | *[!0-9]*) die "'$number' is not a number" ;; esac
done
[ "$workers" -ge 1 ] || die "--workers $workers: at least one worker is needed"
[ "$tp" -ge 1 ] || die "--tp $tp: at least one device is needed"
case $backend in
cpu | cuda) ;;
*) die "--backend $backend: cpu or cuda" ;;
esac
if [ -z "$model" ]; then
    model=$root/demo/tiny-qwen3.5
    [ ${#adapters[@]} -gt 0 ] || for name in json french emoji; do adapters+=("$name=$model/adapters/$name"); done
    jobs=${jobs:-$root/demo/jobs.jsonl}
fi
[ -f "$model/config.json" ] || die "--model $model: there is no config.json"
[ -z "$jobs" ] || [ -f "$jobs" ] || die "--jobs $jobs: there is no such file"
for adapter in ${adapters[@]+"${adapters[@]}"}; do
    case $adapter in *=*) ;; *) die "--adapter $adapter: give NAME=DIR" ;; esac
    [ -f "${adapter#*=}/adapter_config.json" ] || die "--adapter $adapter: there is no ${adapter#*=}/adapter_config.json"
done
[ -z "$devices" ] || [ "$backend" = cuda ] || die "--devices $devices: the $backend backend has none"
if [ "$backend" = cuda ]; then
    IFS=, read -r -a pool <<<"${devices:-$(seq -s, 0 $((workers * tp - 1)))}"
    [ ${#pool[@]} -eq $((workers * tp)) ] || die "--devices $devices: $workers workers of $tp need $((workers * tp))"
fi
replicas=${replicas:-$workers}
cores=$(nproc)
threads=${threads:-$((cores / workers > 0 ? cores / workers : 1))}

if [ $do_build = 1 ]; then
    say "packages"
    deps=()
    [ "$backend" = cpu ] || deps=(--cuda)
    tools/install_deps.sh ${deps[@]+"${deps[@]}"}
    say "build in $build/"
    log=$(mktemp)
    # In a new folder, kernels of CUDA (minutes) only for who uses them.
    cuda=()
    if [ "$backend" = cuda ]; then cuda=(-DQV_CUDA=AUTO); elif [ ! -e "$build/CMakeCache.txt" ]; then cuda=(-DQV_CUDA=OFF); fi
    cmake -G Ninja -S . -B "$build" -DQV_TESTS=OFF -DQV_BENCH=OFF ${cuda[@]+"${cuda[@]}"} >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
    rm -f "$log"
    cmake --build "$build"
fi
bin=$root/$build/bin
case $build in /*) bin=$build/bin ;; esac

run=$(mktemp -d "${TMPDIR:-/tmp}/quiver-up.XXXXXX")
pids=() names=()
stop() {
    trap - EXIT INT TERM
    local pid
    # Workers first: they finish what they run and say goodbye; then the broker, then Redis.
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
        pid=${pids[$i]}
        [ -n "$pid" ] || continue # it has stopped
        kill -TERM "$pid" 2>/dev/null || true
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait 2>/dev/null || true
    rm -rf "$run"
}
fail() { echo "up.sh: $*" >&2; for log in "$run"/*.log; do [ -s "$log" ] && { echo "--- ${log##*/}" >&2; tail -n 20 "$log" >&2; }; done; stop; exit 1; }
trap 'stop; exit 130' INT TERM
trap stop EXIT

# wait_until SECONDS WHAT PID COMMAND...: until the command succeeds; fails when the process dies.
wait_until() {
    local limit=$((SECONDS + $1)) what=$2 pid=$3
    shift 3
    until "$@" >/dev/null 2>&1; do
        kill -0 "$pid" 2>/dev/null || fail "$what stopped while starting"
        [ $SECONDS -lt $limit ] || fail "$what did not come up in time"
        sleep 0.1
    done
}

if [ -z "$redis" ]; then
    say "redis-server on port $redis_port"
    redis-server --port "$redis_port" --bind 127.0.0.1 --dir "$run" --save "" --appendonly no --daemonize no >"$run/redis.log" 2>&1 &
    pids+=($!) names+=(redis-server)
    redis=redis://127.0.0.1:$redis_port
    wait_until 10 redis-server $! redis-cli -p "$redis_port" ping
else
    say "Redis as given"
fi

broker=tcp://127.0.0.1:$broker_port
ready() { "$bin/quiver" status --broker "$broker" --timeout 2s; }
say "quiver-broker: clients at $broker, workers at tcp://127.0.0.1:$((broker_port + 1)), metrics at http://127.0.0.1:$metrics_port/metrics"
"$bin/quiver-broker" --frontend "$broker" --backend "tcp://127.0.0.1:$((broker_port + 1))" --redis "$redis" --metrics-port "$metrics_port" >"$run/broker.log" 2>&1 &
pids+=($!) names+=(quiver-broker)
wait_until 10 quiver-broker $! ready

say "$workers x quiver-worker on the $backend backend: $model"
for ((i = 1; i <= workers; i++)); do
    device_args=()
    if [ "$backend" = cuda ]; then
        own=$(IFS=,; echo "${pool[*]:$(((i - 1) * tp)):$tp}")
        device_args=(--devices "$own")
        say "worker-$i: $([ "$tp" -eq 1 ] && echo "device $own" || echo "ranks 0 to $((tp - 1)) on devices $own")"
    elif [ "$tp" -gt 1 ]; then
        say "worker-$i: ranks 0 to $((tp - 1)) on the CPU, $threads thread(s) together"
    fi
    "$bin/quiver-worker" --id "worker-$i" --model "$model" --backend "$backend" --threads "$threads" --tp "$tp" --ep "$ep" ${device_args[@]+"${device_args[@]}"} --broker "tcp://127.0.0.1:$((broker_port + 1))" --redis "$redis" --metrics-port $((metrics_port + i)) ${worker_args[@]+"${worker_args[@]}"} >"$run/worker-$i.log" 2>&1 &
    pids+=($!) names+=("worker-$i")
done
is_ready() { [ "$(ready | grep -c "^$1 .*ready")" -ge 1 ]; }
for ((i = 1; i <= workers; i++)); do
    wait_until 600 "worker-$i" "${pids[$((${#pids[@]} - workers + i - 1))]}" is_ready "worker-$i"
    say "worker-$i is up on $(sed -n 's/.*model loaded: .* ms on //p' "$run/worker-$i.log")"
done

for adapter in ${adapters[@]+"${adapters[@]}"}; do
    name=${adapter%%=*}
    say "adapter $name on $replicas worker(s): redis-cli HSET quiver:want:$name path ${adapter#*=} replicas $replicas"
    "$bin/quiver" adapters add "$name" "${adapter#*=}" --replicas "$replicas" --redis "$redis" --broker "$broker" >/dev/null || fail "adapter $name was not placed"
done
ready

code=0
if [ $publish = 1 ]; then
    if [ -z "$jobs" ]; then
        jobs=$run/jobs.jsonl
        job='"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 64'
        echo "{\"id\": \"base\", $job}" >"$jobs"
        for adapter in ${adapters[@]+"${adapters[@]}"}; do echo "{\"id\": \"${adapter%%=*}\", \"adapter\": \"${adapter%%=*}\", $job}" >>"$jobs"; done
    fi
    say "publishing $(grep -c . "$jobs") jobs at once from $jobs"
    "$bin/quiver" submit --broker "$broker" --jobs "$jobs" || code=$?
fi
if [ $once = 1 ]; then
    stop
    exit $code
fi

first=${adapters[0]-}
cat <<END

The pool is up. From another terminal:
  $bin/quiver submit --broker $broker ${first:+-a ${first%%=*} }"Emil found five red boats at the garden on Monday."
  $bin/quiver status --broker $broker
  redis-cli -u $redis HGETALL quiver:adapter:${first%%=*}
Logs are in $run. Ctrl-C stops everything.
END
left=$workers
while :; do
    { sleep 1; } 2>/dev/null # where the shell would say which job was killed
    for i in "${!pids[@]}"; do
        if [ -z "${pids[$i]}" ] || kill -0 "${pids[$i]}" 2>/dev/null; then continue; fi
        status=0
        wait "${pids[$i]}" 2>/dev/null || status=$?
        pids[i]="" # its number may be somebody else's by now
        how="${names[$i]} stopped with status $status"
        [ "$status" -le 128 ] || how="${names[$i]} was ended by signal $((status - 128))"
        case ${names[$i]} in worker-*) left=$((left - 1)) ;; *) fail "$how; logs are below" ;; esac
        [ $left -gt 0 ] || fail "$how, the last worker; logs are below"
        echo "up.sh: $how; what it ran goes to the other workers, $left of them" >&2
    done
done
