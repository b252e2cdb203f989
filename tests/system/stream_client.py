"""A client as a process of its own, to be killed or cut off: ENDPOINT. Reads a list of jobs as one line of JSON from
stdin and writes a line for each piece as it arrives, and for each end; `at` is CLOCK_MONOTONIC, the same for all
processes of a machine."""

import json
import os
import pathlib
import sys
import time

SOURCE = pathlib.Path(os.environ.get("QV_SOURCE_DIR", pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(SOURCE / "clients" / "python"))
from quiver_client import Client  # noqa: E402


def say(**row):
    print(json.dumps({"at": time.monotonic(), **row}), flush=True)


with Client(sys.argv[1], timeout=60) as client:
    streams = [client.stream(**job) for job in json.loads(sys.stdin.readline())]
    while streams:
        for number, stream in list(enumerate(streams)):
            if stream is None:
                continue
            while stream._deltas:
                delta = stream._deltas.pop(0)
                say(job=number, index=delta.index, seq=delta.seq, tokens=delta.tokens)
            if stream._request.finished:
                error = stream._request.error
                answers = [a.tokens for a in stream._request.answers]
                say(job=number, error=str(error) if error else None, answers=answers)
                streams[number] = None
        if not any(streams):
            break
        client._receive()
