"""The synchronous client: one DEALER socket, any number of requests on it. One thread at a time."""

import time
from typing import Any, Dict, Iterator, List, Optional

import msgpack
import zmq

from .errors import ProtocolError, QuiverError
from .types import Answer, Delta, Request, submit_map


class Stream:
    """One request in flight: iterate over it for Deltas, or call answer() / answers() for the end."""

    def __init__(self, client: "Client", request: Request):
        self._client = client
        self._request = request
        self._deltas: List[Delta] = []

    @property
    def id(self) -> str:
        return self._request.id

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while not self._deltas:
            if self._request.finished:
                if self._request.error:
                    raise self._request.error
                raise StopIteration
            self._client._receive()
        return self._deltas.pop(0)

    def answers(self) -> List[Answer]:
        """Wait for the end; the n answers. Raises QuiverError when the request failed."""
        for _ in self:
            pass
        return self._request.answers

    def answer(self) -> Answer:
        return self.answers()[0]

    def cancel(self) -> None:
        """Ask the broker to stop; the stream then ends with finish_reason "cancelled"."""
        self._client.cancel(self.id)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_exc: Any) -> None:
        if not self._request.finished:
            self._client._abandon(self.id)


class Client:
    """A connection to a broker.

    endpoint  the broker's client endpoint
    timeout   seconds without any message from the broker after which TimeoutError is raised
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:5555",
        timeout: float = 60.0,
        context: Optional[zmq.Context] = None,
    ):
        self.endpoint = endpoint
        self.timeout = timeout
        self._socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self._streams: Dict[str, Stream] = {}
        self._status: List[Dict[str, Any]] = []
        self._explained: Dict[str, Optional[Dict[str, Any]]] = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; requests in flight are cancelled."""
        if self._socket.closed:
            return
        pending = list(self._streams)
        for request_id in pending:
            self._abandon(request_id)
        self._socket.close(linger=200 if pending else 0)  # let the cancels leave

    def stream(self, prompt: Any = None, **fields: Any) -> Stream:
        """Submit a request and return its Stream. Keyword arguments are the protocol's fields."""
        message = submit_map(prompt, **fields)
        if message["id"] in self._streams:
            raise ValueError(f"request id {message['id']!r} is in flight already")
        stream = Stream(self, Request(message))
        self._streams[message["id"]] = stream
        self._send(message)
        return stream

    def generate(self, prompt: Any = None, **fields: Any) -> Answer:
        """Submit a request and wait for its (first) answer."""
        fields.setdefault("stream", False)
        return self.stream(prompt, **fields).answer()

    def cancel(self, request_id: str) -> None:
        self._send({"type": "cancel", "id": request_id})

    def status(self) -> Dict[str, Any]:
        """The broker's view of workers, adapters and queues."""
        self._send({"type": "status"})
        while not self._status:
            self._receive()
        return self._status.pop(0)

    def explain(self, request_id: str) -> Dict[str, Any]:
        """Why a recent request went where it went: scores, waits, attempts."""
        self._explained[request_id] = None
        self._send({"type": "explain", "id": request_id})
        while self._explained[request_id] is None:
            self._receive()
        message = self._explained.pop(request_id)
        if message["type"] == "error":
            raise QuiverError(message["code"], message["message"], request_id)
        return message

    def _send(self, message: Dict[str, Any]) -> None:
        if not self._socket.poll(int(self.timeout * 1000), zmq.POLLOUT):
            raise TimeoutError(f"no broker takes messages at {self.endpoint} for {self.timeout} s")
        self._socket.send(msgpack.packb(message, use_bin_type=True))

    def _receive(self) -> None:
        """Wait for one message and hand it to its stream."""
        deadline = time.monotonic() + self.timeout
        if not self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000)), zmq.POLLIN):
            raise TimeoutError(f"no message from the broker at {self.endpoint} for {self.timeout} s")
        message = msgpack.unpackb(self._socket.recv(), raw=False, strict_map_key=False)
        if not isinstance(message, dict):
            raise ProtocolError(f"a {type(message).__name__} arrived where a map was due")
        if message.get("type") == "status":
            self._status.append(message)
            return
        stream = self._streams.get(message.get("id", ""))
        if message.get("id") in self._explained and (
            message["type"] == "explain" or (message["type"] == "error" and stream is None)
        ):
            self._explained[message["id"]] = message
            return
        if stream is None:
            return  # about a request that was abandoned
        delta = stream._request.feed(message)
        if delta is not None:
            stream._deltas.append(delta)
        if stream._request.finished:
            del self._streams[stream.id]

    def _abandon(self, request_id: str) -> None:
        """Forget a request: cancel it and ignore what still arrives."""
        if self._streams.pop(request_id, None) is not None:
            self._socket.send(
                msgpack.packb({"type": "cancel", "id": request_id}), flags=zmq.NOBLOCK
            )
