"""Bad input is normal: each gets the right code and a sentence that names it, and the pool goes on."""

import json
import pathlib
import shutil
import struct
import unittest

import msgpack
import zmq
from pool import DEMO, Pool, chat, demo_adapters

from quiver_client import QuiverError

SUBMIT = {"type": "submit", "id": "x", "prompt": "Hello", "max_tokens": 4}


def packed(**fields):
    return msgpack.packb({**SUBMIT, **fields})


def without(*keys):
    return msgpack.packb({k: v for k, v in SUBMIT.items() if k not in keys})


def nested(depth):
    return b"\x81\xa1a" * depth + b"\xc0"


# bytes on the wire, expected code, a word that the message must have
WIRE = [
    ("empty", b"", "BAD_REQUEST", ""),
    ("not a map", msgpack.packb([1, 2]), "BAD_REQUEST", "map"),
    ("truncated", packed()[:-3], "BAD_REQUEST", ""),
    ("trailing bytes", packed() + b"\x01", "BAD_REQUEST", ""),
    ("too deep", nested(200), "TOO_LARGE", "deep"),
    ("array bomb", b"\xdd\xff\xff\xff\xff", "BAD_REQUEST", ""),
    ("map bomb", b"\xdf\x01\x00\x00\x00", "BAD_REQUEST", ""),
    ("string bomb", b"\x81\xa4type\xdb\xff\xff\xff\xff", "BAD_REQUEST", ""),
    ("duplicate key", b"\x82\xa4type\xa6submit\xa4type\xa6submit", "BAD_REQUEST", "type"),
    ("key that is no string", b"\x81\x01\x02", "BAD_REQUEST", "key"),
    ("unknown type", msgpack.packb({"type": "explode", "id": "x"}), "BAD_REQUEST", "explode"),
    ("no type", msgpack.packb({"id": "x"}), "BAD_REQUEST", "type"),
    ("no id", without("id"), "BAD_REQUEST", "id"),
    ("long id", packed(id="y" * 65), "BAD_REQUEST", "id"),
    ("no prompt", without("prompt"), "BAD_REQUEST", "prompt"),
    ("prompt and tokens", packed(tokens=[1]), "BAD_REQUEST", "tokens"),
    ("empty prompt", packed(prompt=""), "BAD_REQUEST", "prompt"),
    ("empty tokens", msgpack.packb({"type": "submit", "id": "x", "tokens": []}), "BAD_REQUEST", "tokens"),
    ("prompt of a wrong type", packed(prompt=7), "BAD_REQUEST", "prompt"),
    ("invalid UTF-8", packed().replace(b"Hello", b"He\xff\xfeo"), "BAD_REQUEST", "UTF-8"),
    ("token out of range", msgpack.packb({"type": "submit", "id": "x", "tokens": [1, 99999999]}), "BAD_REQUEST", "99999999"),
    ("negative token", msgpack.packb({"type": "submit", "id": "x", "tokens": [1, -5]}), "BAD_REQUEST", "-5"),
    ("temperature of a wrong type", packed(temperature="hot"), "BAD_REQUEST", "temperature"),
    ("negative temperature", packed(temperature=-1), "BAD_REQUEST", "temperature"),
    ("temperature that is no number", packed(temperature=float("nan")), "BAD_REQUEST", "temperature"),
    ("top_p above 1", packed(top_p=1.5), "BAD_REQUEST", "top_p"),
    ("n of 0", packed(n=0), "BAD_REQUEST", "n"),
    ("negative max_tokens", packed(max_tokens=-1), "BAD_REQUEST", "max_tokens"),
    ("too many logprobs", packed(logprobs=1000), "BAD_REQUEST", "logprobs"),
    ("empty stop string", packed(stop=[""]), "BAD_REQUEST", "stop"),
    ("messages of a wrong shape", msgpack.packb({"type": "submit", "id": "x", "messages": "hi"}), "BAD_REQUEST", "messages"),
    ("message without a role", msgpack.packb({"type": "submit", "id": "x", "messages": [{"content": "hi"}]}), "BAD_REQUEST", ""),
    ("over-long prompt", packed(prompt="word " * 6000), "CONTEXT_TOO_LONG", "4096"),
    ("unknown adapter", packed(adapter="nobody"), "ADAPTER_NOT_FOUND", "nobody"),
    ("adapter name with a blank", packed(adapter="no body"), "BAD_REQUEST", "adapter"),
    ("cancel of an unknown id", msgpack.packb({"type": "cancel", "id": "never"}), "BAD_REQUEST", "never"),
]  # fmt: skip


