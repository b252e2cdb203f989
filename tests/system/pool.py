"""A whole pool on loopback for the system tests: redis-server, quiver-broker and quiver-workers as real
processes, each with its log in a temporary folder."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request

SOURCE = pathlib.Path(os.environ.get("QV_SOURCE_DIR", pathlib.Path(__file__).resolve().parents[2]))
BUILD = pathlib.Path(os.environ.get("QV_BUILD_DIR", SOURCE / "build"))
BIN = BUILD / "bin"
DEMO = SOURCE / "demo" / "tiny-qwen3.5"
GOLDEN = pathlib.Path(os.environ.get("QV_GOLDEN_DIR", SOURCE.parent / "shared" / "golden"))

sys.path.insert(0, str(SOURCE / "clients" / "python"))
from quiver_client import Client  # noqa: E402

START_S = 30  # how long a program may take to come up on a busy machine


FIRST_PORT = 10240  # of those that tests listen on
given_ports = set()


def outgoing_ports():
    """The range from which the kernel takes the ports of outgoing connections; empty where it leaves no other."""
    try:
        low, high = map(int, pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        low, high = 32768, 60999
    return range(low, high + 1) if low > FIRST_PORT else range(0)


def free_port(n=1):
    """The first of n ports in a row that are free now, that no outgoing connection takes until they are used, and
    that no other caller in this process was given."""
    taken = given_ports.union(outgoing_ports())
    while True:
        ports = range(first := random.randrange(FIRST_PORT, 65536 - n), first + n)
        if taken.intersection(ports):
            continue
        with contextlib.ExitStack() as stack:
            try:
                for port in ports:
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        given_ports.update(ports)
        return first


def wait_until(what, condition, seconds=START_S):
    """Poll until condition() is true; fails the test otherwise. Returns what condition() returned."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"still not after {seconds} s: {what}")
        time.sleep(0.02)


