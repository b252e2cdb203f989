"""What is promised when processes die, hang and come back. Each test says what was acknowledged, lost and
delivered twice (0 and 0), and how long the longest wait for the next token was."""

import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest

from pool import DEMO, Pool, chat, demo_adapters, wait_until
from report import FAST, SENTENCE, RemoteClient, Report, begin, job

from quiver_client import QuiverError

class Workers(unittest.TestCase):
    JOBS = [
        job(0, presence_penalty=0.3, logprobs=2),
        job(1, n=3, frequency_penalty=0.2),
        job(2, repetition_penalty=1.1, stop=["zebra", "no such text"]),
        job(3, adapter="json", logprobs=0),
    ]

    def begin(self, pool, client):
        jobs = [dict(j) for j in self.JOBS]
        expected = [client.stream(**j).answers() for j in jobs]
        streams = begin(client, jobs)
        busy = max(pool.status()["workers"], key=lambda w: w["in_flight"])["id"]
        return expected, streams, busy

    def check(self, report, streams, expected):
        report.finish(streams, [[a.tokens for a in row] for row in expected])
        report.check(self, 5)
        for stream, row in zip(streams, expected):
            for got, want in zip(stream.answers(), row):
                self.assertEqual((got.text, got.logprobs, got.top_logprobs, got.finish_reason),
                                 (want.text, want.logprobs, want.top_logprobs, want.finish_reason))  # fmt: skip

    def test_a_killed_worker_is_continued_exactly(self):
        with Pool(workers=2, adapters=demo_adapters("json"), broker_args=FAST) as pool, pool.client() as client:
            expected, streams, busy = self.begin(pool, client)
            pool.kill(busy)
            self.check(Report("kill -9 of a worker"), streams, expected)

    def test_a_worker_that_sleeps_is_a_ghost_when_it_wakes(self):
        with Pool(workers=2, adapters=demo_adapters("json"), broker_args=FAST) as pool, pool.client() as client:
            expected, streams, busy = self.begin(pool, client)
            pool.kill(busy, signal.SIGSTOP)
            waker = threading.Timer(1.2, pool.kill, (busy, signal.SIGCONT))
            waker.start()
            self.check(Report("SIGSTOP of a worker, then SIGCONT"), streams, expected)
            waker.join()
            pool.wait_worker(busy)

    def test_a_cancel_is_confirmed_and_frees_the_place_at_once(self):
        with Pool(workers=1, worker_args=["--max-running", "1"], broker_args=FAST) as pool, pool.client() as client:
            stream = client.stream(**{**job(1), "max_tokens": 3500})
            next(stream)
            waiting = client.stream(**{**job(2), "max_tokens": 2})
            began = time.monotonic()
            stream.cancel()
            self.assertEqual(stream.answer().finish_reason, "cancelled")
            confirmed = time.monotonic() - began
            next(waiting)
            print(f"cancel: confirmed after {confirmed * 1000:.0f} ms, the next request's first token after "
                  f"{(time.monotonic() - began) * 1000:.0f} ms", file=sys.stderr)  # fmt: skip
            self.assertLess(confirmed, 1)