class Wire(unittest.TestCase):
    def test_every_malformed_message_is_answered_and_the_pool_goes_on(self):
        with Pool(workers=1) as pool:
            context = zmq.Context.instance()
            for name, data, code, word in WIRE:
                with self.subTest(name):
                    socket = context.socket(zmq.DEALER)
                    socket.linger = 0
                    socket.connect(pool.frontend)
                    socket.send(data)
                    reply = self.last(socket)
                    socket.close()
                    self.assertEqual(reply.get("code"), code, reply)
                    self.assertIn(word, reply["message"])
                    self.assertGreater(len(reply["message"]), 10)
            self.assertTrue(pool.alive("broker") and pool.alive("w1"))
            with pool.client() as client:
                self.assertEqual(len(client.generate("Hello", max_tokens=4, ignore_eos=True).tokens), 4)

    def last(self, socket):
        """The message that ends a request: whatever comes after `accepted`."""
        while True:
            self.assertTrue(socket.poll(20000), "no reply")
            message = msgpack.unpackb(socket.recv())
            if message["type"] != "accepted":
                return message

    def test_unknown_keys_are_named_in_warnings(self):
        with Pool(workers=1) as pool, pool.client() as client:
            answer = client.generate("Hello", max_tokens=2, tempreature=0.5)
            self.assertTrue(any("tempreature" in w for w in answer.warnings), answer)

    def test_a_frame_beyond_the_limit_disconnects_only_its_sender(self):
        with Pool(workers=1, broker_args=["--max-message", "64K"]) as pool, pool.client() as client:
            with self.assertRaises((QuiverError, TimeoutError)):
                with pool.client(timeout=2) as greedy:
                    greedy.generate("x" * 1000000)
            self.assertEqual(len(client.generate("Hello", max_tokens=2, ignore_eos=True).tokens), 2)

    def test_a_full_queue_refuses_with_a_hint_when_to_come_back(self):
        with Pool(workers=1, broker_args=["--max-queued", "2"], worker_args=["--max-running", "1"]) as pool:
            with pool.client() as client:
                streams = [client.stream(chat("Hello"), temperature=0, max_tokens=3000, ignore_eos=True) for _ in range(12)]
                refused = []
                for stream in streams[3:]:
                    try:
                        next(stream)
                    except QuiverError as error:
                        refused.append(error)
                        if len(refused) > 3:
                            break
                self.assertTrue(refused)
                for error in refused:
                    self.assertEqual(error.code, "OVERLOADED")
                    self.assertGreater(error.retry_after_ms, 0)

    def test_a_req_socket_gets_one_answer(self):
        with Pool(workers=1) as pool:
            socket = zmq.Context.instance().socket(zmq.REQ)
            socket.linger = 0
            socket.connect(pool.frontend)
            for i in range(2):
                socket.send(packed(id=f"r{i}", stream=False, ignore_eos=True))
                self.assertTrue(socket.poll(20000))
                reply = msgpack.unpackb(socket.recv())
                self.assertEqual((reply["type"], reply["id"], len(reply["tokens"])), ("done", f"r{i}", 4))
            socket.close()


def edit_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_header(folder, change):
    """Rewrite the safetensors header; the data stays."""
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def rename(old, new):
    def change(header):
        for key in [k for k in header if old in k]:
            header[key.replace(old, new)] = header.pop(key)

    return change


def poison(folder):
    path = folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(raw)


def transpose(header):
    key = next(k for k in header if k.endswith("lora_A.weight"))
    header[key]["shape"] = header[key]["shape"][::-1]


ADAPTERS = [
    ("no such folder", shutil.rmtree, ""),
    ("no config", lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json"),
    ("config that is no JSON", lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json"),
    ("no tensors", lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    ("empty tensors", lambda d: (d / "adapter_model.safetensors").write_bytes(b""), "adapter_model.safetensors"),
    ("truncated tensors", lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:-1000]), "adapter_model.safetensors"),
    ("header beyond the file", lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "adapter_model.safetensors"),
    ("NaN", poison, "lora"),
    ("wrong shape", lambda d: edit_header(d, transpose), "lora_A"),
    ("unknown module", lambda d: edit_header(d, rename("q_proj", "qq_proj")), "qq_proj"),
    ("A without B", lambda d: edit_header(d, lambda h: h.pop(next(k for k in h if "lora_B" in k))), "lora_"),
    ("DoRA", lambda d: edit_config(d, use_dora=True), "use_dora"),
    ("rank above the pool's", lambda d: None, "rank"),
    ("not LoRA", lambda d: edit_config(d, peft_type="IA3"), "IA3"),
    ("bias", lambda d: edit_config(d, bias="all"), "bias"),
    ("modules_to_save", lambda d: edit_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
]  # fmt: skip


class Adapters(unittest.TestCase):
    def test_every_bad_adapter_is_refused_with_its_reason_and_the_pool_goes_on(self):
        with Pool(workers=1, adapters=demo_adapters("emoji"), worker_args=["--max-lora-rank", "8"]) as pool:
            for i, (name, damage, word) in enumerate(ADAPTERS):
                with self.subTest(name):
                    folder = pathlib.Path(pool.dir) / f"bad{i}"
                    source = "french" if "rank" in name else "json"
                    shutil.copytree(DEMO / "adapters" / source, folder)
                    damage(folder)
                    pool.redis("HSET", f"quiver:want:bad{i}", "path", str(folder))
                    reason = pool.wait_adapter(f"bad{i}", ("failed", "invalid"))["reason"]
                    self.assertIn(word, reason)
                    self.assertEqual(pool.hash(f"quiver:adapter:bad{i}")["reason"], reason)
                    with pool.client() as client, self.assertRaises(QuiverError) as caught:
                        client.generate("Hello", adapter=f"bad{i}", max_tokens=2)
                    missing = name.startswith("no ")
                    self.assertEqual(caught.exception.code, "ADAPTER_NOT_FOUND" if missing else "ADAPTER_INVALID")
                    self.assertIn(f"bad{i}", caught.exception.message)
            with pool.client() as client:
                answer = client.generate(chat("Emil found five red boats at the garden on Monday."), adapter="emoji", temperature=0)
            self.assertTrue(answer.text.startswith("Emil: "))

    def test_a_wish_that_makes_no_sense_is_reported_not_obeyed(self):
        with Pool(workers=1) as pool:
            pool.redis("HSET", "quiver:want:odd", "replicas", "many", "path", "/nowhere")
            reason = pool.wait_adapter("odd", "invalid")["reason"]
            self.assertIn("many", reason)
            self.assertTrue(pool.alive("broker"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
