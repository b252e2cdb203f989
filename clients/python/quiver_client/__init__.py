"""Publish jobs to a Quiver broker and read the answers.

    from quiver_client import Client
    with Client("tcp://127.0.0.1:5555") as client:
        print(client.generate("Ines carried two black shoes.", adapter="french").text)
        for delta in client.stream("Ines carried two black shoes.", adapter="json"):
            print(delta.text, end="", flush=True)

`AsyncClient` has the same methods as coroutines and async iterators.
"""

from .aio import AsyncClient, AsyncStream
from .client import Client, Stream
from .errors import ProtocolError, QuiverError
from .types import Answer, Delta

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Delta",
    "ProtocolError",
    "QuiverError",
    "Stream",
]
__version__ = "0.1.0"
