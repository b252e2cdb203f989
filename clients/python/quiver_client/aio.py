"""The asyncio client: the same calls as coroutines and async iterators."""

import asyncio
import time
from typing import Any, Dict, List, Optional, Sequence

import msgpack
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from .errors import ProtocolError, QuiverError
from .flow import RETRY_S, Flow
from .types import Answer, Delta, Request, submit_map
from .wire import EVENTS, Endpoints, Keys, configure, endpoint_list, note_event


class AsyncStream:
    """One request in flight: `async for delta in stream`, or `await stream.answer()`.

    Cancelling the task that iterates cancels the request.
    """

    def __init__(self, client: "AsyncClient", request: Request):
        self._client = client
        self._request = request
        self._events: "asyncio.Queue[Optional[Delta]]" = asyncio.Queue()
        self._failure: Optional[BaseException] = None

    @property
    def id(self) -> str:
        return self._request.id

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Delta:
        try:
            event = await asyncio.wait_for(self._events.get(), self._client.timeout)
        except asyncio.CancelledError:
            await self._client._abandon(self.id)
            raise
        except asyncio.TimeoutError:
            raise TimeoutError(
                f"no message about {self.id} from {self._client.endpoint} "
                f"for {self._client.timeout} s"
            ) from None
        if event is not None:
            return event
        self._events.put_nowait(None)  # a finished stream stays finished
        failure = self._failure or self._request.error
        if failure:
            raise failure
        raise StopAsyncIteration

    async def answers(self) -> List[Answer]:
        async for _ in self:
            pass
        return self._request.answers

    async def answer(self) -> Answer:
        return (await self.answers())[0]

    async def cancel(self) -> None:
        await self._client.cancel(self.id)