class Brokers(unittest.TestCase):
    def test_a_killed_broker_that_restarts_loses_no_stream(self):
        report = Report("kill -9 of the broker, restarted")
        with Pool(workers=1, broker_args=FAST) as pool, pool.client() as client:
            jobs = [job(i, durable=i % 2 == 0, n=1 + i % 2) for i in range(6)]
            expected = report.expect(client, jobs)
            streams = begin(client, jobs)
            pool.kill("broker")
            pool.start_broker(wait=False)
            report.finish(streams, expected)
            report.check(self, 15)
            wait_until("Redis has nothing left to do", lambda: pool.redis("XLEN", "quiver:jobs:b1") == "0")

    def test_of_two_brokers_one_may_be_killed(self):
        report = Report("kill -9 of one of two brokers")
        with Pool(workers=2, brokers=2, broker_args=FAST) as pool, pool.client() as client:
            wait_until("the second broker has both workers", lambda: len((pool.status(1) or {}).get("workers", [])) == 2)
            jobs = [job(i, durable=i % 2 == 0) for i in range(8)]
            expected = report.expect(client, jobs)
            streams = begin(client, jobs)
            self.assertGreater(min(pool.status(0)["in_flight"], pool.status(1)["in_flight"]), 0, "both are used")
            pool.kill("broker2")
            report.finish(streams, expected)
            report.check(self, 15)
            wait_until("the lost broker's requests are done with", lambda: pool.redis("EXISTS", "quiver:jobs:b2") == "0")

    def test_a_durable_request_is_answered_to_whoever_asks_with_its_id(self):
        report = Report("kill -9 of client and broker, the stream resumed by another client")
        with Pool(workers=1, broker_args=FAST) as pool:
            wanted = job(3, request_id="order-17", durable=True)
            with pool.client() as client:
                expected = client.stream(**job(3)).answer()
                stream = client.stream(**wanted)
                seqs = [next(stream).seq for _ in range(5)]
                client._detach()  # as if it were killed
            pool.kill("broker")
            pool.start_broker()
            with pool.client() as client:
                deltas = report.resume(client.resume("order-17", [seqs[-1]], durable=True), [expected.tokens[5:]])
                self.assertEqual(deltas[0].seq, 5)
                report.check(self, 15)
                whole = client.stream(**wanted).answer()
                self.assertEqual((whole.tokens, whole.text), (expected.tokens, expected.text), "the same, not a second one")
            pool.kill("broker")
            pool.start_broker()
            wait_until("the broker has Redis", lambda: pool.redis("HGET", "quiver:broker:b1", "frontend") and pool_takes_durable(pool))
            with pool.client() as client:  # now Redis has the answer
                self.assertEqual(client.stream(**wanted).answer().tokens, expected.tokens)
                self.assertEqual(pool.status()["in_flight"], 0)
                with self.assertRaises(QuiverError) as caught:
                    client.resume("order-18").answer()
                self.assertEqual(caught.exception.code, "NOT_FOUND")

    def test_a_stopped_broker_that_wakes_up_finds_its_requests_taken_over(self):
        report = Report("SIGSTOP of one of two brokers, then SIGCONT")
        with Pool(workers=1, brokers=2, broker_args=FAST) as pool:
            wait_until("the second broker has the worker", lambda: (pool.status(1) or {}).get("workers"))
            with pool.client(endpoint=pool.frontends[1]) as client:
                expected = report.expect(client, [job(1)])
                stream = client.stream(**job(1, request_id="ghost", durable=True))
                last = next(stream).seq
                pool.kill("broker2", signal.SIGSTOP)
                client._detach()
            with pool.client(endpoint=pool.frontends[0]) as client:
                report.resume(client.resume("ghost", [last], durable=True), [expected[0][0][last + 1 :]])
                report.check(self, 15)
            pool.kill("broker2", signal.SIGCONT)
            wait_until("it lives again", lambda: pool.status(1))
            with pool.client(endpoint=pool.frontends[1]) as client:
                answer = client.stream(**job(1, request_id="ghost", durable=True)).answer()
                self.assertEqual(answer.tokens, expected[0][0])


class Redis(unittest.TestCase):
    def test_a_flushed_redis_forgets_no_durable_request(self):
        report = Report("FLUSHALL, then kill -9 of the broker")
        with Pool(workers=1, broker_args=FAST) as pool, pool.client() as client:
            jobs = [job(i, durable=True, request_id=f"f{i}") for i in range(2)]
            expected = report.expect(client, jobs)
            streams = begin(client, jobs)
            pool.redis("FLUSHALL")
            wait_until("they are written anew", lambda: pool.redis("XLEN", "quiver:jobs:b1") == "2" or not pool.status()["in_flight"])
            pool.kill("broker")
            pool.start_broker(wait=False)
            report.finish(streams, expected)
            report.check(self, 15)

    def test_without_redis_durable_is_refused_and_the_rest_goes_on(self):
        report = Report("Redis stopped and restarted")
        with Pool(workers=1, broker_args=FAST) as pool, pool.client() as client:
            jobs = [job(1), job(2, durable=True)]
            expected = report.expect(client, jobs)
            streams = begin(client, jobs)
            pool.kill("redis")
            wait_until("the broker knows", lambda: pool.status()["redis"].startswith("down"))
            with self.assertRaises(QuiverError) as caught:
                client.stream(**job(3, durable=True)).answer()
            self.assertEqual(caught.exception.code, "OVERLOADED")
            report.finish(streams, expected)
            report.check(self, 10)
            pool.start_redis()
            wait_until("durable works again", lambda: accepts_durable(client))


