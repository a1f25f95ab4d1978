"""The routes: completions, chat, models, health, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.serve.answers import Answer
from shoal.serve.engine import ClosedError, Engine, FullError
from shoal.serve.generating import GenerationRequest
from shoal.serve.limits import Limits, RefusedError, is_loopback, read_body, require_key, require_local_name
from shoal.serve.metrics import Metrics
from shoal.serve.prompts import Prompts
from shoal.serve.running_request import CLIENT_LEFT, Events, RunningRequest, Text, stopping
from shoal.serve.schemas import Asked, Chat, Completion, parse

OnRequest = Callable[[dict[str, Any]], None]
"""Told of every request that was answered: method, path, status, seconds."""


class Service:
    """One model at work behind HTTP: `Service(...).app` is an ASGI application.

    `name`: what clients must call the model. `key`: what they must send as a bearer token, None for no key; without one
    a server on a loopback address `host` answers to names of this machine only.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        metrics: Metrics,
        *,
        name: str,
        limits: Limits,
        host: str = "127.0.0.1",
        key: str | None = None,
        on_request: OnRequest = lambda told: None,
    ) -> None:
        self._engine, self._prompts, self._metrics = engine, prompts, metrics
        self.name, self._limits, self._host, self._key = name, limits, host, key
        self._on_request = on_request
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="shoal-encode")
        self._encoding = 0
        self._since = int(time.time())
        self._routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._figures),
        ]
        self.app = Starlette(
            routes=self._routes,
            middleware=[Middleware(_Gate, service=self)],
            exception_handlers={
                RefusedError: _refused,
                HTTPException: _no_such,
                ClientDisconnect: _left,
                Exception: _failed,
            },
        )

    @property
    def can_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._prompts.can_chat

    def close(self) -> None:
        """End the thread that encodes prompts."""
        self._encoder.shutdown(cancel_futures=True)

    def admit(self, request: Request) -> None:
        """Raise `RefusedError` 401 or 403. Health is for everybody on the right name: a supervisor has no key."""
        if self._key is None and is_loopback(self._host):
            require_local_name(request, self._host)
        if request.url.path != "/health":
            require_key(request, self._key)

    def answered(self, request: Request, status: int, seconds: float) -> None:
        """Count a request, under its path when it is one of ours: the names of the others are without end."""
        path = request.url.path
        known = path if any(route.path == path for route in self._routes) else "other"
        self._metrics.requests.labels(known, str(status)).inc()
        self._on_request({"method": request.method, "path": path, "status": status, "seconds": round(seconds, 4)})

    async def _completions(self, request: Request) -> Response | RunningRequest:
        return await self._write(request, Completion)

    async def _chat(self, request: Request) -> Response | RunningRequest:
        return await self._write(request, Chat)

    async def _write(self, request: Request, kind: type[Asked]) -> Response | RunningRequest:
        deadline = asyncio.get_running_loop().time() + self._limits.timeout
        asked = parse(kind, await read_body(request, self._limits))
        self._require_name(asked.model)
        try:
            ids, most = await self._encoded(asked)
            generation = GenerationRequest(ids, most, asked.temperature, asked.top_p, asked.seed, asked.stops)
            events = Events()
            job = self._engine.submit(generation, events)
        except FullError as full:
            wait = str(full.retry_after)
            message = f"the line is full; try again in {wait} s"
            raise RefusedError(429, message, code="queue_full", headers={"Retry-After": wait}) from None
        except ClosedError:
            raise stopping() from None
        answer = Answer(self.name, chat=kind is Chat, with_usage=asked.with_usage)
        exchange = RunningRequest(self._engine, job, events, answer, deadline, self._limits.timeout)
        return exchange if asked.stream else await exchange.whole(request)

    async def _encoded(self, asked: Completion | Chat) -> tuple[tuple[int, ...], int]:
        """The prompt's ids and the tokens that may follow. Who has no place in the line costs no encoding either."""
        self._engine.require_place(coming=self._encoding)
        self._encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, self._prompts.encode, asked)
        finally:
            self._encoding -= 1

    def _require_name(self, name: str) -> None:
        if name != self.name:
            raise RefusedError(
                404,
                f"there is no model {name!r} here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    async def _models(self, request: Request) -> Response:
        return Text({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._require_name(request.path_params["name"])
        return Text(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._since, "owned_by": "shoal"}

    async def _health(self, request: Request) -> Response:
        well = self._engine.alive
        return Text({"status": "ok" if well else "stopped"}, status_code=200 if well else 503)

    async def _figures(self, request: Request) -> Response:
        page, kind = self._metrics.text()
        return Response(page, headers={"Content-Type": kind})


class _Gate:
    """Every request goes through here: who may come in, and what became of it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, begun, status = Request(scope, receive), time.monotonic(), CLIENT_LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._service.admit(request)
            except RefusedError as error:
                await (await _refused(request, error))(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            self._service.answered(request, status, time.monotonic() - begun)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return Text(error.to_dict(), status_code=error.status, headers=error.headers)


async def _no_such(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = RefusedError(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}; see /v1/models, /v1/completions, /v1/chat/completions",
        code="not_found" if error.status_code == 404 else None,
        headers=dict(error.headers or {}),
    )
    return await _refused(request, said)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, RefusedError(500, "the server failed; its log says why", code="server_error"))
