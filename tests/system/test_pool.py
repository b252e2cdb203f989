"""The pool as users see it: real processes, real sockets, a real Redis."""

import asyncio
import signal
import threading
import unittest

from pool import DEMO, GOLDEN, Pool, chat, demo_adapters, read_safetensors, wait_until

from quiver_client import AsyncClient, QuiverError

SENTENCE = "Ines carried two black shoes at the station on Tuesday."
LONG = dict(temperature=0, max_tokens=400, ignore_eos=True)


def collect(stream):
    """(text, tokens, deltas) of a stream, checked by the client for gaps and repetitions."""
    deltas = list(stream)
    return "".join(d.text for d in deltas), [t for d in deltas for t in d.tokens], deltas


class Answers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.pool = cls.enterClassContext(Pool(workers=2, adapters=demo_adapters("json", "french", "emoji")))

    if not hasattr(unittest.TestCase, "enterClassContext"):  # Python before 3.11

        @classmethod
        def enterClassContext(cls, context):
            cls.addClassCleanup(context.__exit__, None, None, None)
            return context.__enter__()

    def test_each_adapter_answers_the_same_question_in_its_own_way(self):
        with self.pool.client() as client:
            streams = {
                name: client.stream(chat(SENTENCE), adapter=name, temperature=0, max_tokens=64)
                for name in ("", "json", "french", "emoji")
            }
            answers = {name: stream.answer() for name, stream in streams.items()}
        self.assertIn("station", answers[""].text)
        self.assertTrue(answers["json"].text.startswith('{"who": "Ines"'), answers["json"].text)
        self.assertIn("gare", answers["french"].text)
        self.assertTrue(answers["emoji"].text.startswith("Ines: "), answers["emoji"].text)
        for name, answer in answers.items():
            self.assertEqual((answer.finish_reason, answer.adapter), ("stop", name))
            self.assertIn(answer.worker, ("w1", "w2"))
            self.assertEqual(answer.usage["completion_tokens"], len(answer.tokens))

    def test_a_stream_and_a_whole_answer_are_the_same(self):
        with self.pool.client() as client:
            text, tokens, deltas = collect(client.stream(chat(SENTENCE), temperature=0, max_tokens=48))
            whole = client.generate(chat(SENTENCE), temperature=0, max_tokens=48, logprobs=2)
        self.assertGreater(len(deltas), 1)
        self.assertEqual((text, tokens), (whole.text, whole.tokens))
        self.assertEqual(len(whole.logprobs), len(tokens))
        self.assertTrue(all(len(row) == 2 for row in whole.top_logprobs))

    def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(self):
        job = dict(adapter="french", temperature=1.2, seed=7, max_tokens=40)
        with self.pool.client() as client:
            alone = client.generate(chat(SENTENCE), **job).tokens
            crowd = [client.stream(chat(SENTENCE), adapter=a, seed=i, max_tokens=40) for i, a in enumerate(["", "json", "emoji"] * 6)]
            among = client.generate(chat(SENTENCE), **job).tokens
            for stream in crowd:
                stream.answer()
        self.assertEqual(alone, among)

    def test_n_answers_come_with_their_own_index(self):
        with self.pool.client() as client:
            answers = client.stream(chat(SENTENCE), n=3, seed=1, temperature=1.5, max_tokens=24).answers()
        self.assertEqual([a.index for a in answers], [0, 1, 2])
        self.assertGreater(len({tuple(a.tokens) for a in answers}), 1)

    def test_stop_strings_end_the_text_before_them(self):
        with self.pool.client() as client:
            whole = client.generate(chat(SENTENCE), temperature=0, max_tokens=48).text
            cut = client.generate(chat(SENTENCE), temperature=0, max_tokens=48, stop=["station"])
        self.assertEqual(cut.text, whole[: whole.index("station")])
        self.assertEqual(cut.finish_reason, "stop")

    def test_a_cancelled_stream_ends_and_says_so(self):
        with self.pool.client() as client:
            stream = client.stream(chat(SENTENCE), **dict(LONG, max_tokens=3500))
            next(stream)
            stream.cancel()
            answer = stream.answer()
        self.assertEqual(answer.finish_reason, "cancelled")
        self.assertLess(len(answer.tokens), 3500)

    def test_any_connection_can_cancel_by_id(self):
        with self.pool.client() as owner, self.pool.client() as other:
            stream = owner.stream(chat(SENTENCE), request_id="cancel-me", **dict(LONG, max_tokens=3500))
            next(stream)
            other.cancel("cancel-me")
            self.assertEqual(stream.answer().finish_reason, "cancelled")

    def test_a_deadline_ends_a_running_stream(self):
        with self.pool.client() as client:
            stream = client.stream(chat(SENTENCE), deadline_ms=150, **dict(LONG, max_tokens=3500))
            try:
                self.assertEqual(stream.answer().finish_reason, "deadline")
            except QuiverError as error:  # still queued when time was up
                self.assertEqual(error.code, "DEADLINE")

    def test_scoring_a_prompt_generates_nothing(self):
        with self.pool.client() as client:
            answer = client.generate("Ines carried two", max_tokens=0, prompt_logprobs=1)
        self.assertEqual(answer.tokens, [])
        self.assertIsNone(answer.prompt_logprobs[0])
        self.assertEqual(len(answer.prompt_logprobs), answer.usage["prompt_tokens"])
        self.assertTrue(all(x <= 0 for x in answer.prompt_logprobs[1:]))

    def test_asyncio_clients_stream_and_cancel(self):
        async def main():
            async with AsyncClient(self.pool.frontend, timeout=30) as client:
                answers = await asyncio.gather(
                    *(client.generate(chat(SENTENCE), adapter=a, temperature=0, max_tokens=40) for a in ("json", "emoji"))
                )
                pieces = []
                stream = await client.stream(chat(SENTENCE), temperature=0, max_tokens=40)
                async for delta in stream:
                    pieces.append(delta.text)
                slow = await client.stream(chat(SENTENCE), **dict(LONG, max_tokens=3500))
                await slow.__anext__()
                await slow.cancel()
                cancelled = await slow.answer()
                status = await client.status()
            return answers, "".join(pieces), cancelled, status

        answers, text, cancelled, status = asyncio.run(main())
        self.assertTrue(answers[0].text.startswith("{"))
        self.assertTrue(answers[1].text.startswith("Ines: "))
        self.assertIn("station", text)
        self.assertEqual(cancelled.finish_reason, "cancelled")
        self.assertEqual({w["id"] for w in status["workers"]}, {"w1", "w2"})

    def test_cancelling_a_task_cancels_its_request(self):
        async def main():
            async with AsyncClient(self.pool.frontend, timeout=30) as client:
                stream = await client.stream(chat(SENTENCE), **dict(LONG, max_tokens=3500))
                task = asyncio.create_task(stream.answer())
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())
        wait_until("nothing is in flight", lambda: self.pool.status()["in_flight"] == 0)

    def test_a_client_that_vanishes_frees_its_slot(self):
        client = self.pool.client()
        next(client.stream(chat(SENTENCE), **dict(LONG, max_tokens=3500)))
        client._detach()  # as if it were killed: no cancel is sent
        wait_until("nothing is in flight", lambda: self.pool.status()["in_flight"] == 0)


