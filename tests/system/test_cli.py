"""The `quiver` command against a running pool."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import threading
import unittest

from pool import BIN, BUILD, DEMO, SOURCE, Pool, demo_adapters, free_port, quiver, wait_until

SENTENCE = "Ines carried two black shoes at the station on Tuesday."


class Cli(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.pool = Pool(workers=2, adapters=demo_adapters("json", "french"))
        cls.pool.__enter__()
        cls.addClassCleanup(cls.pool.__exit__, None, None, None)

    def test_submit_prints_the_answer_of_the_adapter(self):
        result = quiver(self.pool, "submit", "-a", "json", "--temperature", 0, SENTENCE)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(json.loads(result.stdout)["who"], "Ines")

    def test_a_prompt_comes_from_arguments_a_file_or_stdin(self):
        path = pathlib.Path(self.pool.dir) / "prompt.txt"
        path.write_text(SENTENCE)
        fixed = ("submit", "-a", "french", "--temperature", 0)
        results = [
            quiver(self.pool, *fixed, SENTENCE),
            quiver(self.pool, *fixed, "--file", path),
            quiver(self.pool, *fixed, stdin=SENTENCE),
            quiver(self.pool, *fixed, "--whole", SENTENCE),
        ]
        self.assertEqual({r.returncode for r in results}, {0}, results)
        self.assertEqual(len({r.stdout for r in results}), 1, results)
        self.assertIn("gare", results[0].stdout)

    def test_jobs_from_a_file_run_at_once_and_each_has_its_line(self):
        jobs = pathlib.Path(self.pool.dir) / "jobs.jsonl"
        rows = [
            {"id": f"j{i}", "adapter": a, "messages": [{"role": "user", "content": SENTENCE}], "temperature": 0}
            for i, a in enumerate(["", "json", "french"])
        ]
        jobs.write_text("".join(json.dumps(r) + "\n" for r in rows))
        result = quiver(self.pool, "submit", "--jobs", jobs)
        self.assertEqual(result.returncode, 0, result.stderr)
        lines = {line.split()[1]: line for line in result.stdout.splitlines()}
        self.assertEqual(set(lines), {"j0", "j1", "j2"})
        self.assertIn('{"who": "Ines"', lines["j1"])

    def test_json_output_has_every_message(self):
        result = quiver(self.pool, "submit", "--json", "--temperature", 0, "--logprobs", 2, SENTENCE)
        messages = [json.loads(line) for line in result.stdout.splitlines()]
        self.assertEqual([m["type"] for m in messages][0], "accepted")
        self.assertEqual(messages[-1]["type"], "done")
        seqs = [m["seq"] for m in messages[1:]]
        self.assertEqual(seqs, list(range(len(seqs))))
        self.assertTrue(all(len(m["logprobs"]) == len(m["tokens"]) for m in messages[1:-1]))

    def test_errors_name_what_was_wrong_and_fail(self):
        for args, code, word in [
            (("submit", "-a", "nobody", "hi"), 1, "nobody"),
            (("submit", "--temperature", "hot", "hi"), 2, "hot"),
            (("submit", "--no-such-option", "hi"), 2, "no-such-option"),
            (("submit", "--file", "/nowhere/prompt", ), 2, "/nowhere/prompt"),
            (("submit", "--jobs", "/nowhere/jobs"), 2, "/nowhere/jobs"),
            (("cancel", "never-heard-of"), 1, "never-heard-of"),
            (("adapters", "destroy"), 2, "list"),
        ]:  # fmt: skip
            with self.subTest(args=args):
                result = quiver(self.pool, *args)
                self.assertEqual(result.returncode, code, result)
                self.assertIn(word, result.stderr)

    def test_no_broker_is_said_with_its_endpoint(self):
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        result = subprocess.run([BIN / "quiver", "status", "--broker", endpoint, "--timeout", "1s"], capture_output=True, text=True)
        self.assertEqual(result.returncode, 1)
        self.assertIn(endpoint, result.stderr)

    def test_status_is_a_table_and_json(self):
        text = quiver(self.pool, "status").stdout
        for word in ("w1", "w2", "json", "french", "ready", "WORKER", "ADAPTER"):
            self.assertIn(word, text)
        status = json.loads(quiver(self.pool, "status", "--json").stdout)
        self.assertEqual({w["id"] for w in status["workers"]}, {"w1", "w2"})

    def test_adapters_are_added_listed_and_removed(self):
        url = self.pool.redis_url
        added = quiver(self.pool, "adapters", "add", "emoji", DEMO / "adapters" / "emoji", "--replicas", 2, "--redis", url)
        self.assertEqual(added.returncode, 0, added.stderr)
        self.assertIn("ready", added.stdout)
        self.assertEqual(self.pool.hash("quiver:want:emoji")["replicas"], "2")
        self.assertIn("emoji", quiver(self.pool, "adapters", "list").stdout)
        bad = quiver(self.pool, "adapters", "add", "bad", "/nowhere", "--redis", url)
        self.assertEqual(bad.returncode, 1)
        self.assertIn("/nowhere", bad.stderr)
        for name in ("emoji", "bad"):
            removed = quiver(self.pool, "adapters", "remove", name, "--redis", url)
            self.assertEqual(removed.returncode, 0, removed.stderr)
        self.assertEqual(quiver(self.pool, "adapters", "remove", "emoji", "--redis", url).returncode, 1)

    def test_cancel_stops_a_request_of_another_process(self):
        command = [BIN / "quiver", "submit", "--broker", self.pool.frontend, "--id", "long", "--max-tokens", "3900", "--ignore-eos", SENTENCE]
        with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            wait_until("it runs", lambda: self.pool.status()["in_flight"] == 1)
            cancelled = quiver(self.pool, "cancel", "long")
            self.assertEqual(cancelled.returncode, 0, cancelled.stderr)
            process.communicate(timeout=30)
        wait_until("nothing is in flight", lambda: self.pool.status()["in_flight"] == 0)

    def test_ctrl_c_cancels_what_is_in_flight(self):
        command = [BIN / "quiver", "submit", "--broker", self.pool.frontend, "--max-tokens", "3900", "--ignore-eos", SENTENCE]
        with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.read(1)  # the answer has begun
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
            self.assertEqual(process.returncode, 130)
        wait_until("nothing is in flight", lambda: self.pool.status()["in_flight"] == 0)

    def test_help_describes_every_command(self):
        usage = subprocess.run([BIN / "quiver", "--help"], capture_output=True, text=True)
        self.assertEqual(usage.returncode, 0)
        for command in ("submit", "cancel", "status", "adapters"):
            self.assertIn(command, usage.stdout)
            text = subprocess.run([BIN / "quiver", command, "--help"], capture_output=True, text=True)
            self.assertEqual(text.returncode, 0)
            self.assertIn("--broker", text.stdout)
        for program in ("quiver-broker", "quiver-worker", "quiver-run"):
            text = subprocess.run([BIN / program, "--help"], capture_output=True, text=True)
            self.assertEqual((program, text.returncode), (program, 0))
            self.assertIn("QUIVER_", text.stdout)


class Up(unittest.TestCase):
    def test_up_brings_a_pool_up_answers_and_stops(self):
        ports = [str(free_port(n)) for n in (2, 1, 3)]  # each is the first of as many
        result = subprocess.run(
            [SOURCE / "tools" / "up.sh", "--once", "--no-build", "--build", BUILD, "--broker-port", ports[0],
             "--redis-port", ports[1], "--metrics-port", ports[2]],
            capture_output=True, text=True, timeout=180, env={**os.environ, "TMPDIR": "/tmp"},
        )  # fmt: skip
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertIn('{"who": "Ines"', result.stdout)
        self.assertIn("Ines: ", result.stdout)
        self.assertIn("gare", result.stdout)

    def test_up_shares_ranks_out_and_says_to_whom(self):
        ports = [str(free_port(n)) for n in (2, 1, 5)]
        result = subprocess.run(
            [SOURCE / "tools" / "up.sh", "--once", "--no-build", "--build", BUILD, "--broker-port", ports[0],
             "--redis-port", ports[1], "--metrics-port", ports[2], "--workers", "4", "--tp", "2", "--replicas", "1"],
            capture_output=True, text=True, timeout=240, env={**os.environ, "TMPDIR": "/tmp"},
        )  # fmt: skip
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        for worker in range(1, 5):
            self.assertRegex(result.stdout, rf"worker-{worker}: ranks 0 to 1 on the CPU, \d+ thread")
            self.assertIn(f"worker-{worker} is up on 2 ranks: cpu", result.stdout)
        self.assertIn('{"who": "Ines"', result.stdout)

    def test_up_goes_on_without_a_killed_worker_and_names_it(self):
        ports = [free_port(n) for n in (2, 1, 3)]
        up = subprocess.Popen(
            [SOURCE / "tools" / "up.sh", "--no-build", "--build", BUILD, "--broker-port", str(ports[0]),
             "--redis-port", str(ports[1]), "--metrics-port", str(ports[2]), "--no-jobs"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "TMPDIR": "/tmp"},
        )  # fmt: skip
        self.addCleanup(up.stdout.close)
        self.addCleanup(up.kill)
        watchdog = threading.Timer(180, up.kill)
        watchdog.start()
        self.addCleanup(watchdog.cancel)

        def read_until(text):
            for line in up.stdout:
                if text in line:
                    return line
            self.fail(f"up.sh ended without '{text}'")

        def kill_worker(number):
            ours = {f"worker-{number}", f"tcp://127.0.0.1:{ports[0] + 1}"}
            for process in pathlib.Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if ours <= set((process / "cmdline").read_text().split("\0")):
                        return os.kill(int(process.name), signal.SIGKILL)
            self.fail(f"there is no worker-{number}")

        read_until("Ctrl-C stops everything")
        kill_worker(1)
        self.assertIn("worker-1 was ended by signal 9", read_until("up.sh: "))
        answer = subprocess.run(
            [BIN / "quiver", "submit", "--broker", f"tcp://127.0.0.1:{ports[0]}", "-a", "json", "--temperature", "0", SENTENCE],
            capture_output=True, text=True,
        )  # fmt: skip
        self.assertIn('{"who": "Ines"', answer.stdout, answer.stderr)
        kill_worker(2)
        self.assertIn("worker-2 was ended by signal 9, the last worker", read_until("up.sh: "))
        read_until("--- worker-1.log")
        up.stdout.read()
        self.assertEqual(up.wait(), 1)

    def test_up_names_a_model_or_jobs_that_are_not_there_before_it_starts_anything(self):
        for option in "--model", "--jobs":
            result = subprocess.run([SOURCE / "tools" / "up.sh", option, "/nowhere"], capture_output=True, text=True, timeout=30)
            self.assertEqual(result.returncode, 2)
            self.assertEqual(result.stdout, "")
            self.assertIn(f"{option} /nowhere", result.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