def accepts_durable(client):
    try:
        client.stream(**{**job(4), "max_tokens": 2, "durable": True}).answer()
        return True
    except QuiverError:
        return False


def pool_takes_durable(pool):
    with pool.client() as client:
        return accepts_durable(client)


class Clients(unittest.TestCase):
    def test_a_client_that_does_not_read_slows_only_itself(self):
        report = Report("a client that does not read beside one that does")
        args = [*FAST, "--client-queue", "8", "--max-spill", "16K"]
        with Pool(workers=1, broker_args=args) as pool, pool.client() as quick, pool.client() as slow:
            jobs = [job(i, logprobs=4) for i in range(2)]
            expected = report.expect(quick, jobs)
            long = dict(job(9), max_tokens=3000, logprobs=16)
            want = report.expect(quick, [long])
            for socket_, _ in slow._links:
                socket_.rcvhwm = 4
            stream = slow.stream(**long)
            next(stream)
            report.finish(begin(quick, jobs), expected)
            self.assertLess(report.gap, 5)
            report.finish([stream], want)  # now it reads
            report.check(self, 30)

    def test_a_client_that_vanished_comes_back_for_the_rest(self):
        report = Report("a client killed, the stream resumed by another")
        with Pool(workers=1, broker_args=FAST) as pool:
            with pool.client() as client:
                expected = client.stream(**job(5)).answer().tokens
                stream = client.stream(**job(5, request_id="mine-5"))
                tokens = [t for _ in range(10) for t in next(stream).tokens]
                client._detach()
            wait_until("nothing runs for it", lambda: pool.status()["in_flight"] == 0)
            self.assertEqual(tokens, expected[: len(tokens)])
            with pool.client() as client:
                report.resume(client.resume("mine-5", [9]), [expected[len(tokens) :]])
            report.check(self, 15)

    def test_a_killed_client_frees_its_places_at_the_next_token(self):
        with Pool(workers=1, worker_args=["--max-running", "1"], broker_args=FAST) as pool, pool.client() as near:
            client = RemoteClient(pool.frontend, [job(i, max_tokens=3800) for i in range(2)])
            self.addCleanup(client.close)
            wait_until("one runs, one waits", lambda: (pool.status()["in_flight"], pool.status()["queued"]) == (1, 1))
            began = time.monotonic()
            client.process.kill()
            wait_until("nothing runs or waits for it", lambda: (pool.status()["in_flight"], pool.status()["queued"]) == (0, 0), 2)
            freed_s = time.monotonic() - began
            near.generate("Hello", max_tokens=1)
            print(f"kill -9 of a client: its places were free after {freed_s * 1000:.0f} ms, the next request had ended after "
                  f"{(time.monotonic() - began) * 1000:.0f} ms", file=sys.stderr)  # fmt: skip
            wait_until("it is counted", lambda: pool.metric("quiver_broker_clients_lost_total") == 1)
            self.assertLess(pool.metric("quiver_broker_tokens_total"), 3800, "it did not run to its end")

    def test_a_half_open_connection_is_noticed_and_replaced(self):
        report = Report("a connection that is cut without a word")
        with Pool(workers=1, broker_args=FAST) as pool, Cable(pool.frontend) as cable:
            with pool.client(endpoint=cable.endpoint) as client:
                jobs = [dict(job(i), max_tokens=1500) for i in range(2)]
                expected = report.expect(client, jobs)
                streams = begin(client, jobs)
                cable.cut()
                report.finish(streams, expected)
                report.check(self, 15)


