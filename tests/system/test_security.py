"""Who may do what: CURVE keys on both sides of the broker, Redis with a password and an ACL user, adapter folders."""

import pathlib
import subprocess
import unittest
import urllib.request

from pool import BIN, DEMO, Pool, chat, free_port, wait_until

from quiver_client import Client, QuiverError

SENTENCE = "Ines carried two black shoes at the station on Tuesday."


def make_key(folder, name, *args):
    """(path of the key file, (public, secret), the line for the broker's list)"""
    path = folder / f"{name}.key"
    line = subprocess.run([BIN / "quiver", "keys", "new", path, *args], capture_output=True, text=True, check=True).stdout
    words = dict(row.split() for row in path.read_text().splitlines())
    return path, (words["public"], words["secret"]), line


class Secured(Pool):
    """A pool whose broker asks everybody for a key."""

    def __init__(self, **more):
        super().__init__(**more)
        self.keys = {
            name: make_key(self.dir, name, *args)
            for name, args in {
                "broker": (),
                "acme": ("--tenant", "acme"),
                "zeta": ("--tenant", "zeta"),
                "boss": ("--rights", "operate"),
                "pool": ("--rights", "worker"),
                "stranger": ("--tenant", "acme"),
            }.items()
        }
        self.access = self.dir / "access"
        self.metrics = free_port()
        self.allow("acme", "zeta", "boss", "pool")
        self.broker_args += ["--key", self.keys["broker"][0], "--access", self.access, "--metrics-port", self.metrics]
        self.worker_args += ["--key", self.keys["pool"][0], "--broker-key", f"{self.keys['broker'][0]}.pub"]
        self.who = "boss"

    def allow(self, *names):
        self.access.write_text("# who may connect\n" + "".join(self.keys[n][2] for n in names))

    def client(self, who=None, **kwargs):
        server, (public, secret) = self.keys["broker"][1][0], self.keys[who or self.who][1]
        return super().client(keys=(server, public, secret), **kwargs)

    def metric(self, name):
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10).read().decode()
        return sum(float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(name))


class Keys(unittest.TestCase):
    def test_keys_say_who_may_do_what(self):
        with Secured(workers=1) as pool:
            with pool.client("acme") as acme, pool.client("zeta") as zeta, pool.client("boss") as boss:
                stream = acme.stream(chat(SENTENCE), request_id="a-1", temperature=0, max_tokens=3000, ignore_eos=True)
                next(stream)
                for what, call in {
                    "status": acme.status,
                    "submit": lambda: boss.stream("hi").answer(),
                    "another tenant": lambda: acme.stream("hi", tenant="zeta").answer(),
                    "a stream of another tenant": lambda: zeta.resume("a-1").answer(),
                }.items():
                    with self.subTest(what):
                        if what == "status":
                            acme._ask({"type": "status"})
                            wait_until("it is counted", lambda: pool.metric("quiver_broker_unauthorized_total") > 0)
                            continue
                        with self.assertRaises(QuiverError) as caught:
                            call()
                        self.assertIn(caught.exception.code, ("UNAUTHORIZED", "NOT_FOUND"))
                self.assertEqual(boss.status()["in_flight"], 1)
                zeta.cancel("a-1")  # not its own: nothing happens
                boss.cancel("a-1")
                self.assertEqual(stream.answer().finish_reason, "cancelled")

    def test_strangers_are_refused_and_counted(self):
        with Secured(workers=1) as pool:
            refused = lambda: pool.metric("quiver_broker_refused_connections_total")  # noqa: E731
            with self.assertRaises(TimeoutError):
                with pool.client("stranger", timeout=1) as client:
                    client.generate("hi")
            wait_until("the stranger is counted", lambda: refused() >= 1)
            with self.assertRaises(TimeoutError):
                with Client(pool.frontend, timeout=1) as client:  # no key at all
                    client.generate("hi")
            before = refused()
            pool.worker_args = ["--key", pool.keys["acme"][0], "--broker-key", f"{pool.keys['broker'][0]}.pub"]
            pool.start_worker("w2", wait=False)  # a key of a client is none of a worker
            wait_until("the false worker is counted", lambda: refused() > before)
            self.assertIsNone(pool.worker("w2"))
            with pool.client("acme") as client:
                self.assertEqual(client.generate(chat(SENTENCE), temperature=0, max_tokens=4).worker, "w1")
            secrets = [pair[1] for _, pair, _ in pool.keys.values()]
            for log in pool.dir.glob("*.log"):
                self.assertFalse([s for s in secrets if s in log.read_text(errors="replace")], log.name)

    def test_a_key_that_is_taken_away_ends_at_once(self):
        with Secured(workers=1) as pool, pool.client("acme") as client:
            self.assertTrue(client.generate(chat(SENTENCE), temperature=0, max_tokens=4).tokens)
            pool.allow("boss", "pool")

            def is_refused():
                try:
                    client.generate(chat(SENTENCE), temperature=0, max_tokens=2)
                except QuiverError as error:
                    return error.code == "UNAUTHORIZED"

            wait_until("the list was read again", is_refused)
            pool.access.write_text("nonsense\n")  # changes nothing
            wait_until("it is said", lambda: "line 1" in pool.log("broker"))
            self.assertEqual(len(pool.status()["workers"]), 1)

    def test_the_command_line_client_has_keys_too(self):
        with Secured(workers=1) as pool:
            base = [BIN / "quiver", "submit", "--broker", pool.frontend, "--temperature", "0", "--max-tokens", "4", "Hello"]
            keys = ["--key", pool.keys["acme"][0], "--broker-key", f"{pool.keys['broker'][0]}.pub"]
            result = subprocess.run([*base, *keys], capture_output=True, text=True, timeout=60)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            pathlib.Path(pool.keys["acme"][0]).chmod(0o644)
            result = subprocess.run([*base, *keys], capture_output=True, text=True, timeout=60)
            self.assertIn("others can read the secret", result.stderr)

    def test_a_public_address_needs_keys_or_an_override(self):
        def start(*args):
            command = [BIN / "quiver-broker", "--frontend", "tcp://0.0.0.0:*", "--backend", "tcp://127.0.0.1:*", "--redis", "none"]
            return subprocess.run([*command, *args], capture_output=True, text=True, timeout=20)

        result = start()
        self.assertEqual(result.returncode, 2)
        self.assertIn("--key and --access", result.stderr)
        result = start("--key", "/nowhere/key", "--access", "/nowhere/list")
        self.assertEqual(result.returncode, 2)
        self.assertIn("/nowhere/key", result.stderr)


