"""What is refused before a model is asked, each time with an answer in OpenAI's shape."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    `waiting`: requests in the line, besides the one at work. `max_tokens`: new tokens of one request. `timeout`:
    seconds from the first byte of a request to the last of its answer. `max_body`: bytes of a request. `context`:
    tokens of prompt and answer together; None for what the model has.
    """

    waiting: int = 16
    max_tokens: int = 1024
    timeout: float = 300.0
    max_body: int = 1 << 20
    context: int | None = None


class RefusedError(Exception):
    """An HTTP status and an error in OpenAI's shape; `param` names the field of the request that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def require_key(request: Request, key: str | None) -> None:
    """Raise 401 unless the request carries `Authorization: Bearer KEY`; the comparison takes as long for any key."""
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise RefusedError(
            401,
            "the API key is missing or wrong; send Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def require_local_name(request: Request, address: str) -> None:
    """Raise 403 when a page of the web reaches a server on the loopback address through a name of its own (DNS
    rebinding): then the Host header is neither `localhost` nor an address of this machine."""
    name = request.url.hostname or ""
    if not is_loopback(name) and name != address:
        raise RefusedError(
            403,
            f"this server listens on {address} and does not answer as {name!r}; ask for {address}, or start it with "
            "an API key",
            code="host_not_allowed",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises 415 for a type that is no JSON, 413 for too many bytes, 408 when they come too slowly."""
    # a form on any page of the web can post other types to this machine without asking; JSON it cannot
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, f"the content type is {kind or 'missing'!r}; send application/json")
    too_large = RefusedError(
        413, f"the request has more than {limits.max_body} bytes, this server's limit; send less", code="too_large"
    )
    said = request.headers.get("content-length", "0")
    if not said.isdecimal() or int(said) > limits.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body:
                    raise too_large
    except TimeoutError:
        raise RefusedError(408, f"the request did not arrive within {limits.timeout:g} s; send it faster") from None
    return bytes(body)
