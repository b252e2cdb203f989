"""Broker, workers, clients and Redis on hosts of their own (network namespaces), with wires between them that are slow,
lossy, cut in one direction or both. Each test says what was acknowledged, lost and delivered twice, and how long the
longest wait for the next token was."""

import random
import signal
import sys
import threading
import time
import unittest

import network
from network import Host
from pool import DEMO, Pool, wait_until
from report import RemoteClient, Report, begin, job

PATIENT = ["--heartbeat", "300ms", "--worker-timeout", "1500ms"]
hosts = {}


def setUpModule():
    network.enter()
    for number, name in enumerate(("w1", "w2", "client", "redis"), 1):
        hosts[name] = Host(name, number)


def tearDownModule():
    for host in hosts.values():
        host.close()


class NetPool(Pool):
    """Broker and Redis here, every worker on the host of its name."""

    def __init__(self, workers=2, **more):
        super().__init__(workers=0, bind="0.0.0.0", **more)
        self.names = [f"w{i + 1}" for i in range(workers)]

    def __enter__(self):
        for host in hosts.values():
            host.heal()
        super().__enter__()
        try:
            for name in self.names:
                self.start_worker(name, host=hosts[name], wait=False)
            for name in self.names:
                self.wait_worker(name)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *error):
        for host in hosts.values():
            host.heal()
        super().__exit__(*error)

    def busiest(self):
        return max(self.status()["workers"], key=lambda w: w["in_flight"])["id"]


def jobs(n, **more):
    return [{**job(i), "n": 1 + i % 2, **more} for i in range(n)]


class Slow(unittest.TestCase):
    WIRES = [
        dict(delay_ms=20),
        dict(delay_ms=40, jitter_ms=40, loss=0.01),
        dict(delay_ms=5, loss=0.05),
    ]

    def test_a_slow_and_lossy_network_costs_time_and_no_token(self):
        args = ["--heartbeat", "300ms", "--worker-timeout", "3s"]
        with NetPool(broker_args=args) as pool, pool.client() as near:
            expected = Report("").expect(near, jobs(6))
            for wire in self.WIRES:
                for name in ("w1", "w2", "client"):
                    hosts[name].set(**wire)
                report = Report("every wire " + ", ".join(f"{key} {value}" for key, value in wire.items()))
                lost = [hosts[name].carried() for name in ("w1", "w2", "client")]
                client = RemoteClient(pool.frontend, jobs(6), hosts["client"])
                client.finish(report, expected)
                report.check(self, 20)
                after = [hosts[name].carried() for name in ("w1", "w2", "client")]
                n = [sum(a[way][what] - b[way][what] for a, b in zip(after, lost) for way in ("there", "back")) for what in ("carried", "lost")]
                print(f"  {n[0]} packets carried, {n[1]} lost", file=sys.stderr)
                if wire.get("loss"):
                    self.assertGreater(n[1], 0, "the wire did lose something")


class Partitioned(unittest.TestCase):
    def test_a_worker_that_is_cut_off_is_fenced_and_its_requests_go_on(self):
        names = {"both": "a worker cut off", "there": "a worker that hears nothing", "back": "a worker that nobody hears"}
        work = jobs(6, max_tokens=1500)
        expected = None
        for way, name in names.items():
            with self.subTest(way), NetPool(broker_args=PATIENT) as pool, pool.client() as client:
                report = Report(name)
                expected = expected or report.expect(client, work)
                streams = begin(client, work)
                busy = pool.busiest()
                hosts[busy].cut(way)

                def heal_when_lost():
                    wait_until("the broker gives it up", lambda: pool.metric("quiver_broker_workers_lost_total"))
                    hosts[busy].heal()

                healer = threading.Thread(target=heal_when_lost)
                healer.start()
                report.finish(streams, expected)
                healer.join()
                report.check(self, 6)
                # What it made in the dark arrives now, of a session that is over, and goes to nobody; or it found out itself
                # that it hears nothing, and ended the session.
                wait_until("it was fenced", lambda: pool.metric("quiver_broker_ghosts_total") or "session with the broker" in pool.log(busy))
                pool.wait_worker(busy)
                moved = wait_until("its requests moved", lambda: pool.metric("quiver_broker_moved_total"))
                ghosts = pool.metric("quiver_broker_ghosts_total")
                print(f"  {moved:.0f} requests moved, {ghosts:.0f} late messages dropped", file=sys.stderr)
                again = Report("")
                again.finish(begin(client, work[:2]), expected[:2])
                self.assertEqual((again.lost, again.duplicated), (0, 0), "it works as before")

    def test_wires_that_fail_all_the_time_lose_nothing(self):
        report = Report("wires cut at random for 15 s")
        rng = random.Random(7)
        with NetPool(broker_args=[*PATIENT, "--max-worker-losses", "1000"]) as pool, pool.client() as near:
            work = jobs(4)
            expected = report.expect(near, work)
            deadline = time.monotonic() + 15
            stop = threading.Event()

            def fail():
                while not stop.is_set():
                    host = hosts[rng.choice(("w1", "w2", "client"))]
                    host.cut(rng.choice(("both", "there", "back")))
                    stop.wait(rng.uniform(0.1, 3.5))
                    host.heal()
                    stop.wait(rng.uniform(0.1, 1.0))

            thread = threading.Thread(target=fail)
            thread.start()
            try:
                while time.monotonic() < deadline:
                    RemoteClient(pool.frontend, work, hosts["client"]).finish(report, expected)
            finally:
                stop.set()
                thread.join()
            report.check(self, 20)
            print(f"  {pool.metric('quiver_broker_workers_lost_total'):.0f} workers lost, {pool.metric('quiver_broker_moved_total'):.0f} requests "
                  f"moved, {pool.metric('quiver_broker_resumed_total'):.0f} resumed", file=sys.stderr)  # fmt: skip