class AsyncClient:
    """Connections to one or more brokers for one event loop. Use as `async with AsyncClient(...) as client`.

    timeout: seconds without a message about a request after which its stream raises TimeoutError.
    """

    def __init__(
        self,
        endpoint: Endpoints = "tcp://127.0.0.1:5555",
        timeout: float = 60.0,
        context: Optional[zmq.asyncio.Context] = None,
        keys: Keys = None,
    ):
        self.endpoints = endpoint_list(endpoint)
        self.endpoint = ",".join(self.endpoints)
        self.timeout = timeout
        self._keys = keys
        self._context = context or zmq.asyncio.Context.instance()
        self._links: List[Any] = []
        self._tasks: List[asyncio.Task] = []
        self._flow = Flow(self.endpoints)
        self._changed = asyncio.Event()
        self._streams: Dict[str, AsyncStream] = {}
        self._status: List[asyncio.Future] = []
        self._explained: Dict[str, asyncio.Future] = {}

    async def __aenter__(self) -> "AsyncClient":
        for number, one in enumerate(self.endpoints):
            socket = self._context.socket(zmq.DEALER)
            configure(socket, number, self._keys)
            monitor = socket.get_monitor_socket(EVENTS)
            self._links.append((socket, monitor))
            self._tasks.append(asyncio.create_task(self._watch(number, monitor)))
            self._tasks.append(asyncio.create_task(self._read(number, socket)))
            socket.connect(one)
        self._tasks.append(asyncio.create_task(self._place()))
        return self

    async def __aexit__(self, *_exc: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; requests in flight are cancelled, durable ones go on."""
        if not self._links:
            return
        pending = [i for i, e in self._flow.entries.items() if not e.message.get("durable")]
        for request_id in pending:
            await self._abandon(request_id)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for socket, monitor in self._links:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=200 if pending else 0)
        self._links = []

    async def stream(self, prompt: Any = None, **fields: Any) -> AsyncStream:
        """Submit a request and return its stream. Keyword arguments are the protocol's fields."""
        return await self._begin(submit_map(prompt, **fields))

    async def resume(self, request_id: str, seqs: Sequence[int] = (-1,), **fields: Any) -> AsyncStream:
        """The stream of a request that was submitted elsewhere or earlier, behind the last `seq`
        that is known of each of its answers (-1: from the start)."""
        return await self._begin({"type": "submit", "id": request_id, "n": len(seqs), **fields}, seqs)

    async def _begin(self, message: Dict[str, Any], seqs: Sequence[int] = ()) -> AsyncStream:
        if message["id"] in self._streams:
            raise ValueError(f"request id {message['id']!r} is in flight already")
        await self._connect()
        now = time.monotonic()
        entry = self._flow.resume(message, list(seqs), now) if seqs else self._flow.submit(message, now)
        stream = self._streams[message["id"]] = AsyncStream(self, entry.request)
        await self._flush()
        return stream

    async def generate(self, prompt: Any = None, **fields: Any) -> Answer:
        """Submit a request and wait for its (first) answer."""
        fields.setdefault("stream", False)
        return await (await self.stream(prompt, **fields)).answer()

    async def cancel(self, request_id: str) -> None:
        await self._connect()
        self._flow.cancel(request_id)
        await self._flush()

    async def status(self) -> Dict[str, Any]:
        """The broker's view of workers, adapters and queues."""
        future = asyncio.get_running_loop().create_future()
        self._status.append(future)
        await self._ask({"type": "status"})
        return await asyncio.wait_for(future, self.timeout)

    async def explain(self, request_id: str) -> Dict[str, Any]:
        """Why a recent request went where it went: scores, waits, attempts."""
        future = asyncio.get_running_loop().create_future()
        self._explained[request_id] = future
        await self._ask({"type": "explain", "id": request_id})
        message = await asyncio.wait_for(future, self.timeout)
        if message["type"] == "error":
            raise QuiverError(message["code"], message["message"], request_id)
        return message

    # --- connections

    async def _connect(self) -> None:
        """Wait until some broker is there."""
        if not self._links:
            raise RuntimeError("the client is not open: use `async with AsyncClient(...)`")
        deadline = time.monotonic() + self.timeout
        while not any(self._flow.up):
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), max(0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise TimeoutError(
                    f"no broker takes messages at {self.endpoint} for {self.timeout} s"
                ) from None

    async def _ask(self, message: Dict[str, Any]) -> None:
        await self._connect()
        self._flow.out.append((self._flow.any_link(), message))
        await self._flush()

    async def _flush(self) -> None:
        while self._flow.out:
            link, message = self._flow.out.pop(0)
            data = msgpack.packb(message, use_bin_type=True)
            try:
                await self._links[link][0].send(data, flags=zmq.NOBLOCK)
            except zmq.Again:  # the connection is gone, or full: as if it were lost
                self._flow.disconnected(link, time.monotonic())

    async def _watch(self, link: int, monitor: Any) -> None:
        """Note connections that come and go."""
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())
            note_event(self._flow, link, event["event"])
            self._changed.set()
            await self._flush()

    async def _place(self) -> None:
        """Send what waits for a connection or for patience."""
        while True:
            self._flow.poll(time.monotonic())
            await self._flush()
            await asyncio.sleep(RETRY_S / 2)

    async def _read(self, link: int, socket: Any) -> None:
        """Hand every message to its stream, until the client closes."""
        while True:
            data = await socket.recv()
            try:
                message = msgpack.unpackb(data, raw=False, strict_map_key=False)
                self._dispatch(link, message)
            except (ProtocolError, ValueError, TypeError, KeyError) as failure:
                self._fail_all(failure)
            await self._flush()

    def _dispatch(self, link: int, message: Any) -> None:
        if not isinstance(message, dict):
            raise ProtocolError(f"a {type(message).__name__} arrived where a map was due")
        if message.get("type") == "status":
            if self._status:
                future = self._status.pop(0)
                if not future.done():
                    future.set_result(message)
            return
        stream = self._streams.get(message.get("id", ""))
        if message.get("id") in self._explained and (
            message["type"] == "explain" or (message["type"] == "error" and stream is None)
        ):
            future = self._explained.pop(message["id"])
            if not future.done():
                future.set_result(message)
            return
        entry, delta = self._flow.feed(link, message, time.monotonic())
        if stream is None or entry is None:
            return  # about a request that was abandoned
        if delta is not None:
            stream._events.put_nowait(delta)
        if stream._request.finished:
            del self._streams[stream.id]
            stream._events.put_nowait(None)

    def _fail_all(self, failure: BaseException) -> None:
        """The connection can no longer be trusted: every stream on it ends with the failure."""
        for stream in self._streams.values():
            stream._failure = failure
            stream._events.put_nowait(None)
        self._streams.clear()
        self._flow.entries.clear()

    async def _abandon(self, request_id: str) -> None:
        """Forget a request: cancel it and ignore what still arrives."""
        if self._streams.pop(request_id, None) is not None:
            self._flow.drop(request_id)
            await asyncio.shield(self._flush())
