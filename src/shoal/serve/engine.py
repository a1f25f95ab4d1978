"""One model, threads that generate, and a bounded queue in front of them.

Knows nothing of HTTP: a job's events go to a function, which is called from a generating thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from shoal.serve.generating import Generate, GenerationCounts, GenerationRequest, Prepare, at_once_of
from shoal.serve.text import Decode, IncrementalDetokenizer, StopStrings

_log = logging.getLogger("shoal.serve")

Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TextDelta:
    """New text that no stop string can take back any more."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The last event of a job. `tokens`: those generated, the one that ended it included."""

    reason: Reason
    tokens: int


@dataclass(eq=False)
class QueuedRequest:
    """A request that waits or runs, and when what happened to it (seconds of the monotonic clock)."""

    request: GenerationRequest
    on_event: Callable[[TextDelta | Finished], None]
    cancelled: bool = False
    tokens: int = 0
    asked: float = field(default_factory=time.monotonic)
    begun: float | None = None
    first: float | None = None
    ended: float | None = None


class FullError(Exception):
    """No place in the line. `retry_after`: seconds after which one is likely to be free."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the line is full; try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The engine does not work any more."""


class Engine:
    """`with Engine(...) as engine:` starts the generating threads; leaving stops them within a token, and waits.

    `prepare` is entered by the first of them, and what it raises comes out of the `with`; there are as many as calls
    that the function which it yields takes at the same time (`at_once_of`). `decode`: ids to text, used by one thread
    at a time. `eos`: ids that end a text. `waiting`: places in the line, besides the jobs at work. `on_end` is told of
    every job, with its reason and what `generate` counted.
    """

    def __init__(
        self,
        prepare: Prepare,
        decode: Decode,
        *,
        eos: frozenset[int] = frozenset(),
        waiting: int = 16,
        on_end: Callable[[QueuedRequest, Reason, GenerationCounts], None] = lambda job, reason, counts: None,
    ) -> None:
        self._prepare, self._eos, self._on_end = prepare, eos, on_end
        self._decode, self._waiting, self._at_once = _one_at_a_time(decode), waiting, 1
        self._queue: deque[QueuedRequest] = deque()
        self._running: set[QueuedRequest] = set()
        self._change = threading.Condition()
        self._open = False
        self._failure: BaseException | None = None
        self._seconds: deque[float] = deque([1.0], maxlen=16)
        self._thread = threading.Thread(target=self._live, name="shoal-serve", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        with self._change:
            self._change.wait_for(lambda: self._open or self._failure is not None)
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._change:
            self._open = False
            for job in (*self._queue, *self._running):
                job.cancelled = True
            self._change.notify_all()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._open and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Jobs in the line."""
        return len(self._queue)

    @property
    def working(self) -> int:
        """Jobs at work."""
        return len(self._running)

    def require_place(self, coming: int = 0) -> None:
        """Raise what `submit` would raise now, or when `coming` others have joined the line."""
        if not self.alive:
            raise ClosedError("the engine is closed")
        if len(self._queue) + self.working + coming >= self._waiting + self._at_once:
            mean = sum(self._seconds) / len(self._seconds)
            raise FullError(min(60, max(1, math.ceil(mean))))

    def submit(self, request: GenerationRequest, on_event: Callable[[TextDelta | Finished], None]) -> QueuedRequest:
        """Join the line. Raises `FullError` or `ClosedError`."""
        job = QueuedRequest(request, on_event)
        with self._change:
            self.require_place()
            self._queue.append(job)
            self._change.notify_all()
        return job

    def cancel(self, job: QueuedRequest) -> None:
        """Leave the line, or stop within a token; a job that has ended stays as it is."""
        with self._change:
            job.cancelled = True
            if job in self._queue:
                self._queue.remove(job)
                self._on_end(job, "cancelled", GenerationCounts())
                self._tell(job, Finished("cancelled", 0))

    def _live(self) -> None:
        try:
            with self._prepare() as generate:
                with self._change:
                    self._open, self._at_once = True, at_once_of(generate)
                    self._change.notify_all()
                others = [threading.Thread(target=self._work_on, args=(generate,)) for _ in range(self._at_once - 1)]
                for other in others:
                    other.start()
                self._work_on(generate)
                for other in others:
                    other.join()
        except BaseException as error:  # whatever it is, it is raised where the engine was started
            with self._change:
                self._failure = error
                self._change.notify_all()
        finally:
            with self._change:
                self._open = False
                for job in (*self._running, *self._queue):
                    self._tell(job, Finished("error", job.tokens))
                self._running.clear()
                self._queue.clear()

    def _work_on(self, generate: Generate) -> None:
        while self._work_on_next(generate):
            pass

    def _work_on_next(self, generate: Generate) -> bool:
        # a function of its own: a name in the loop would keep the last request alive as long as none comes
        job = self._next()
        if job is not None:
            self._work(job, generate)
        return job is not None

    def _next(self) -> QueuedRequest | None:
        with self._change:
            self._change.wait_for(lambda: self._queue or not self._open)
            if not self._queue:
                return None
            job = self._queue.popleft()
            self._running.add(job)
            return job

    def _work(self, job: QueuedRequest, generate: Generate) -> None:
        job.begun = time.monotonic()
        writing = _Writing(job, self._decode, self._eos, self._tell)
        reason: Reason = "error"
        counts = GenerationCounts()
        try:
            if not job.cancelled:
                counts = generate(job.request, writing.on_tokens)
                writing.finish()
            reason = "cancelled" if job.cancelled else writing.reason()
        except ClosedError:  # nothing is generated any more, whoever asks
            _log.exception("generation has ended")
            with self._change:
                self._open = False
                self._change.notify_all()
        except Exception:  # one request must not end the others': out of memory, a fault of the model's code
            _log.exception("a generation failed")
        job.ended = time.monotonic()
        self._seconds.append(job.ended - job.begun)
        self._on_end(job, reason, counts)
        with self._change:
            self._running.discard(job)  # before the answer is whole: whoever has it may ask again at once
        self._tell(job, Finished(reason, job.tokens))

    @staticmethod
    def _tell(job: QueuedRequest, event: TextDelta | Finished) -> None:
        try:
            job.on_event(event)
        except RuntimeError:  # the event loop that it belongs to is closed: nobody listens any more
            job.cancelled = True


def _one_at_a_time(decode: Decode) -> Decode:
    lock = threading.Lock()

    def decoded(ids: Sequence[int]) -> str:
        with lock:
            return decode(ids)

    return decoded


class _Writing:
    """The text of one job while it grows."""

    def __init__(
        self,
        job: QueuedRequest,
        decode: Decode,
        eos: frozenset[int],
        tell: Callable[[QueuedRequest, TextDelta | Finished], None],
    ) -> None:
        self._job, self._eos, self._tell = job, eos, tell
        self._pieces, self._stops = IncrementalDetokenizer(decode), StopStrings(job.request.stop)
        self._last: int | None = None

    def on_tokens(self, new: list[int]) -> bool:
        if self._job.first is None and new:
            self._job.first = time.monotonic()
        text = ""
        for token in new:
            if self._stops.found:
                break
            self._job.tokens += 1
            self._last = token
            if token not in self._eos:  # not every tokenizer knows that it is a special one
                text += self._stops.add(self._pieces.add(token))
        self._say(text)
        return self._stops.found or self._job.cancelled

    def finish(self) -> None:
        if not self._stops.found:
            self._say(self._stops.add(self._pieces.rest()))
        self._say(self._stops.rest())

    def reason(self) -> Reason:
        stopped = self._stops.found or self._last in self._eos
        return "length" if not stopped and self._job.tokens >= self._job.request.max_new_tokens else "stop"

    def _say(self, text: str) -> None:
        if text:
            self._tell(self._job, TextDelta(text))
