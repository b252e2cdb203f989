"""A worker that dies of requests that say "poison", and answers "fine" to all others: BACKEND ID."""

import os
import sys
import time

import msgpack
import zmq

endpoint, name = sys.argv[1:]
worker = zmq.Context().socket(zmq.DEALER)
worker.connect(endpoint)


def send(**message):
    worker.send(msgpack.packb(message, use_bin_type=True))


send(type="ready", worker=name, protocol=1, model="tiny", backend="cpu", capacity=4, adapter_slots=0,
     max_rank=0, max_context=4096, total_pages=64, adapters=[])  # fmt: skip
epoch, beat = None, 0.0
while True:
    if epoch is not None and time.monotonic() - beat > 0.1:
        beat = time.monotonic()
        send(type="heartbeat", epoch=epoch, running=1)
    if not worker.poll(50):
        continue
    message = msgpack.unpackb(worker.recv(), raw=False)
    if message["type"] == "welcome":
        epoch = message["epoch"]
    elif message["type"] == "run":
        if b"poison" in message["submit"]:
            os._exit(9)
        delta = {"request": message["request"], "index": 0, "seq": 0, "text": "fine", "tokens": [1], "finish_reason": "stop",
                 "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}}  # fmt: skip
        send(type="step", epoch=epoch, deltas=[delta])
