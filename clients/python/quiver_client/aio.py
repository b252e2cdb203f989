"""The asyncio client: the same calls as coroutines and async iterators."""

import asyncio
from typing import Any, Dict, List, Optional

import msgpack
import zmq
import zmq.asyncio

from .errors import ProtocolError, QuiverError
from .types import Answer, Delta, Request, submit_map


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
    """A connection to a broker for one event loop. Use as `async with AsyncClient(...) as client`.

    timeout: seconds without a message about a request after which its stream raises TimeoutError.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:5555",
        timeout: float = 60.0,
        context: Optional[zmq.asyncio.Context] = None,
    ):
        self.endpoint = endpoint
        self.timeout = timeout
        self._context = context or zmq.asyncio.Context.instance()
        self._socket: Any = None
        self._reader: Optional[asyncio.Task] = None
        self._streams: Dict[str, AsyncStream] = {}
        self._status: List[asyncio.Future] = []
        self._explained: Dict[str, asyncio.Future] = {}

    async def __aenter__(self) -> "AsyncClient":
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(self.endpoint)
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_exc: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; requests in flight are cancelled."""
        if self._socket is None or self._socket.closed:
            return
        pending = list(self._streams)
        for request_id in pending:
            await self._abandon(request_id)
        if self._reader:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._socket.close(linger=200 if pending else 0)

    async def stream(self, prompt: Any = None, **fields: Any) -> AsyncStream:
        """Submit a request and return its stream. Keyword arguments are the protocol's fields."""
        message = submit_map(prompt, **fields)
        if message["id"] in self._streams:
            raise ValueError(f"request id {message['id']!r} is in flight already")
        stream = AsyncStream(self, Request(message))
        self._streams[message["id"]] = stream
        await self._send(message)
        return stream

    async def generate(self, prompt: Any = None, **fields: Any) -> Answer:
        """Submit a request and wait for its (first) answer."""
        fields.setdefault("stream", False)
        return await (await self.stream(prompt, **fields)).answer()

    async def cancel(self, request_id: str) -> None:
        await self._send({"type": "cancel", "id": request_id})

    async def status(self) -> Dict[str, Any]:
        """The broker's view of workers, adapters and queues."""
        future = asyncio.get_running_loop().create_future()
        self._status.append(future)
        await self._send({"type": "status"})
        return await asyncio.wait_for(future, self.timeout)

    async def explain(self, request_id: str) -> Dict[str, Any]:
        """Why a recent request went where it went: scores, waits, attempts."""
        future = asyncio.get_running_loop().create_future()
        self._explained[request_id] = future
        await self._send({"type": "explain", "id": request_id})
        message = await asyncio.wait_for(future, self.timeout)
        if message["type"] == "error":
            raise QuiverError(message["code"], message["message"], request_id)
        return message

    async def _send(self, message: Dict[str, Any]) -> None:
        if self._socket is None:
            raise RuntimeError("the client is not open: use `async with AsyncClient(...)`")
        try:
            data = msgpack.packb(message, use_bin_type=True)
            await asyncio.wait_for(self._socket.send(data), self.timeout)
        except asyncio.TimeoutError:
            raise TimeoutError(
                f"no broker takes messages at {self.endpoint} for {self.timeout} s"
            ) from None

    async def _read(self) -> None:
        """Hand every message to its stream, until the client closes."""
        while True:
            data = await self._socket.recv()
            try:
                message = msgpack.unpackb(data, raw=False, strict_map_key=False)
                self._dispatch(message)
            except (ProtocolError, ValueError, TypeError, KeyError) as failure:
                self._fail_all(failure)

    def _dispatch(self, message: Any) -> None:
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
        if stream is None:
            return  # about a request that was abandoned
        delta = stream._request.feed(message)
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

    async def _abandon(self, request_id: str) -> None:
        """Forget a request: cancel it and ignore what still arrives."""
        if self._streams.pop(request_id, None) is not None:
            await asyncio.shield(self._send({"type": "cancel", "id": request_id}))
