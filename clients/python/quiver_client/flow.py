"""Which request is at which broker, and what to say to whom when a connection comes or goes.

No sockets and no clock: the clients feed it connections and messages and send what it puts into
`out`, pairs of (number of the connection, message). A request whose connection is lost is asked for
again with `resume`, at the same broker when it is back or at another; a broker that does not have it
gets the request anew, with what was received so far, so that it goes on there.
"""

from typing import Any, Dict, List, Optional, Tuple

from .errors import ProtocolError
from .types import Delta, Request

GRACE_S = 0.5  # a broker that was lost may come back in this time, before another is asked
RETRY_S = 0.2  # between attempts to resume where a broker asked for patience


class Entry:
    """One request: what it was submitted with, what came of it, and where it is."""

    def __init__(self, message: Dict[str, Any]):
        self.message = message
        self.request = Request(message)
        self.link: Optional[int] = None  # the connection that it is at; None: it has to be sent
        self.sent = False  # some broker may have it
        self.resuming = False  # asked for, not answered yet
        self.only_resume = False  # it cannot be submitted: we do not know what it asks
        self.due = 0.0  # not before this time
        self.tried: set = set()  # connections that do not have it


class Flow:
    def __init__(self, endpoints: List[str]):
        self.endpoints = endpoints
        self.up = [False] * len(endpoints)
        self.entries: Dict[str, Entry] = {}
        self.out: List[Tuple[int, Dict[str, Any]]] = []
        self._turn = 0

    # --- what the clients say

    def submit(self, message: Dict[str, Any], now: float) -> Entry:
        entry = self.entries[message["id"]] = Entry(message)
        self._place(entry, now)
        return entry

    def resume(self, message: Dict[str, Any], seqs: List[int], now: float) -> Entry:
        """A request that some broker has: `message` says its id, n and tenant."""
        entry = self.entries[message["id"]] = Entry(message)
        entry.request.set_seqs(seqs)
        entry.sent = entry.only_resume = True
        self._place(entry, now)
        return entry

    def drop(self, request_id: str) -> None:
        """Forget a request and cancel it where it is."""
        entry = self.entries.pop(request_id, None)
        if entry is not None and entry.link is not None:
            self.cancel(request_id, entry)

    def cancel(self, request_id: str, entry: Optional[Entry] = None) -> None:
        entry = entry or self.entries.get(request_id)
        message = {"type": "cancel", "id": request_id}
        link = entry.link if entry is not None else self.any_link()
        if link is not None:
            self.out.append((link, message))

    def any_link(self) -> Optional[int]:
        """A connection that is up, in turns."""
        n = len(self.up)
        for i in range(n):
            link = (self._turn + i) % n
            if self.up[link]:
                self._turn = link + 1
                return link
        return None

    def connected(self, link: int, now: float) -> None:
        self.up[link] = True
        for entry in list(self.entries.values()):
            if entry.link == link:  # the connection was lost and is back: what was sent may not be
                entry.link = None
                entry.due = now
            entry.tried.discard(link)
        self.poll(now)

    def disconnected(self, link: int, now: float) -> None:
        if not self.up[link]:
            return
        self.up[link] = False
        for entry in self.entries.values():
            if entry.link == link:
                entry.link = None
                entry.due = now + (GRACE_S if len(self.up) > 1 else 0)

    def poll(self, now: float) -> Optional[float]:
        """Place what waits; the time at which to call this again, or None."""
        later = None
        for entry in list(self.entries.values()):
            if entry.link is None and not entry.request.finished:
                if entry.due <= now:
                    self._place(entry, now)
                elif later is None or entry.due < later:
                    later = entry.due
        return later

    def feed(self, link: int, message: Dict[str, Any], now: float) -> Tuple[Optional[Entry], Optional[Delta]]:
        """Take a message about a request; the request and the piece that it brought."""
        if not isinstance(message, dict):
            raise ProtocolError(f"a {type(message).__name__} arrived where a map was due")
        entry = self.entries.get(message.get("id", ""))
        if entry is None or (entry.link != link and not message.get("resumed")):
            return None, None  # forgotten, or gone on elsewhere
        if message.get("type") == "error" and entry.sent and self._retry(entry, link, message, now):
            return None, None
        entry.resuming = False
        entry.tried.clear()
        delta = entry.request.feed(message)
        if entry.request.finished:
            self.entries.pop(entry.request.id, None)
        return entry, delta

    # --- decisions

    def _place(self, entry: Entry, now: float) -> None:
        """Send a request to where it may be: anew, or asked for."""
        links = [i for i, up in enumerate(self.up) if up and i not in entry.tried]
        if not links and entry.tried and any(self.up):  # nobody has it: begin again, with what there is
            link = self.any_link()
            entry.tried.clear()
            self._send(entry, link, entry.request.continued(entry.message))
            return
        if not links:
            entry.due = now + RETRY_S
            return
        self._turn += 1
        link = links[self._turn % len(links)]
        if not entry.sent:
            self._send(entry, link, entry.message)
            return
        entry.resuming = True
        resume = {"type": "resume", "id": entry.request.id, "seqs": entry.request.seqs()}
        if entry.message.get("tenant"):
            resume["tenant"] = entry.message["tenant"]
        if entry.request.digest:
            resume["digest"] = entry.request.digest
        entry.request.resumed = True
        self._send(entry, link, resume)

    def _send(self, entry: Entry, link: int, message: Dict[str, Any]) -> None:
        entry.link = link
        entry.sent = True
        self.out.append((link, message))

    def _retry(self, entry: Entry, link: int, message: Dict[str, Any], now: float) -> bool:
        """Whether an error only says that the request has to be looked for elsewhere, or later."""
        code = message.get("code")
        if entry.only_resume and code == "NOT_FOUND" and not message.get("broker"):
            entry.tried.add(link)
            if all(i in entry.tried for i, up in enumerate(self.up) if up):
                return False
        durable = bool(entry.message.get("durable"))
        if code == "NOT_FOUND" and (entry.resuming or durable):
            entry.resuming = False
            entry.link = None
            entry.due = now
            entry.tried.add(link)
            where = message.get("broker", "")
            known = [i for i, e in enumerate(self.endpoints) if e and e in where.split(",") and self.up[i]]
            if known:
                entry.tried = set(range(len(self.up))) - set(known)
            elif where:  # at a broker that we are not connected to: it may be lost soon
                entry.due = now + RETRY_S
                entry.tried.clear()
            self.poll(now)
            return True
        patience = code == "OVERLOADED" and "retry_after_ms" in message
        if patience and (entry.resuming or (durable and entry.request.resumed)):
            entry.link = None
            entry.due = now + max(RETRY_S, message["retry_after_ms"] / 1000)
            return True
        stopping = code == "OVERLOADED" and message.get("message") == "the broker is stopping"
        if stopping and len(self.up) > 1 and sum(self.up) > 1:
            entry.link = None
            entry.tried = {link}
            entry.due = now
            self.poll(now)
            return True
        return False
