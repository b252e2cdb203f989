"""Placement operated with redis-cli alone: canaries, swaps, verbs, drains, joins, failures, tenants."""

import threading
import unittest

from pool import DEMO, Pool, chat, demo_adapters, quiver, wait_until

from quiver_client import QuiverError

SENTENCE = "Ines carried two black shoes at the station on Tuesday."
ADAPTERS = DEMO / "adapters"
JOB = dict(temperature=0, max_tokens=24)


def kind(text):
    """Which of the demo adapters made an answer."""
    if text.startswith('{"who"'):
        return "json"
    return "emoji" if text.startswith("Ines: ") else "other"


class Traffic:
    """Requests one after the other from a thread, until the block ends."""

    def __init__(self, pool, adapter):
        self.pool, self.adapter = pool, adapter
        self.answers, self.failures, self.stop = [], [], threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        with self.pool.client() as client:
            while not self.stop.is_set():
                try:
                    self.answers.append(client.generate(chat(SENTENCE), adapter=self.adapter, **JOB))
                except Exception as failure:  # any failure is what the tests are about
                    self.failures.append(failure)

    def more(self, n=5):
        before = len(self.answers)
        wait_until("answers go on", lambda: len(self.answers) >= before + n or self.failures)

    def __enter__(self):
        self.thread.start()
        self.more(2)
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


