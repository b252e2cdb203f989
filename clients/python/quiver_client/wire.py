"""What both clients set on their sockets."""

import time
from typing import Any, List, Optional, Sequence, Tuple, Union

import zmq

from .flow import Flow

Endpoints = Union[str, Sequence[str]]
Keys = Optional[Sequence[Any]]
EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def endpoint_list(endpoint: Endpoints) -> List[str]:
    names = endpoint.split(",") if isinstance(endpoint, str) else list(endpoint)
    if not names:
        raise ValueError("no endpoint: give at least one, such as tcp://127.0.0.1:5555")
    return names


def key_tuple(keys: Keys, number: int) -> Optional[Tuple[bytes, bytes, bytes]]:
    if keys is None:
        return None
    if len(keys) == 3 and all(isinstance(key, (str, bytes)) for key in keys):
        one: Any = keys
    else:
        one = keys[number]
    return tuple(k.encode() if isinstance(k, str) else k for k in one)  # type: ignore


def configure(socket: Any, number: int, keys: Keys) -> None:
    socket.linger = 0
    socket.setsockopt(zmq.IMMEDIATE, 1)  # never queue for a broker that may not come
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)  # a connection that is half open shows
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3000)
    # The broker's own pings wait behind what it cannot send: this tells it how long our silence may last.
    socket.setsockopt(zmq.HEARTBEAT_TTL, 3000)
    mine = key_tuple(keys, number)
    if mine is not None:
        socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = mine


def note_event(flow: Flow, link: int, event: int) -> None:
    if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
        flow.connected(link, time.monotonic())
    elif event == zmq.EVENT_DISCONNECTED:
        flow.disconnected(link, time.monotonic())
