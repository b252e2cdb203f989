"""Runs one test file; says so and exits with 77 when this machine lacks what its tests need."""

import importlib.util
import os
import shutil
import sys
import unittest

here = os.path.dirname(os.path.abspath(__file__))
missing = [m for m in ("zmq", "msgpack") if importlib.util.find_spec(m) is None]
missing += [p for p in ("redis-server", "redis-cli") if shutil.which(p) is None]
if missing:
    print("skipped: this machine lacks", ", ".join(missing))
    sys.exit(77)
sys.path.insert(0, here)
result = unittest.main(module=sys.argv[1], argv=sys.argv[1:], verbosity=2, exit=False).result
if result.wasSuccessful() and result.skipped and len(result.skipped) >= result.testsRun:
    sys.exit(77)
sys.exit(not result.wasSuccessful())