class Verbs(unittest.TestCase):
    """One pool of two workers that all of these leave as they found it."""

    @classmethod
    def setUpClass(cls):
        cls.pool = Pool(workers=2)
        cls.addClassCleanup(cls.pool.__exit__, None, None, None)
        cls.pool.__enter__()
        wait_until("the functions are there", lambda: "quiver_move" in cls.pool.redis("FUNCTION", "LIST"))

    def want(self, name, **fields):
        pairs = [str(x) for pair in fields.items() for x in pair]
        self.pool.redis("HSET", f"quiver:want:{name}", *pairs)
        self.addCleanup(self.pool.redis, "DEL", f"quiver:want:{name}")

    def call(self, verb, *args):
        return self.pool.redis("FCALL", f"quiver_{verb}", "0", *args)

    def test_a_canary_takes_its_share_and_is_rolled_back_in_one_write(self):
        self.want("v1", path=ADAPTERS / "json", replicas=2)
        self.want("v2", path=ADAPTERS / "emoji", replicas=2)
        self.pool.wait_adapter("v1", "ready", 2)
        self.pool.wait_adapter("v2", "ready", 2)
        self.want("chat", split="v1=1 v2=1")
        self.pool.wait_adapter("chat", "alias")
        self.assertEqual(self.pool.hash("quiver:adapter:chat")["split"], "v1=1 v2=1")
        with self.pool.client() as client:
            jobs = [client.stream(chat(SENTENCE), adapter="chat", **JOB) for _ in range(40)]
            answers = [job.answer() for job in jobs]
            for answer in answers:  # done says which one it was, and it was that one all along
                self.assertEqual(kind(answer.text), {"v1": "json", "v2": "emoji"}[answer.adapter])
            n = sum(a.adapter == "v2" for a in answers)
            self.assertTrue(8 <= n <= 32, n)
            self.assertEqual(self.call("split", "chat", "v1", "1"), "v1=1")
            wait_until("it is rolled back", lambda: self.pool.hash("quiver:adapter:chat").get("split") == "v1=1")
            jobs = [client.stream(chat(SENTENCE), adapter="chat", **JOB) for _ in range(20)]
            self.assertEqual({job.answer().adapter for job in jobs}, {"v1"})

    def test_verbs_check_what_they_are_told(self):
        self.want("json", path=ADAPTERS / "json")
        holder = self.pool.wait_adapter("json", "ready", 1)["workers"][0]
        other = ({"w1", "w2"} - {holder}).pop()
        for args, part in [
            (("move", "none", holder, other), "nobody wants adapter none"),
            (("move", "json", other, holder), "does not hold"),
            (("move", "json", holder, "w9"), "no worker w9"),
            (("drain", "w9"), "no worker or broker w9"),
            (("undrain", "w1"), "nobody asked"),
            (("pin", "json", "7"), "usage"),
            (("replicas", "json", "-1"), "usage"),
            (("split", "json", "none", "1"), "nobody wants adapter none"),
            (("split", "json", "json", "0"), "all weights are 0"),
        ]:
            self.assertIn(part, self.call(*args), args)
        self.assertIn("quiver_move", self.call("help"))

    def test_events_say_who_called_a_verb_and_redis_checks_it(self):
        self.want("json", path=ADAPTERS / "json")
        rights = "~quiver:who:ines ~quiver:want:* ~quiver:drain:* ~quiver:events +fcall +hset +hdel +del +xadd +time"
        self.pool.redis("ACL", "SETUSER", "ines", "on", ">secret", *rights.split(), "(%R~quiver:* +@read)")
        self.addCleanup(self.pool.redis, "ACL", "DELUSER", "ines")

        def call(user, keys, verb, *args):
            who = ["--user", "ines", "--pass", "secret", "--no-auth-warning"] if user == "ines" else []
            return self.pool.redis(*who, "FCALL", f"quiver_{verb}", str(len(keys)), *keys, *args)

        def latest():
            lines = self.pool.redis("XREVRANGE", "quiver:events", "+", "-", "COUNT", "20").splitlines()
            return next(lines[i + 1] for i, line in enumerate(lines) if line == "who" and lines[i + 3] in ("adapter_pinned", "drain_ordered"))

        for user, keys, verb, args, part, who in [
            ("", [], "pin", ("json", "0"), "pin 0", "fcall"),
            ("ines", ["quiver:who:ines"], "pin", ("json", "1"), "pin 1", "ines"),
            ("ines", ["quiver:who:ines"], "drain", ("w1", "new driver"), "draining w1", "ines"),
            ("", ["quiver:who:bob"], "pin", ("json", "0"), "pin 0", "bob"),
            ("ines", ["quiver:who:bob"], "pin", ("json", "1"), "NOPERM", "bob"),
            ("ines", ["quiver:want:json"], "pin", ("json", "1"), "quiver:who:NAME", "bob"),
            ("", ["quiver:who:"], "pin", ("json", "1"), "quiver:who:NAME", "bob"),
            ("", ["quiver:who:a", "quiver:who:b"], "pin", ("json", "1"), "quiver:who:NAME", "bob"),
        ]:
            self.assertIn(part, call(user, keys, verb, *args), (user, keys, verb))
            self.assertEqual(latest(), who, (user, keys, verb))
        self.assertEqual(call("ines", ["quiver:who:ines"], "undrain", "w1"), "not draining w1")

    def test_move_takes_a_replica_to_another_worker_without_a_gap(self):
        self.want("json", path=ADAPTERS / "json", max_replicas=1)
        holder = self.pool.wait_adapter("json", "ready", 1)["workers"][0]
        other = ({"w1", "w2"} - {holder}).pop()
        with Traffic(self.pool, "json") as traffic:
            self.assertEqual(self.call("move", "json", holder, other), f"workers {other}")
            wait_until("it moved", lambda: self.pool.adapter("json")["workers"] == [other])
            traffic.more()
        self.assertEqual(traffic.failures, [])
        self.assertEqual({kind(a.text) for a in traffic.answers}, {"json"})
        self.assertIn("adapter_moved", self.pool.redis("XRANGE", "quiver:events", "-", "+"))

    def test_a_drained_worker_gets_nothing_and_comes_back(self):
        self.want("json", path=ADAPTERS / "json", replicas=1)
        holder = self.pool.wait_adapter("json", "ready", 1)["workers"][0]
        other = ({"w1", "w2"} - {holder}).pop()
        with Traffic(self.pool, "json") as traffic:
            self.call("drain", holder, "a test")
            self.pool.wait_worker(holder, "draining")
            wait_until(
                "nothing runs on it",
                lambda: f"worker\n{holder}" in self.pool.redis("XREVRANGE", "quiver:events", "+", "-", "COUNT", "40")
                and "worker_drained" in self.pool.redis("XREVRANGE", "quiver:events", "+", "-", "COUNT", "40"),
            )
            traffic.more()
            self.assertEqual(traffic.answers[-1].worker, other)
        self.assertEqual(traffic.failures, [])
        self.call("undrain", holder)
        self.pool.wait_worker(holder, "ready")

    def test_pin_and_replicas_act(self):
        self.want("json", path=ADAPTERS / "json")
        self.pool.wait_adapter("json", "ready", 1)
        self.assertEqual(self.call("pin", "json"), "pin 1")
        self.assertEqual(self.call("replicas", "json", "2"), "replicas 2 max_replicas 0")
        self.assertTrue(self.pool.wait_adapter("json", "ready", 2)["pin"])

    def test_an_adapter_may_be_for_some_tenants_only_and_tenants_have_limits(self):
        self.want("json", path=ADAPTERS / "json", tenants="acme, zeta")
        self.pool.wait_adapter("json", "ready", 1)
        self.addCleanup(self.pool.redis, "DEL", "quiver:tenant:acme")
        with self.pool.client() as client:
            with self.assertRaises(QuiverError) as caught:
                client.generate(chat(SENTENCE), adapter="json", **JOB)
            self.assertEqual(caught.exception.code, "UNAUTHORIZED")
            self.assertEqual(kind(client.generate(chat(SENTENCE), adapter="json", tenant="acme", **JOB).text), "json")
            self.pool.redis("HSET", "quiver:tenant:acme", "weight", "none")
            wait_until("it is refused", lambda: "tenant_invalid" in self.pool.redis("XRANGE", "quiver:events", "-", "+"))
            self.pool.redis("HSET", "quiver:tenant:acme", "weight", "2", "max_running", "1", "max_queued", "1")
            slow = dict(JOB, max_tokens=2000, ignore_eos=True, tenant="acme")

            def is_limited():
                streams = [client.stream(chat(SENTENCE), **slow) for _ in range(3)]
                limited = False
                for stream in streams[2:]:
                    try:
                        next(stream)
                    except QuiverError as error:
                        limited = error.code == "OVERLOADED" and "'acme'" in error.message
                for stream in streams[: 2 if limited else 3]:
                    stream.cancel()
                    stream.answer()
                return limited

            wait_until("the limit holds", is_limited)

    def test_explain_tells_where_a_request_went(self):
        with self.pool.client() as client:
            answer = client.generate(chat(SENTENCE), request_id="why-1", tenant="acme", **JOB)
            told = client.explain("why-1")
            self.assertEqual((told["state"], told["tenant"]), ("done", "acme"))
            self.assertEqual(told["attempts"][-1]["worker"], answer.worker)
            self.assertIn(answer.worker, [c["worker"] for c in told["decisions"][-1]["candidates"]])
            with self.assertRaises(QuiverError):
                client.explain("never-seen")
        printed = quiver(self.pool, "explain", "why-1")
        self.assertEqual(printed.returncode, 0, printed.stderr)
        self.assertIn(answer.worker, printed.stdout)