class RedisUser(unittest.TestCase):
    RIGHTS = ("resetkeys", "~quiver:*", "resetchannels", "&__key*", "+@all", "-@dangerous", "+info", "+keys", "+config|get", "+client|setname", "+client|list", "+role")

    def test_an_acl_user_with_a_password_is_enough(self):
        with Pool(workers=0) as plain:
            plain.redis("ACL", "SETUSER", "quiver", "on", ">s3cret-word", *self.RIGHTS)
            plain.kill("broker")
            plain.redis_url = f"redis://quiver:s3cret-word@127.0.0.1:{plain.redis_port}"
            plain.start_broker()
            plain.start_worker("w1")
            plain.redis("HSET", "quiver:want:json", "path", str(DEMO / "adapters" / "json"))
            plain.wait_adapter("json", "ready", 1)
            with plain.client() as client:
                answer = client.stream(chat(SENTENCE), adapter="json", temperature=0, max_tokens=8, durable=True).answer()
                self.assertTrue(answer.text.startswith("{"))
            for name in ("broker", "w1"):
                self.assertNotIn("s3cret-word", plain.log(name))


class AdapterRoots(unittest.TestCase):
    def test_adapters_come_only_from_the_allowed_folders(self):
        with Pool(workers=0) as pool:
            inside = pool.dir / "adapters"
            inside.mkdir()
            source = DEMO / "adapters" / "json"
            (inside / "good").mkdir()
            for file in source.iterdir():
                (inside / "good" / file.name).write_bytes(file.read_bytes())
            (inside / "link").symlink_to(source)
            (inside / "half").mkdir()
            for file in source.iterdir():
                (inside / "half" / file.name).symlink_to(file)
            pool.worker_args = ["--adapter-root", inside]
            pool.start_worker("w1")
            wants = {"good": inside / "good", "link": inside / "link", "half": inside / "half", "up": inside / ".." / ".." / source, "out": source}
            for name, path in wants.items():
                pool.redis("HSET", f"quiver:want:{name}", "path", str(path))
            pool.wait_adapter("good", "ready", 1)
            for name in ("link", "half", "up", "out"):
                with self.subTest(name):
                    adapter = pool.wait_adapter(name, ("failed", "invalid"))
                    self.assertIn("outside", adapter["reason"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
