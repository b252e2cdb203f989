"""Hosts for the network tests: network namespaces, each joined to the test's own by a wire that can be slow, lossy
or cut, in one direction or both.

A wire is two TUN devices and a process that carries packets from one to the other. It needs no queueing discipline
of the kernel (netem is often not built in), can be cut in one direction, says what it carried, and loses the same
packets of a row for the same seed. Everything happens in a user namespace of its own: no rights are needed where
the machine lets a user make one.

This file is also the programs of the other side:  network.py host NUMBER FD  |  network.py wire SEED FD FD
"""

import collections
import fcntl
import json
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
import unittest

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MAX_PACKET = 65536


def open_tun(name, address, peer):
    """A TUN device in the namespace of this process, up, with an address."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    for words in (("addr", "add", address, "peer", peer, "dev", name), ("link", "set", name, "up")):
        subprocess.run(["ip", *words], check=True)
    return fd


def enter():
    """Go on in namespaces of our own, as a new process; skips the tests, with the reason, where that is not possible."""
    if os.environ.get("QV_NETWORK") == "inside":
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    missing = [p for p in ("unshare", "nsenter", "ip") if shutil.which(p) is None]
    if missing:
        raise unittest.SkipTest(f"no network tests: this machine lacks {' and '.join(missing)}")
    command = ["unshare", "--user", "--map-root-user", "--net"]
    probe = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import network, subprocess; "
        "network.open_tun('probe', '10.77.0.1', '10.77.0.2'); subprocess.run(['unshare', '--net', 'true'], check=True)"
    )
    tried = subprocess.run([*command, sys.executable, "-c", probe], capture_output=True, text=True)
    if tried.returncode:
        why = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise unittest.SkipTest(f"no network tests: this machine lets us make no network namespace with a TUN device: {why}")
    sys.stdout.flush(), sys.stderr.flush()
    os.execvpe(command[0], [*command, sys.executable, *sys.argv], {**os.environ, "QV_NETWORK": "inside"})


class Host:
    """A namespace with one address, `address`; from there the test's namespace is `gateway`."""

    def __init__(self, name, number):
        self.name = name
        self.address, self.gateway = f"10.77.{number}.2", f"10.77.{number}.1"
        here = open_tun(f"wire{number}", self.gateway, self.address)
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            ["unshare", "--net", sys.executable, __file__, "host", str(number), str(theirs.fileno())],
            stdin=subprocess.PIPE, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        ours.close()
        if not fds:
            raise AssertionError(f"host {name}: no device in its namespace")
        self.wire = subprocess.Popen(
            [sys.executable, __file__, "wire", str(number), str(here), str(fds[0])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[here, fds[0]], text=True,
        )  # fmt: skip
        os.close(here), os.close(fds[0])

    def command(self, *words):
        """The words of a command that runs there; its process id is the program's own."""
        return ["nsenter", "--target", str(self.process.pid), "--net", *map(str, words)]

    def set(self, way="both", **state):
        """Change the wire: delay_ms, jitter_ms, loss (a share), cut; way: both, there (to the host) or back."""
        return self._ask(way=way, **state)

    def cut(self, way="both"):
        return self.set(way, cut=True)

    def heal(self):
        return self.set(cut=False, loss=0, delay_ms=0, jitter_ms=0)

    def carried(self):
        """{"there": {"carried": n, "lost": n}, "back": ...}, in packets."""
        return self._ask(way="none")

    def _ask(self, **message):
        self.wire.stdin.write(json.dumps(message) + "\n")
        self.wire.stdin.flush()
        return json.loads(self.wire.stdout.readline())

    def close(self):
        for process in (self.wire, self.process):
            process.stdin.close()
            process.wait()
        self.wire.stdout.close()


# --- the other side -----------------------------------------------------------------------------


def host_main(number, fd):
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    tun = open_tun("wire", f"10.77.{number}.2", f"10.77.{number}.1")
    with socket.socket(fileno=fd) as there:
        socket.send_fds(there, [b"."], [tun])
    sys.stdin.read()  # the namespace lives as long as this process


class Way:
    """One direction of a wire: packets in order, each as late as it should be."""

    def __init__(self, source, target, seed):
        self.source, self.target, self.random = source, target, random.Random(seed)
        self.delay_ms = self.jitter_ms = self.loss = 0
        self.cut = False
        self.carried = self.lost = 0
        self.queue = collections.deque()  # of (when due, packet)
        self.last = 0.0

    def read(self, now):
        while True:
            try:
                packet = os.read(self.source, MAX_PACKET)
            except BlockingIOError:
                return
            if self.cut or self.random.random() < self.loss:
                self.lost += 1
                continue
            late = (self.delay_ms + self.random.random() * self.jitter_ms) / 1000
            self.last = max(self.last, now + late)
            self.queue.append((self.last, packet))

    def write(self, now):
        """Deliver what is due; the time of the next, or None."""
        while self.queue and self.queue[0][0] <= now:
            _, packet = self.queue.popleft()
            if self.cut:
                self.lost += 1
                continue
            try:
                os.write(self.target, packet)
                self.carried += 1
            except OSError:  # its queue is full
                self.lost += 1
        return self.queue[0][0] if self.queue else None


def wire_main(seed, here, there):
    for fd in (here, there):
        os.set_blocking(fd, False)
    ways = {"there": Way(here, there, 2 * seed), "back": Way(there, here, 2 * seed + 1)}
    poller = select.poll()
    for fd in (here, there, 0):
        poller.register(fd, select.POLLIN)
    due = None
    while True:
        wait_ms = None if due is None else max(0, int((due - time.monotonic()) * 1000) + 1)
        ready = [fd for fd, _ in poller.poll(wait_ms)]
        if 0 in ready:
            line = sys.stdin.readline()
            if not line:
                return
            message = json.loads(line)
            which = message.pop("way")
            for name, way in ways.items():
                if which in (name, "both"):
                    vars(way).update(message)
            print(json.dumps({n: {"carried": w.carried, "lost": w.lost} for n, w in ways.items()}), flush=True)
        now = time.monotonic()
        for way in ways.values():
            if way.source in ready:
                way.read(now)
        later = [t for t in (way.write(now) for way in ways.values()) if t is not None]
        due = min(later) if later else None


if __name__ == "__main__":
    if sys.argv[1] == "host":
        host_main(int(sys.argv[2]), int(sys.argv[3]))
    else:
        wire_main(*map(int, sys.argv[2:5]))