class Changes(unittest.TestCase):
    def test_a_swap_under_traffic_mixes_no_answers(self):
        adapters = {"style": ADAPTERS / "json"}
        with Pool(workers=2, adapters=adapters) as pool:
            with Traffic(pool, "style") as one, Traffic(pool, "style") as two:
                for name in ("emoji", "json", "emoji"):
                    digest = pool.hash("quiver:adapter:style")["digest"]
                    pool.redis("HSET", "quiver:want:style", "path", str(ADAPTERS / name))
                    wait_until("it is another one", lambda: pool.hash("quiver:adapter:style").get("digest") not in (digest, None))
                    one.more(3), two.more(3)
            self.assertEqual(one.failures + two.failures, [])
            for answers in (one.answers, two.answers):
                kinds = [kind(a.text) for a in answers]
                self.assertEqual(set(kinds), {"json", "emoji"})
                switches = sum(a != b for a, b in zip(kinds, kinds[1:]))
                self.assertEqual(switches, 3, kinds)

    def test_a_worker_that_joins_gets_adapters_and_traffic_within_seconds(self):
        with Pool(workers=1) as pool:
            names = [f"a{i}" for i in range(6)]
            for name in names:
                pool.redis("HSET", f"quiver:want:{name}", "path", str(ADAPTERS / "json"))
            for name in names:
                pool.wait_adapter(name, "ready", 1)
            pool.start_worker("w2")
            moved = wait_until(
                "some adapters moved",
                lambda: [a["name"] for a in pool.status()["adapters"] if a["workers"] == ["w2"]],
                seconds=20,
            )
            with pool.client() as client:
                self.assertEqual(client.generate(chat(SENTENCE), adapter=moved[0], **JOB).worker, "w2")

    def test_a_failed_load_is_explained_and_left_alone_for_a_while(self):
        with Pool(workers=1, adapters=demo_adapters("json"), broker_args=["--load-backoff", "1s"]) as pool:
            bad = pool.dir / "bad"
            bad.mkdir()
            pool.redis("HSET", "quiver:want:bad", "path", str(bad))
            reason = wait_until("it failed", lambda: pool.hash("quiver:adapter:bad").get("reason"))
            self.assertIn(str(bad), reason)

            def n_tries():
                return pool.redis("XRANGE", "quiver:events", "-", "+").count("adapter_load_failed")

            with Traffic(pool, "json") as traffic:
                wait_until("it was tried again", lambda: n_tries() >= 2)
                self.assertLessEqual(n_tries(), 3)  # 1 s, then 2 s, then 4 s
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    (bad / name).write_bytes((ADAPTERS / "json" / name).read_bytes())
                pool.wait_adapter("bad", "ready", 1)
            self.assertEqual(traffic.failures, [])


if __name__ == "__main__":
    unittest.main(verbosity=2)