class Pool:
    """Processes of one pool. Use as a context manager. `bind`: where broker and Redis listen."""

    def __init__(self, workers=1, brokers=1, adapters=(), redis=True, broker_args=(), worker_args=(), model=DEMO, bind="127.0.0.1"):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="quiver-test-"))
        self.model, self.bind = model, bind
        self.frontends = [f"tcp://127.0.0.1:{free_port()}" for _ in range(brokers)]
        self.backends = [f"tcp://127.0.0.1:{free_port()}" for _ in range(brokers)]
        self.frontend, self.backend = self.frontends[0], self.backends[0]
        self.redis_port = free_port() if redis else None
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}" if redis else "none"
        self.metrics_port = free_port()
        self.broker_args, self.worker_args = list(broker_args), list(worker_args)
        self.processes = {}
        self.n_workers, self.adapters = workers, dict(adapters)

    def __enter__(self):
        try:
            if self.redis_port:
                self.start_redis()
            for i in range(len(self.frontends)):
                self.start_broker(i)
            for i in range(self.n_workers):
                self.start_worker(f"w{i + 1}", wait=False)
            for i in range(self.n_workers):
                self.wait_worker(f"w{i + 1}")
            for name, path in self.adapters.items():
                self.redis("HSET", f"quiver:want:{name}", "path", str(path), "replicas", str(self.n_workers))
            for name in self.adapters:
                self.wait_adapter(name, "ready", self.n_workers)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, *_):
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if kind is not None and not issubclass(kind, unittest.SkipTest):
            for log in sorted(self.dir.glob("*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-25:], sep="\n", file=sys.stderr)
        shutil.rmtree(self.dir, ignore_errors=True)

    # --- processes

    def _start(self, name, *command):
        log = open(self.dir / f"{name}.log", "a")
        self.processes[name] = subprocess.Popen(
            [str(c) for c in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        log.close()
        return self.processes[name]

    def start_redis(self):
        self._start(
            "redis", "redis-server", "--port", self.redis_port, "--bind", self.bind, "--save", "",
            "--appendonly", "no", "--dir", self.dir, "--protected-mode", "no",
        )  # fmt: skip
        wait_until("redis-server answers", lambda: self.redis("PING", check=False) == "PONG")

    def start_broker(self, number=0, wait=True):
        self._start(
            f"broker{number + 1}" if number else "broker", BIN / "quiver-broker",
            "--frontend", self.frontends[number].replace("127.0.0.1", self.bind),
            "--backend", self.backends[number].replace("127.0.0.1", self.bind), "--redis", self.redis_url, "--id", f"b{number + 1}",
            *(["--allow-remote"] if self.bind != "127.0.0.1" else []),
            *(["--metrics-port", self.metrics_port] if number == 0 else []), *self.broker_args,
        )  # fmt: skip
        if wait:
            wait_until("the broker answers", lambda: self.status(number))

    def start_worker(self, name, *args, wait=True, host=None):
        """A worker here, or on a host of tests/system/network.py."""
        words = [
            BIN / "quiver-worker", "--id", name, "--model", self.model, "--threads", 1,
            *[word for backend in self.backends for word in ("--broker", backend)], "--redis", self.redis_url, *self.worker_args, *args,
        ]  # fmt: skip
        if host is not None:
            words = host.command(*[str(word).replace("127.0.0.1", host.gateway) for word in words])
        self._start(name, *words)
        if wait:
            self.wait_worker(name)

    def kill(self, name, sig=signal.SIGKILL):
        self.processes[name].send_signal(sig)
        if sig == signal.SIGKILL:
            self.processes[name].wait()

    def log(self, name):
        return (self.dir / f"{name}.log").read_text(errors="replace")

    def alive(self, name):
        return self.processes[name].poll() is None

    # --- questions

    def client(self, **kwargs):
        return Client(kwargs.pop("endpoint", self.frontends), **{"timeout": 30, **kwargs})

    def status(self, number=0):
        try:
            with self.client(endpoint=self.frontends[number], timeout=1) as client:
                return client.status()
        except TimeoutError:
            return None

    def worker(self, name):
        return next((w for w in (self.status() or {}).get("workers", []) if w["id"] == name), None)

    def adapter(self, name):
        return next((a for a in (self.status() or {}).get("adapters", []) if a["name"] == name), None)

    def metric(self, name, **labels):
        """What the first broker counts, summed over the labels that are not given; 0 if it has never counted it."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        rows = [line.rsplit(" ", 1) for line in lines if line.split("{")[0].split(" ")[0] == name]
        return sum(float(value) for row, value in rows if all(w in row for w in wanted))

    def wait_worker(self, name, state="ready"):
        def ready():
            if not self.alive(name):
                raise AssertionError(f"{name} stopped:\n{self.log(name)}")
            worker = self.worker(name)
            return worker and worker["state"] == state and worker

        return wait_until(f"worker {name} is {state}", ready)

    def wait_adapter(self, name, states, workers=0):
        states = (states,) if isinstance(states, str) else states

        def there():
            adapter = self.adapter(name)
            return adapter and adapter["state"] in states and len(adapter["workers"]) >= workers and adapter

        return wait_until(f"adapter {name} is {' or '.join(states)} on {workers}", there)

    def redis(self, *args, check=True):
        result = subprocess.run(
            ["redis-cli", "-p", str(self.redis_port), *args], capture_output=True, text=True
        )
        if check and result.returncode:
            raise AssertionError(f"redis-cli {args}: {result.stdout}{result.stderr}")
        return result.stdout.strip()

    def hash(self, key):
        lines = self.redis("HGETALL", key).splitlines()
        return dict(zip(lines[::2], lines[1::2]))


def quiver(pool, *args, stdin=None, timeout=60):
    """Run the command line client against a pool."""
    command = [str(BIN / "quiver"), args[0], "--broker", pool.frontend, *map(str, args[1:])]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=timeout)


def demo_adapters(*names):
    return {name: DEMO / "adapters" / name for name in names}


def chat(text):
    return [{"role": "user", "content": text}]


def read_safetensors(path):
    """name -> list of numbers, for the F32 and I32 tensors of the golden files (flattened)."""
    raw = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        letter = {"F32": "f", "I32": "i"}[info["dtype"]]
        data = raw[8 + size + begin : 8 + size + end]
        tensors[name] = list(struct.unpack(f"<{len(data) // 4}{letter}", data))
    return tensors