class Vanished(unittest.TestCase):
    """A client that is silent is lost after three pings of a second, and found out at the next token; see docs/operations.md."""

    NOTICED_S = 6
    PINGED_S = 2.2  # when it has told the broker how long its silence may last
    WORK = [job(1, max_tokens=3800)] * 5  # one after the other: takes longer than both

    def vanish(self, pool, kill):
        """A client with work in flight is cut off; returns it, and after how many seconds its place was free."""
        client = RemoteClient(pool.frontend, self.WORK, hosts["client"])
        self.addCleanup(client.close)
        wait_until("one runs", lambda: pool.status()["in_flight"] == 1)
        since = time.monotonic()
        wait_until("it has pinged", lambda: time.monotonic() - since > self.PINGED_S)
        began = time.monotonic()
        hosts["client"].cut()
        if kill:
            client.process.kill()
        wait_until("its places are free", lambda: pool.status()["in_flight"] == pool.status()["queued"] == 0, self.NOTICED_S)
        freed_s = time.monotonic() - began
        wait_until("it is counted", lambda: pool.metric("quiver_broker_clients_lost_total") == 1)
        return client, freed_s

    def test_a_client_that_vanished_frees_its_place(self):
        with NetPool(workers=1, worker_args=["--max-running", "1"], broker_args=PATIENT) as pool, pool.client() as near:
            _, freed_s = self.vanish(pool, kill=True)
            began = time.monotonic()
            near.generate("Hello", max_tokens=1)
            print(f"a client that vanished: its places were free after {freed_s * 1000:.0f} ms, "
                  f"the next request took {(time.monotonic() - began) * 1000:.0f} ms", file=sys.stderr)  # fmt: skip

    def test_a_client_that_was_cut_off_comes_back_for_the_rest(self):
        report = Report("a client cut off until the broker gave it up")
        with NetPool(workers=1, worker_args=["--max-running", "1"], broker_args=PATIENT) as pool, pool.client() as near:
            expected = report.expect(near, self.WORK[:1]) * len(self.WORK)
            client, _ = self.vanish(pool, kill=False)
            hosts["client"].heal()
            client.finish(report, expected)
            report.check(self, 20)
            wait_until("it is counted", lambda: pool.metric("quiver_broker_resumed_total") >= 1)


class Redis(unittest.TestCase):
    """Redis on a host of its own."""

    def test_a_redis_that_is_slow_or_cut_off_holds_up_no_request(self):
        redis = hosts["redis"]
        with NetPool(workers=0, broker_args=PATIENT, redis=False) as pool:
            pool.redis_port = 6379
            pool._start("redis", *redis.command("redis-server", "--port", 6379, "--bind", "0.0.0.0", "--save", "", "--protected-mode", "no", "--dir", pool.dir))
            ask = pool.redis
            pool.redis = lambda *words, **more: ask("-h", redis.address, *words, **more)
            wait_until("redis-server answers", lambda: pool.redis("PING", check=False) == "PONG")
            pool.kill("broker", signal.SIGTERM)
            pool.processes["broker"].wait()
            pool.redis_url = f"redis://{redis.address}:6379"
            pool.start_broker()
            pool.start_worker("w1")
            wait_until("Redis is up", lambda: pool.status()["redis"] == "up")
            with pool.client() as client:
                work = jobs(4)
                expected = Report("").expect(client, work)
                for name, state in (("Redis 300 ms away", dict(delay_ms=150)), ("Redis cut off", dict(cut=True))):
                    report = Report(name)
                    redis.set(**state)
                    if state.get("cut"):
                        wait_until("the broker knows", lambda: pool.status()["redis"].startswith("down"), 20)
                        threading.Thread(target=pool.redis, args=("HSET", "quiver:want:json", "path", str(DEMO / "adapters" / "json"))).start()
                    report.finish(begin(client, work), expected)
                    report.check(self, 3)
                self.assertIsNone(pool.adapter("json"), "a change waits")
                redis.heal()
                pool.wait_adapter("json", "ready", 1)


if __name__ == "__main__":
    unittest.main(verbosity=2)
