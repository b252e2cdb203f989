"""Streams under faults, and what came of them: what was acknowledged, lost and delivered twice (0 and 0), and how long
the longest wait for the next token was."""

import json
import subprocess
import sys
import time

from pool import SOURCE, chat

SENTENCE = "Ines carried two black shoes at the station on Tuesday."
FAST = ["--heartbeat", "200ms", "--worker-timeout", "800ms"]


def job(i=0, **more):
    return {**dict(prompt=chat(SENTENCE), seed=i, temperature=0.8, max_tokens=400, ignore_eos=True), **more}


class Report:
    """Follows streams and counts what came of them against what was expected."""

    def __init__(self, name):
        self.name, self.acknowledged, self.lost, self.duplicated, self.gap = name, 0, 0, 0, 0.0

    def expect(self, client, jobs):
        return [[a.tokens for a in client.stream(**{**j, "durable": None, "request_id": None}).answers()] for j in jobs]

    def finish(self, streams, expected):
        """Follow streams of one client to their ends, all at once."""
        now = time.monotonic()
        last = [now if any(a.tokens for a in s._request.answers) else None for s in streams]  # one that waits has no next token
        open_ones = set(range(len(streams)))
        while open_ones:
            for i in list(open_ones):
                if streams[i]._deltas:
                    streams[i]._deltas.clear()
                    now = time.monotonic()
                    self.gap, last[i] = max(self.gap, now - (last[i] or now)), now
                if streams[i]._request.finished:
                    open_ones.remove(i)
                    if streams[i]._request.error:
                        print(f"{self.name}: {streams[i]._request.error}", file=sys.stderr)
            if open_ones:
                streams[min(open_ones)]._client._receive()
        for stream, want in zip(streams, expected):
            self.count([answer.tokens for answer in stream._request.answers], want)

    def resume(self, stream, expected):
        """Follow a stream that another client began; its pieces."""
        pieces, last = [], time.monotonic()
        for piece in stream:
            self.gap, last = max(self.gap, time.monotonic() - last), time.monotonic()
            pieces.append(piece)
        tokens = [[t for d in pieces if d.index == i for t in d.tokens] for i in range(len(expected))]
        self.count(tokens, expected)
        return pieces

    def count(self, answers, expected):
        """One request's tokens against what they should be."""
        self.acknowledged += 1
        for tokens, want in zip(answers, expected):
            self.lost += len([1 for a, b in zip(tokens, want) if a != b]) + max(0, len(want) - len(tokens))
            self.duplicated += max(0, len(tokens) - len(want))

    def check(self, test, max_gap_s):
        print(
            f"{self.name}: {self.acknowledged} acknowledged, {self.lost} tokens lost, {self.duplicated} duplicated, "
            f"{self.gap * 1000:.0f} ms to the next token",
            file=sys.stderr,
        )
        test.assertEqual((self.lost, self.duplicated), (0, 0))
        test.assertLess(self.gap, max_gap_s)


def begin(client, jobs):
    streams = [client.stream(**j) for j in jobs]
    for stream in streams:
        next(stream)
    return streams



class RemoteClient:
    """tests/system/stream_client.py on a host of the network tests, or here."""

    def __init__(self, endpoint, jobs, host=None):
        words = [sys.executable, str(SOURCE / "tests" / "system" / "stream_client.py"), endpoint]
        if host is not None:
            words = host.command(*[word.replace("127.0.0.1", host.gateway) for word in words])
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.close()
        self.n_jobs, self.last, self.ends, self.gap = len(jobs), {}, {}, 0.0

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the client ended with {self.process.wait()} and {self.n_jobs - len(self.ends)} open streams")
        row = json.loads(line)
        self.gap = max(self.gap, row["at"] - self.last.get(row["job"], row["at"]))
        self.last[row["job"]] = row["at"]
        if "answers" in row:
            self.ends[row["job"]] = row

    def begin(self):
        """Every stream has brought something."""
        while len(self.last) < self.n_jobs:
            self._read()

    def finish(self, report, expected):
        while len(self.ends) < self.n_jobs:
            self._read()
        report.gap = max(report.gap, self.gap)
        for number, want in enumerate(expected):
            if self.ends[number]["error"]:
                print(f"{report.name}: {self.ends[number]['error']}", file=sys.stderr)
            report.count(self.ends[number]["answers"], want)
        self.close()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