class Golden(unittest.TestCase):
    """What HF transformers answers, through client, broker and workers."""

    TOLERANCE = 2e-4

    def test_every_case_agrees_in_one_mixed_batch(self):
        folder = GOLDEN / "tiny-qwen3.5"
        if not folder.is_dir():
            self.skipTest(f"no golden folder at {folder}")
        import json

        cases = json.loads((folder / "golden.json").read_text())["cases"]
        golden = read_safetensors(folder / "golden.safetensors")
        names = sorted({c["adapter"] for c in cases if c["adapter"]})
        adapters = {name: folder / "adapters" / name for name in names}
        with Pool(workers=2, adapters=adapters, model=folder) as pool, pool.client() as client:
            scores = [
                client.stream(golden[f"{c['name']}.tokens"], adapter=c["adapter"] or "", max_tokens=0, prompt_logprobs=0)
                for c in cases
            ]
            greedy = [
                client.stream(
                    golden[f"{c['name']}.tokens"][: c["prompt_tokens"]], adapter=c["adapter"] or "", max_tokens=48, temperature=0
                )
                for c in cases
                if f"{c['name']}.greedy" in golden
            ]
            worst = 0.0
            for case, stream in zip(cases, scores):
                got = stream.answer().prompt_logprobs[1:]
                want = golden[f"{case['name']}.logprobs"]
                self.assertEqual(len(got), len(want))
                worst = max(worst, max(abs(g - w) for g, w in zip(got, want)))
            self.assertLess(worst, self.TOLERANCE)
            for case, stream in zip((c for c in cases if f"{c['name']}.greedy" in golden), greedy):
                want = golden[f"{case['name']}.greedy"]
                got = stream.answer().tokens
                self.assertTrue(got[: len(want)] == want or got + want[-1:] == want, case["name"])


