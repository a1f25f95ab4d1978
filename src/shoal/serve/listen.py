"""From a loaded model to a socket that answers."""

from __future__ import annotations

import copy
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import uvicorn

from shoal.api.assess import tokenizer_of
from shoal.errors import UsageError
from shoal.models.context import positions_of
from shoal.models.kinds import require_causal
from shoal.models.load import Loaded
from shoal.serve.app import OnRequest, Service
from shoal.serve.engine import Engine
from shoal.serve.generating import Prepare
from shoal.serve.limits import Limits
from shoal.serve.metrics import Metrics
from shoal.serve.prompts import Prompts


@contextmanager
def service(
    loaded: Loaded,
    prepare: Prepare,
    *,
    name: str | None = None,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
    key: str | None = None,
    on_request: OnRequest = lambda told: None,
) -> Iterator[Service]:
    """A `Service` whose engine works until the end of the `with`.

    `prepare`: what writes (`shoal.serve.generating`). `name`: what clients call the model, by default its source.
    Raises `DataError` D440 without a tokenizer, `ModelError` for a model that is no decoder, and what entering
    `prepare` raises.
    """
    model, limits = loaded.model, limits or Limits()
    require_causal(model, "serve")
    tokenizer = tokenizer_of(loaded)
    name = name or loaded.source
    prompts = Prompts(
        tokenizer,
        model=name,
        vocabulary=model.get_input_embeddings().num_embeddings,
        context=positions(model, limits.context),
        most=limits.max_tokens,
    )
    # a copy of its own: the generating thread decodes while other threads encode
    decode = partial(copy.deepcopy(tokenizer).decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    metrics = Metrics()
    with Engine(prepare, decode, eos=_eos(model), waiting=limits.waiting, on_end=metrics.ended) as engine:
        metrics.watch(engine)
        made = Service(engine, prompts, metrics, name=name, limits=limits, host=host, key=key, on_request=on_request)
        with closing(made):
            yield made


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address, which does not listen yet. `port` 0 takes a free one. Raises `UsageError` U591."""
    sock = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, UnicodeError) as error:
        if sock is not None:
            sock.close()
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot listen on {host}, port {port}: {why}; give another --host or --port", code="U591"
        ) from None
    return sock


def url(sock: socket.socket) -> str:
    """The address of a bound socket as http://HOST:PORT."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(app: Any, sock: socket.socket, *, drain: int = 30) -> None:
    """Answer on `sock` until SIGTERM or SIGINT; then take nothing new, finish what was begun within `drain` seconds,
    and raise `SystemExit` 0 or `KeyboardInterrupt`. Only in the main thread."""
    # uvicorn drains, then raises the signal again; a server that was told to stop and did has not failed
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        server(app, drain=drain).run(sockets=[sock])
    finally:
        signal.signal(signal.SIGTERM, before)


def server(app: Any, *, drain: int = 30) -> uvicorn.Server:
    """A uvicorn server for an ASGI application, silent but for warnings."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=drain,
    )
    return uvicorn.Server(config)


def _stopped(number: int, frame: Any) -> None:
    raise SystemExit(0)


def positions(model: Any, wanted: int | None) -> int | None:
    """Tokens of prompt and answer together, None when neither the model nor `wanted` names any."""
    known = [n for n in (positions_of(model), wanted) if n is not None and n > 0]
    return min(known, default=None)


def _eos(model: Any) -> frozenset[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
