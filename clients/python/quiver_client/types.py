"""What requests and answers are made of, and the bookkeeping that both clients share."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional
from uuid import uuid4

from .errors import ProtocolError, QuiverError


@dataclass
class Delta:
    """A piece of one answer, as it arrives. `index` tells the n answers of a request apart."""

    index: int
    seq: int
    text: str
    tokens: List[int]
    logprobs: Optional[List[float]] = None
    top_logprobs: Optional[list] = None


@dataclass
class Answer:
    """One complete answer."""

    id: str
    index: int = 0
    text: str = ""
    tokens: List[int] = field(default_factory=list)
    finish_reason: str = ""
    usage: Dict[str, int] = field(default_factory=dict)
    timing: Dict[str, float] = field(default_factory=dict)
    worker: str = ""
    adapter: str = ""
    logprobs: Optional[List[float]] = None
    top_logprobs: Optional[list] = None
    prompt_logprobs: Optional[List[Optional[float]]] = None
    prompt_top_logprobs: Optional[list] = None
    warnings: List[str] = field(default_factory=list)


def submit_map(prompt=None, request_id=None, **fields: Any) -> Dict[str, Any]:
    """The map of a `submit`. A str is a prompt, a list of ints tokens, a list of maps messages."""
    message: Dict[str, Any] = {"type": "submit", "id": request_id or uuid4().hex}
    if isinstance(prompt, str):
        message["prompt"] = prompt
    elif isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict):
        message["messages"] = list(prompt)
    elif isinstance(prompt, (list, tuple)):
        message["tokens"] = list(prompt)
    elif prompt is not None:
        raise TypeError(f"prompt is a {type(prompt).__name__}; give a str, token ids or messages")
    message.update({key: value for key, value in fields.items() if value is not None})
    return message


class Request:
    """One request's answers as they build up; no sockets. feed() takes each message in order."""

    def __init__(self, message: Dict[str, Any]):
        self.id = message["id"]
        self.n = message.get("n", 1)
        self.answers = [Answer(id=self.id, index=i) for i in range(self.n)]
        self._next_seq = [0] * self.n
        self._ended = [False] * self.n
        self.resumed = False  # pieces may come again: those that are known are passed over
        self.seed: Optional[int] = message.get("seed")
        self.digest: Optional[str] = None  # of the adapter that answers
        self.error: Optional[QuiverError] = None
        self.warnings: List[str] = []

    @property
    def finished(self) -> bool:
        return self.error is not None or all(self._ended)

    def feed(self, message: Dict[str, Any]) -> Optional[Delta]:
        """Take one message about this request; returns the piece of text that it brought, if any."""
        kind = message.get("type")
        if kind == "accepted":
            self.warnings = message.get("warnings", self.warnings)
            self.seed = message.get("seed", self.seed)
            return None
        if kind == "error":
            self.error = QuiverError(
                message.get("code", "INTERNAL"),
                message.get("message", ""),
                self.id,
                message.get("retry_after_ms"),
            )
            return None
        if kind == "tokens":
            self.digest = message.get("digest", self.digest)
            return self._append(message) if self._is_next(message) else None
        if kind == "done":
            return self._finish(message) if self._is_next(message) else None
        return None

    def seqs(self) -> List[int]:
        """The last number of each stream that is here; -1 = none."""
        return [seq - 1 for seq in self._next_seq]

    def set_seqs(self, seqs: List[int]) -> None:
        self._next_seq = [seq + 1 for seq in seqs]

    def continued(self, message: Dict[str, Any]) -> Dict[str, Any]:
        """The submit that goes on from here at a broker that does not know the request."""
        has_begun = any(seq > 0 for seq in self._next_seq)
        if message.get("durable") or self.seed is None or not has_begun:
            return message
        rows = [
            {"index": a.index, "seq": seq - ended, "tokens": a.tokens, "finished": ended}
            for a, seq, ended in zip(self.answers, self._next_seq, self._ended)
        ]
        version = {"digest": self.digest} if self.digest else {}
        return {**message, **version, "seed": self.seed, "resume": rows}

    def _is_next(self, message: Dict[str, Any]) -> bool:
        index, seq = message["index"], message["seq"]
        if not 0 <= index < self.n:
            raise ProtocolError(f"request {self.id}: answer {index} of {self.n}")
        if seq < self._next_seq[index] and self.resumed:
            return False
        if seq != self._next_seq[index]:
            raise ProtocolError(
                f"request {self.id}, answer {index}: seq {seq} arrived, {self._next_seq[index]} was due"
            )
        self._next_seq[index] += 1
        return True

    def _append(self, message: Dict[str, Any]) -> Delta:
        answer = self.answers[message["index"]]
        answer.text += message["text"]
        answer.tokens += message["tokens"]
        for name in ("logprobs", "top_logprobs"):
            if name in message:
                setattr(answer, name, (getattr(answer, name) or []) + message[name])
        return Delta(
            index=message["index"],
            seq=message["seq"],
            text=message["text"],
            tokens=message["tokens"],
            logprobs=message.get("logprobs"),
            top_logprobs=message.get("top_logprobs"),
        )

    def _finish(self, message: Dict[str, Any]) -> Optional[Delta]:
        answer = self.answers[message["index"]]
        delta = None
        if "text" in message:  # the whole answer, because nothing was streamed
            delta = self._append({"tokens": [], **message})
        for name in ("finish_reason", "usage", "timing", "worker", "adapter", "warnings"):
            if name in message:
                setattr(answer, name, message[name])
        for name in ("prompt_logprobs", "prompt_top_logprobs"):
            setattr(answer, name, message.get(name))
        answer.warnings = answer.warnings or self.warnings
        self._ended[answer.index] = True
        return delta
