"""Workers whose model is split over ranks, as real processes."""

import unittest

from pool import Pool, chat, demo_adapters, wait_until

SENTENCE = "Ines carried two black shoes at the station on Tuesday."


class Ranks(unittest.TestCase):
    def test_a_split_worker_answers_as_a_whole_one_does(self):
        adapters = demo_adapters("json", "french", "emoji")
        answers = []
        for args in ([], ["--tp", "2"]):
            with Pool(workers=1, adapters=adapters, worker_args=args) as pool, pool.client() as client:
                answers.append(
                    [
                        client.generate(chat(SENTENCE), adapter=name, temperature=0, max_tokens=40).text
                        for name in ("", *adapters)
                    ]
                )
        self.assertEqual(*answers)

    def test_a_worker_that_loses_a_rank_says_why_and_its_stream_goes_on_elsewhere(self):
        with Pool(workers=0) as pool, pool.client(timeout=60) as client:
            pool.start_worker("split", "--tp", "2", "--break-rank", "1@30")
            stream = client.stream(chat(SENTENCE), temperature=0, max_tokens=200, ignore_eos=True)
            wait_until("the split worker has ended", lambda: not pool.alive("split"), 20)
            self.assertNotEqual(pool.processes["split"].returncode, 0)
            reason = "rank 1: told to fail at step 30"
            self.assertIn(reason, pool.log("split"))
            wait_until("the broker knows why", lambda: reason in pool.log("broker"), 10)
            pool.start_worker("whole")
            answer = stream.answer()
        self.assertEqual(len(answer.tokens), 200)
        self.assertEqual(answer.worker, "whole")

    def test_a_split_worker_says_what_each_rank_takes(self):
        with Pool(workers=0) as pool:
            pool.start_worker("split", "--tp", "2")
            log = pool.log("split")
        for rank in range(2):
            self.assertRegex(
                log,
                rf"memory plan of rank {rank}: [\d.]+ MiB = weights [\d.]+ \+ KV [\d.]+ \+ state [\d.]+"
                r" \+ adapters [\d.]+ \+ activations [\d.]+",
            )
        self.assertNotIn("rank 2", log)

    def test_a_split_that_the_model_does_not_allow_is_refused_by_name(self):
        for args, reason in (
            (("--tp", "3"), "cannot be shared out among 3 ranks"),
            (("--tp", "2", "--ep", "2"), "the model has no experts"),
            (("--tp", "4", "--ep", "3"), "ep = 3 does not divide tp = 4"),
            (("--tp", "2", "--devices", "0"), 'devices "0" names 1 for tp = 2'),
            (("--tp", "1", "--devices", "0,1"), 'devices "0,1" names more devices than tp = 1'),
            (("--tp", "1", "--devices", "first"), 'devices "first" is not a list'),
        ):
            with self.subTest(args=args), Pool(workers=0) as pool:
                pool.start_worker("w", *args, wait=False)
                self.assertNotEqual(pool.processes["w"].wait(20), 0)
                self.assertIn(reason, pool.log("w"))
