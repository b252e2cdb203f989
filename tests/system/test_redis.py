"""Redis that fails over, is slow, is flushed under traffic or comes back with less than it had. Each test says what was
acknowledged, lost and delivered twice, and how long the longest wait for the next token was."""

import signal
import subprocess
import sys
import time
import unittest

from pool import DEMO, Pool, demo_adapters, free_port, wait_until
from report import Report, begin, job

from quiver_client import QuiverError

CALM = ["--heartbeat", "500ms", "--worker-timeout", "10s"]  # here no worker is lost, on the busiest machine
ADAPTERS = DEMO / "adapters"


class Pair(Pool):
    """A pool whose Redis has a replica, and whose programs know both."""

    def __init__(self, **more):
        super().__init__(**more)
        self.ports = [self.redis_port, free_port()]
        self.redis_url = ",".join(f"redis://127.0.0.1:{port}" for port in self.ports)

    def start_redis(self, number=0):
        if number == 0:
            super().start_redis()
            self.start_redis(1)
            self.ask(1, "REPLICAOF", "127.0.0.1", str(self.ports[0]))
            wait_until("the replica follows", lambda: "master_link_status:up" in self.ask(1, "INFO", "replication"))
            return
        self._start("replica", "redis-server", "--port", self.ports[1], "--bind", "127.0.0.1", "--save", "", "--dir", self.dir)
        wait_until("the replica answers", lambda: self.ask(1, "PING") == "PONG")

    def ask(self, number, *words):
        command = ["redis-cli", "-p", str(self.ports[number]), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def fail_over(self):
        """The primary is killed, the replica promoted."""
        self.kill("redis")
        self.ask(1, "REPLICAOF", "NO", "ONE")
        self.redis_port = self.ports[1]

    def caught_up(self):
        return self.ask(0, "WAIT", "1", "1000") == "1"


def redis_of(pool):
    return (pool.status() or {}).get("redis", "")


class Failover(unittest.TestCase):
    def test_a_promoted_replica_takes_over_under_traffic(self):
        report = Report("Redis killed, its replica promoted")
        with Pair(workers=2, adapters=demo_adapters("json"), broker_args=CALM) as pool, pool.client() as client:
            jobs = [job(0), job(1, adapter="json"), job(2, durable=True, request_id="kept")]
            expected = report.expect(client, jobs)
            streams = begin(client, jobs)
            self.assertTrue(pool.caught_up())
            began = time.monotonic()
            pool.fail_over()
            wait_until("the broker is at the new one", lambda: pool.hash("quiver:broker:b1") and redis_of(pool) == "up", 10)
            print(f"  the broker was at the new one after {(time.monotonic() - began) * 1000:.0f} ms", file=sys.stderr)
            report.finish(streams, expected)
            report.check(self, 10)
            wait_until("the workers are", lambda: pool.hash("quiver:worker:w1") and pool.hash("quiver:worker:w2"), 10)
            # What is wanted acts there, what is published is there, and nothing was taken as deleted.
            self.assertEqual(pool.adapter("json")["state"], "ready")
            pool.redis("HSET", "quiver:want:french", "path", str(ADAPTERS / "french"))
            pool.wait_adapter("french", "ready", 1)
            wait_until("it is published", lambda: pool.hash("quiver:adapter:french").get("state") == "ready")
            wait_until("durable works", lambda: client.stream(**job(3, durable=True, max_tokens=2)).answer().tokens)

    def test_durable_requests_survive_a_failover_and_then_the_broker(self):
        report = Report("Redis fails over, then kill -9 of the broker")
        with Pair(workers=1, broker_args=CALM, worker_args=["--max-running", "2"]) as pool, pool.client() as client:
            jobs = [job(i, durable=True, request_id=f"d{i}", max_tokens=1500) for i in range(4)]
            expected = report.expect(client, jobs)
            streams = [client.stream(**j) for j in jobs]
            wait_until("all are accepted", lambda: pool.redis("XLEN", "quiver:jobs:b1") == "4")
            self.assertTrue(pool.caught_up())
            pool.fail_over()
            pool.kill("broker")
            self.assertNotEqual(pool.redis("XLEN", "quiver:jobs:b1"), "0", "the new one has what is owed")
            pool.start_broker(wait=False)
            report.finish(streams, expected)
            report.check(self, 15)
            wait_until("nothing is owed", lambda: pool.redis("XLEN", "quiver:jobs:b1") == "0")

    def test_what_the_replica_did_not_have_is_written_anew(self):
        """Asynchronous replication loses the last writes; a broker that lives has them."""
        report = Report("Redis fails over to a copy without the last writes")
        with Pair(workers=1, broker_args=CALM, worker_args=["--max-running", "1"]) as pool, pool.client() as client:
            self.assertTrue(pool.caught_up())
            wait_until("the replica has the schema", lambda: pool.ask(1, "GET", "quiver:schema") == "1")
            pool.ask(1, "REPLICAOF", "NO", "ONE")  # from here on it misses everything
            pool.ask(1, "REPLICAOF", "127.0.0.1", "1")  # and takes no writes yet
            pool.redis("HSET", "quiver:want:json", "path", str(ADAPTERS / "json"))
            pool.wait_adapter("json", "ready", 1)
            jobs = [job(i, durable=True, request_id=f"m{i}", max_tokens=1500) for i in range(3)]
            expected = report.expect(client, jobs)
            streams = begin(client, jobs[:1]) + [client.stream(**j) for j in jobs[1:]]
            wait_until("all are accepted", lambda: int(pool.redis("XLEN", "quiver:jobs:b1")) >= 2)
            pool.fail_over()
            wait_until("what is owed is there again", lambda: pool.redis("XLEN", "quiver:jobs:b1") not in ("", "0") or not pool.status()["in_flight"], 20)
            pool.kill("broker")
            pool.start_broker(wait=False)
            report.finish(streams, expected)
            report.check(self, 15)


class Slow(unittest.TestCase):
    def test_a_slow_redis_holds_up_no_request_and_no_change_for_ever(self):
        with Pool(workers=1, broker_args=CALM) as pool, pool.client() as client:
            jobs = [job(i) for i in range(3)]
            expected = Report("").expect(client, jobs)
            report = Report("Redis paused for 1.5 s")
            pool.redis("CLIENT", "PAUSE", "1500", "ALL")
            report.finish(begin(client, jobs), expected)
            report.check(self, 6)
            pool.redis("HSET", "quiver:want:json", "path", str(ADAPTERS / "emoji"))
            pool.wait_adapter("json", "ready", 1)

            report = Report("Redis stopped (SIGSTOP)")
            pool.kill("redis", signal.SIGSTOP)
            report.finish(begin(client, jobs), expected)
            report.check(self, 6)
            wait_until("it counts as away", lambda: redis_of(pool).startswith("down"), 15)
            with self.assertRaises(QuiverError) as caught:
                client.stream(**job(9, durable=True)).answer()
            self.assertEqual(caught.exception.code, "OVERLOADED")
            pool.kill("redis", signal.SIGCONT)
            wait_until("it is back", lambda: redis_of(pool) == "up", 15)
            pool.redis("HSET", "quiver:want:french", "path", str(ADAPTERS / "french"))
            pool.wait_adapter("french", "ready", 1)

    def test_durable_is_accepted_late_by_a_slow_redis_and_not_twice(self):
        report = Report("a durable request while Redis is paused")
        with Pool(workers=1, broker_args=CALM) as pool, pool.client() as client:
            expected = report.expect(client, [job(1)])
            pool.redis("CLIENT", "PAUSE", "1000", "WRITE")
            streams = [client.stream(**job(1, durable=True, request_id="late"))]
            report.finish(streams, expected)
            report.check(self, 5)
            again = client.stream(**job(1, durable=True, request_id="late")).answer()
            self.assertEqual(again.tokens, expected[0][0])


class Flushed(unittest.TestCase):
    def test_a_flush_under_traffic_unloads_nothing_and_is_undone(self):
        report = Report("FLUSHALL under traffic")
        with Pool(workers=2, adapters=demo_adapters("json", "french"), broker_args=CALM) as pool, pool.client() as client:
            pool.redis("HSET", "quiver:tenant:acme", "weight", "2")
            pool.redis("HSET", "quiver:drain:w9", "why", "it is old")
            pool.redis("HSET", "quiver:want:json", "pin", "1")
            wait_until("it is pinned", lambda: pool.adapter("json")["pin"])
            wait_until("two scans have seen them", lambda: pool.redis("EXISTS", "quiver:schema") == "1")
            jobs = [job(i, adapter=("json", "french", "")[i % 3]) for i in range(6)]
            expected = report.expect(client, jobs)
            for _ in range(3):
                streams = begin(client, jobs)
                pool.redis("FLUSHALL")
                report.finish(streams, expected)
                for key in ("quiver:want:json", "quiver:want:french", "quiver:tenant:acme", "quiver:drain:w9"):
                    wait_until(f"{key} is written back", lambda key=key: pool.redis("EXISTS", key) == "1")
                wait_until("what is is published again", lambda: pool.hash("quiver:place:json").get("w1") == "cpu")
            report.check(self, 10)
            self.assertEqual(pool.hash("quiver:want:json")["pin"], "1")
            self.assertIn("data_lost", pool.redis("XRANGE", "quiver:events", "-", "+"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