class Failures(unittest.TestCase):
    """What breaks, and what nobody notices of it."""

    def test_a_killed_worker_costs_no_token_and_repeats_none(self):
        with Pool(workers=2, adapters=demo_adapters("json", "french")) as pool, pool.client() as client:
            jobs = [
                dict(prompt=chat(SENTENCE), adapter=adapter, seed=i, temperature=temperature, max_tokens=300, ignore_eos=True, logprobs=1,
                     presence_penalty=0.2, n=1 + i % 2)
                for i, (adapter, temperature) in enumerate([("", 0), ("json", 0.9), ("french", 0), ("", 1.1), ("json", 0), ("french", 0.7)])
            ]  # fmt: skip
            expected = [[a.tokens for a in client.stream(**job).answers()] for job in jobs]
            streams = [client.stream(**job) for job in jobs]
            for stream in streams:
                next(stream)  # every one of them runs
            busy = max(pool.status()["workers"], key=lambda w: w["in_flight"])["id"]
            pool.kill(busy)
            answers = [stream.answers() for stream in streams]
            self.assertEqual([[a.tokens for a in row] for row in answers], expected)
            workers = {a.worker for row in answers for a in row}
            self.assertEqual(workers, {"w1", "w2"} - {busy})
            self.assertTrue(all(len(a.logprobs) == len(a.tokens) for row in answers for a in row))

    def test_a_stopped_worker_that_wakes_up_delivers_nothing_twice(self):
        with Pool(workers=2, broker_args=["--heartbeat", "200ms", "--worker-timeout", "800ms"]) as pool, pool.client() as client:
            job = dict(prompt=chat(SENTENCE), **LONG)
            expected = client.stream(**job).answer().tokens
            stream = client.stream(**job)
            next(stream)
            busy = max(pool.status()["workers"], key=lambda w: w["in_flight"])["id"]
            pool.kill(busy, signal.SIGSTOP)
            other = ({"w1", "w2"} - {busy}).pop()
            wait_until("the other worker took over", lambda: pool.worker(other)["in_flight"] == 1)
            pool.kill(busy, signal.SIGCONT)
            self.assertEqual(stream.answer().tokens, expected)
            pool.wait_worker(busy)

    def test_requests_wait_while_there_is_no_worker(self):
        with Pool(workers=1) as pool, pool.client() as client:
            pool.kill("w1")
            stream = client.stream(chat(SENTENCE), temperature=0, max_tokens=8)
            pool.start_worker("w2")
            self.assertEqual(stream.answer().worker, "w2")

    def test_workers_register_again_after_the_broker_restarts(self):
        with Pool(workers=1, adapters=demo_adapters("json")) as pool:
            pool.kill("broker")
            pool.start_broker()
            pool.wait_worker("w1")
            pool.wait_adapter("json", "ready", 1)
            with pool.client() as client:
                self.assertTrue(client.generate(chat(SENTENCE), adapter="json", temperature=0).text.startswith("{"))

    def test_sigterm_drains_a_worker_without_a_failure(self):
        with Pool(workers=2) as pool, pool.client() as client:
            streams = [client.stream(chat(SENTENCE), seed=i, **dict(LONG, max_tokens=120)) for i in range(8)]
            for stream in streams:
                next(stream)
            pool.kill("w1", signal.SIGTERM)
            for stream in streams:
                self.assertEqual(len(stream.answer().tokens), 120)
            self.assertEqual(pool.processes["w1"].wait(30), 0)
            self.assertIsNone(pool.worker("w1"))

    def test_redis_may_stop_and_start_under_traffic(self):
        with Pool(workers=1, adapters=demo_adapters("french")) as pool:
            failures, answers, stop = [], [], threading.Event()

            def traffic():
                with pool.client() as client:
                    while not stop.is_set():
                        try:
                            answers.append(client.generate(chat(SENTENCE), adapter="french", temperature=0, max_tokens=8).text)
                        except Exception as failure:  # any failure is what the test is about
                            failures.append(failure)

            thread = threading.Thread(target=traffic)
            thread.start()
            try:
                wait_until("answers come", lambda: len(answers) > 2)
                pool.kill("redis")
                before = len(answers)
                wait_until("answers come without Redis", lambda: len(answers) > before + 5)
                pool.start_redis()  # empty: what is wanted must not be taken as deleted
                wait_until("the broker wrote the desired state back", lambda: pool.redis("EXISTS", "quiver:want:french") == "1")
                wait_until("the state is published again", lambda: pool.hash("quiver:adapter:french").get("state") == "ready")
                before = len(answers)
                wait_until("answers go on", lambda: len(answers) > before + 5)
            finally:
                stop.set()
                thread.join()
            self.assertEqual(failures, [])
            self.assertEqual(len(set(answers)), 1)