class Cable:
    """A TCP connection that can be cut so that neither end hears of it."""

    def __init__(self, endpoint):
        self.target = ("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sockets, self.cuts = [], set()

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        for s in [self.listener, *self.sockets]:
            s.close()

    def accept(self):
        while True:
            try:
                a, b = self.listener.accept()[0], socket.create_connection(self.target)
            except OSError:
                return
            self.sockets += [a, b]
            for x, y in ((a, b), (b, a)):
                threading.Thread(target=self.copy, args=(x, y), daemon=True).start()

    def copy(self, x, y):
        try:
            while data := x.recv(65536):
                if x not in self.cuts:
                    y.sendall(data)
        except OSError:
            pass
        if x not in self.cuts:
            for s in (x, y):
                s.close()

    def cut(self):
        self.cuts = set(self.sockets)


POISON = pathlib.Path(__file__).with_name("fragile_worker.py")


class Poison(unittest.TestCase):
    def test_a_request_that_kills_workers_is_quarantined_and_can_be_cleared(self):
        with Pool(workers=0, broker_args=FAST) as pool, pool.client() as client:

            def fragile(name):
                return pool._start(name, sys.executable, POISON, pool.backend, name)

            report = Report("a request that kills workers, beside one that does not")
            workers = [fragile("f1"), fragile("f2")]
            wait_until("both are there", lambda: len(pool.status()["workers"]) == 2)
            with self.assertRaises(QuiverError) as caught:
                client.stream("this is poison", request_id="bad").answer()
            self.assertEqual(caught.exception.code, "QUARANTINED")
            for worker in workers:
                self.assertEqual(worker.wait(10), 9)
            entries = wait_until("Redis shows it", lambda: pool.hash("quiver:quarantine"))
            ((fingerprint, text),) = entries.items()
            self.assertIn("id=bad", text)
            third = fragile("f3")
            wait_until("another is there", lambda: pool.worker("f3"))
            with self.assertRaises(QuiverError) as caught:
                client.stream("this is poison").answer()
            self.assertIn(fingerprint, caught.exception.message)
            report.finish([client.stream("this is fine")], [[[1]]])
            report.check(self, 5)
            self.assertIsNone(third.poll())
            pool.redis("HDEL", "quiver:quarantine", fingerprint)

            def gone():
                try:
                    client.stream("this is poison", deadline_ms=300).answer()
                except QuiverError as error:
                    return error.code != "QUARANTINED"
                return False

            wait_until("it is taken again", gone)


class Adapters(unittest.TestCase):
    def test_files_replaced_while_they_load_never_give_a_mixed_adapter(self):
        report = Report("adapter files replaced while they load, beside a stream")
        with Pool(workers=1, broker_args=FAST) as pool, pool.client() as client:
            beside = [job(i, max_tokens=1500) for i in range(2)]
            expected = report.expect(client, beside)
            streams = begin(client, beside)
            folder = pool.dir / "moving"
            versions = [DEMO / "adapters" / name for name in ("json", "emoji")]
            shutil.copytree(versions[0], folder)
            pool.redis("HSET", "quiver:want:moving", "path", str(folder))
            pool.wait_adapter("moving", "ready", 1)
            answers = set()
            for i in range(12):
                for file in versions[i % 2].iterdir():
                    shutil.copyfile(file, folder / file.name)  # in place, as careless tools do
                pool.redis("HSET", "quiver:want:moving", "path", str(folder), "pin", str(i % 2))
                try:
                    answers.add(client.generate(chat(SENTENCE), adapter="moving", temperature=0, max_tokens=12).text)
                except QuiverError as error:
                    self.assertIn(error.code, ("ADAPTER_INVALID", "ADAPTER_NOT_FOUND", "OVERLOADED"))
            report.finish(streams, expected)
            report.check(self, 5)
            for answer in answers:
                self.assertTrue(answer.startswith('{"who"') or answer.startswith("Ines: "), answer)


if __name__ == "__main__":
    unittest.main(verbosity=2)
