"""The synchronous client: a DEALER socket a broker, any number of requests on it. One thread at a time."""

import time
from typing import Any, Dict, Iterator, List, Optional, Sequence

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from .errors import ProtocolError, QuiverError
from .flow import Flow
from .types import Answer, Delta, Request, submit_map
from .wire import EVENTS, Endpoints, Keys, configure, endpoint_list, note_event


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
    """Connections to one or more brokers of a pool.

    endpoint  a broker's client endpoint, or a list of them: requests are spread, and go on at
              another broker when one is lost
    timeout   seconds without any message from a broker after which TimeoutError is raised
    keys      for brokers that authenticate: (the broker's public key, our public, our secret key),
              each as 40 characters; or one such tuple per endpoint
    """

    def __init__(
        self,
        endpoint: Endpoints = "tcp://127.0.0.1:5555",
        timeout: float = 60.0,
        context: Optional[zmq.Context] = None,
        keys: Keys = None,
    ):
        self.endpoints = endpoint_list(endpoint)
        self.endpoint = ",".join(self.endpoints)
        self.timeout = timeout
        self._links = []
        for number, one in enumerate(self.endpoints):
            socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
            configure(socket, number, keys)
            self._links.append((socket, socket.get_monitor_socket(EVENTS)))
            socket.connect(one)
        self._flow = Flow(self.endpoints)
        self._streams: Dict[str, Stream] = {}
        self._status: List[Dict[str, Any]] = []
        self._explained: Dict[str, Optional[Dict[str, Any]]] = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; requests in flight are cancelled, durable ones go on."""
        if self._links[0][0].closed:
            return
        pending = [i for i, e in self._flow.entries.items() if not e.message.get("durable")]
        for request_id in pending:
            self._abandon(request_id)
        self._detach(200 if pending else 0)  # let the cancels leave

    def _detach(self, linger: int = 0) -> None:
        """Close the connections as they are, as if the program were killed."""
        for socket, monitor in self._links:
            if not socket.closed:
                socket.disable_monitor()
                monitor.close(linger=0)
                socket.close(linger=linger)

    def stream(self, prompt: Any = None, **fields: Any) -> Stream:
        """Submit a request and return its Stream. Keyword arguments are the protocol's fields."""
        message = submit_map(prompt, **fields)
        return self._begin(message)

    def generate(self, prompt: Any = None, **fields: Any) -> Answer:
        """Submit a request and wait for its (first) answer."""
        fields.setdefault("stream", False)
        return self.stream(prompt, **fields).answer()

    def resume(self, request_id: str, seqs: Sequence[int] = (-1,), **fields: Any) -> Stream:
        """The stream of a request that was submitted elsewhere or earlier, behind the last `seq`
        that is known of each of its answers (-1: from the start)."""
        message = {"type": "submit", "id": request_id, "n": len(seqs), **fields}
        return self._begin(message, seqs)

    def cancel(self, request_id: str) -> None:
        self._connect()
        self._flow.cancel(request_id)
        self._flush()

    def status(self) -> Dict[str, Any]:
        """A broker's view of workers, adapters and queues."""
        self._ask({"type": "status"})
        while not self._status:
            self._receive()
        return self._status.pop(0)

    def explain(self, request_id: str) -> Dict[str, Any]:
        """Why a recent request went where it went: scores, waits, attempts."""
        self._explained[request_id] = None
        self._ask({"type": "explain", "id": request_id})
        while self._explained[request_id] is None:
            self._receive()
        message = self._explained.pop(request_id)
        if message["type"] == "error":
            raise QuiverError(message["code"], message["message"], request_id)
        return message

    # --- connections

    def _begin(self, message: Dict[str, Any], seqs: Sequence[int] = ()) -> Stream:
        if message["id"] in self._streams:
            raise ValueError(f"request id {message['id']!r} is in flight already")
        self._connect()
        if seqs:
            entry = self._flow.resume(message, list(seqs), time.monotonic())
        else:
            entry = self._flow.submit(message, time.monotonic())
        stream = self._streams[message["id"]] = Stream(self, entry.request)
        self._flush()
        return stream

    def _connect(self) -> None:
        """Wait until some broker is there."""
        deadline = time.monotonic() + self.timeout
        while not any(self._flow.up):
            if not self._wait(deadline):
                raise TimeoutError(f"no broker takes messages at {self.endpoint} for {self.timeout} s")

    def _ask(self, message: Dict[str, Any]) -> None:
        self._connect()
        self._send(self._flow.any_link(), message)

    def _send(self, link: int, message: Dict[str, Any]) -> None:
        socket = self._links[link][0]
        try:
            socket.send(msgpack.packb(message, use_bin_type=True), flags=zmq.NOBLOCK)
        except zmq.Again:  # the connection is gone, or full: as if it were lost
            self._flow.disconnected(link, time.monotonic())

    def _flush(self) -> None:
        while self._flow.out:
            self._send(*self._flow.out.pop(0))

    def _wait(self, deadline: float) -> bool:
        """Take what comes on any connection until then; False: nothing did."""
        poller = zmq.Poller()
        for socket, monitor in self._links:
            poller.register(socket, zmq.POLLIN)
            poller.register(monitor, zmq.POLLIN)
        while True:
            now = time.monotonic()
            later = self._flow.poll(now)
            self._flush()
            until = min(deadline, later) if later is not None else deadline
            ready = dict(poller.poll(max(0, int((until - now) * 1000) + (until > now))))
            for number, (socket, monitor) in enumerate(self._links):
                if monitor in ready:
                    note_event(self._flow, number, recv_monitor_message(monitor)["event"])
                if socket in ready:
                    self._take(number, socket.recv())
            self._flush()
            if ready:
                return True
            if time.monotonic() >= deadline:
                return False

    def _receive(self) -> None:
        """Wait for something to happen."""
        if not self._wait(time.monotonic() + self.timeout):
            raise TimeoutError(f"no message from the broker at {self.endpoint} for {self.timeout} s")

    def _take(self, link: int, data: bytes) -> None:
        message = msgpack.unpackb(data, raw=False, strict_map_key=False)
        if not isinstance(message, dict):
            raise ProtocolError(f"a {type(message).__name__} arrived where a map was due")
        if message.get("type") == "status":
            self._status.append(message)
            return
        request_id = message.get("id", "")
        if request_id in self._explained and (
            message["type"] == "explain" or (message["type"] == "error" and request_id not in self._streams)
        ):
            self._explained[request_id] = message
            return
        entry, delta = self._flow.feed(link, message, time.monotonic())
        stream = self._streams.get(request_id)
        if entry is None or stream is None:
            return  # about a request that was abandoned
        if delta is not None:
            stream._deltas.append(delta)
        if stream._request.finished:
            del self._streams[request_id]

    def _abandon(self, request_id: str) -> None:
        """Forget a request: cancel it and ignore what still arrives."""
        self._streams.pop(request_id, None)
        self._flow.drop(request_id)
        self._flush()