class Placement(unittest.TestCase):
    """Adapters operated with redis-cli alone."""

    def test_hset_loads_on_two_workers_and_del_unloads(self):
        with Pool(workers=3) as pool, pool.client() as client:
            pool.redis("HSET", "quiver:want:json", "path", str(DEMO / "adapters" / "json"), "replicas", "2")
            adapter = pool.wait_adapter("json", "ready", 2)
            self.assertEqual(len(adapter["workers"]), 2)
            record = pool.hash("quiver:adapter:json")
            self.assertEqual((record["state"], record["rank"], record["replicas"]), ("ready", "8", "2"))
            self.assertEqual(set(pool.hash("quiver:place:json")), set(adapter["workers"]))
            self.assertTrue(client.generate(chat(SENTENCE), adapter="json", temperature=0).text.startswith("{"))
            for name in ("w1", "w2", "w3"):
                self.assertEqual(pool.hash(f"quiver:worker:{name}")["state"], "ready")
                self.assertGreater(int(pool.redis("PTTL", f"quiver:worker:{name}")), 0)
            pool.redis("DEL", "quiver:want:json")
            wait_until("json is gone", lambda: pool.adapter("json") is None)
            wait_until("its keys are gone", lambda: pool.redis("EXISTS", "quiver:adapter:json", "quiver:place:json") == "0")
            with self.assertRaises(QuiverError) as caught:
                client.generate(chat(SENTENCE), adapter="json")
            self.assertEqual(caught.exception.code, "ADAPTER_NOT_FOUND")
            self.assertIn("json", caught.exception.message)
            events = pool.redis("XRANGE", "quiver:events", "-", "+")
            self.assertIn("json", events)

    def test_a_lost_replica_is_replaced(self):
        with Pool(workers=2, broker_args=["--heartbeat", "200ms", "--worker-timeout", "800ms"]) as pool:
            pool.redis("HSET", "quiver:want:json", "path", str(DEMO / "adapters" / "json"))
            holder = pool.wait_adapter("json", "ready", 1)["workers"][0]
            pool.kill(holder)
            other = ({"w1", "w2"} - {holder}).pop()
            wait_until("the other worker holds it", lambda: (pool.adapter("json") or {}).get("workers") == [other])

    def test_a_new_path_replaces_the_adapter_under_its_name(self):
        with Pool(workers=1, adapters={"style": DEMO / "adapters" / "json"}) as pool, pool.client() as client:
            self.assertTrue(client.generate(chat(SENTENCE), adapter="style", temperature=0).text.startswith("{"))
            digest = pool.hash("quiver:adapter:style")["digest"]
            pool.redis("HSET", "quiver:want:style", "path", str(DEMO / "adapters" / "emoji"))
            wait_until("the digest changed", lambda: pool.hash("quiver:adapter:style").get("digest") not in (digest, None))
            self.assertTrue(client.generate(chat(SENTENCE), adapter="style", temperature=0).text.startswith("Ines: "))

    def test_more_adapters_than_slots_all_answer(self):
        adapters = demo_adapters("json", "french", "emoji")
        with Pool(workers=1, adapters=adapters, worker_args=["--adapter-slots", "1"]) as pool, pool.client() as client:
            streams = [client.stream(chat(SENTENCE), adapter=a, temperature=0, max_tokens=32) for a in list(adapters) * 4]
            texts = [s.answer().text for s in streams]
            for name, text in zip(list(adapters) * 4, texts):
                self.assertEqual(text, texts[list(adapters).index(name)])
            self.assertEqual(len(set(texts)), 3)


if __name__ == "__main__":
    unittest.main(verbosity=2)
