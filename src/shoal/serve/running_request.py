"""One request while its job runs: events of the generating thread become an answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from shoal.serve.answers import Answer, event, used
from shoal.serve.engine import Engine, Finished, QueuedRequest, TextDelta
from shoal.serve.limits import RefusedError

CLIENT_LEFT = 499
"""The status, nginx's, under which a request is counted that nobody waits for any more."""


class Events:
    """What happened to a job, handed from the generating thread to the event loop that this is made on."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[TextDelta | Finished] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def __call__(self, happened: TextDelta | Finished) -> None:
        """Called from any thread. Raises `RuntimeError` when the loop is closed."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, happened)

    async def next(self, deadline: float) -> TextDelta | Finished:
        """The next event. Raises `TimeoutError` at `deadline`, in the loop's time."""
        return await asyncio.wait_for(self._queue.get(), max(0.0, deadline - self._loop.time()))


@dataclass
class RunningRequest:
    """One request. `deadline`: in the loop's time; `timeout`: the seconds that were allowed, for the message."""

    engine: Engine
    job: QueuedRequest
    events: Events
    answer: Answer
    deadline: float
    timeout: float

    async def whole(self, request: Request) -> Response:
        """The answer in one piece. A client that leaves or a time that is over ends the generation."""
        collected = asyncio.ensure_future(self._collect())
        left = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({collected, left}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                return Response(status_code=CLIENT_LEFT)
            return collected.result()
        finally:
            self.engine.cancel(self.job)
            for task in (collected, left):
                task.cancel()
            await asyncio.gather(collected, left, return_exceptions=True)

    async def _collect(self) -> Response:
        pieces: list[str] = []
        while isinstance(happened := await self._next(), TextDelta):
            pieces.append(happened.text)
        return Text(self.answer.whole("".join(pieces), happened.reason, self._used(happened)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as a stream of server-sent events."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        response = StreamingResponse(self._chunks(), media_type="text/event-stream", headers=headers)
        try:
            await response(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self.engine.cancel(self.job)

    async def _chunks(self) -> AsyncIterator[bytes]:
        if (first := self.answer.first()) is not None:
            yield event(first)
        try:
            while isinstance(happened := await self._next(), TextDelta):
                yield event(self.answer.piece(happened.text))
        except RefusedError as error:  # the status is sent already
            yield event(error.to_dict())
            return
        yield event(self.answer.last(happened.reason))
        if self.answer.with_usage:
            yield event(self.answer.usage(self._used(happened)))
        yield event("[DONE]")

    async def _next(self) -> TextDelta | Finished:
        """The next event of a generation that goes well. Raises `RefusedError` for any other."""
        try:
            happened = await self.events.next(self.deadline)
        except TimeoutError:
            message = f"the answer was not ready within {self.timeout:g} s; ask for fewer tokens or try again later"
            raise RefusedError(504, message, code="timeout") from None
        if isinstance(happened, Finished) and happened.reason == "cancelled":
            raise stopping()
        if isinstance(happened, Finished) and happened.reason == "error":
            raise RefusedError(500, "the generation failed; the server's log says why", code="generation_failed")
        return happened

    def _used(self, end: Finished) -> dict[str, int]:
        return used(len(self.job.request.ids), end.tokens)


class Text(JSONResponse):
    """JSON in which a lone surrogate, which UTF-8 does not have, is a question mark."""

    def render(self, content: object) -> bytes:
        """Called by starlette."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def stopping() -> RefusedError:
    """The answer of a server that is being stopped."""
    return RefusedError(503, "the server is stopping; try again later", code="stopping", headers={"Retry-After": "5"})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
