"""shoal serve: a model behind an OpenAI-compatible server, with a plan running on it or not."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import emit, loading, open_model, progress_bars, resolved
from shoal.errors import UsageError


def serve(
    model: options.Model,
    plan: options.PlanText = None,
    policy: options.PolicyText = None,
    kv_cache: options.KVCache = None,
    speculate: Annotated[
        str | None, typer.Option("--speculate", help="Self-speculation, as exit:8 (shoal ls drafts).")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Compile the layers before the first request; for many tokens.")
    ] = False,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="SHOAL_API_KEY", show_default=False, help="What clients must send."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model (default: MODEL).")] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option("--max-num-seqs", min=1, help="Requests in one forward (default: 16, with a plan alone)."),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that may wait; more get 429.")] = 16,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for a request, waiting too.")] = 300.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens of one request.")] = 1024,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens of prompt and answer (default: the model's).")
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="KiB of one request.")] = 1024,
    drain: Annotated[int, typer.Option("--drain", min=0, help="Seconds to finish in after SIGTERM.")] = 30,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the address and each request as a JSON line.")] = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Answer OpenAI-compatible requests on this machine until Ctrl-C."""
    if dry_run:
        _tell_settings(json_)
        return
    _require_extra()
    from shoal.api.kv_cache import refuse_beside_kv_cache
    from shoal.decoding.decoder import LONGEST
    from shoal.serve.dynamic import chosen_way, tokens_cached
    from shoal.serve.limits import Limits, is_loopback
    from shoal.serve.listen import bind, listen, positions, service, url

    refuse_beside_kv_cache(kv_cache, policy=policy is not None, speculate=speculate is not None, fast=fast)
    if fast and (policy, speculate) != (None, None):
        raise UsageError("--fast is for plans that decide nothing; leave out --policy and --speculate", code="U567")
    if speculate is not None and (plan, policy) != (None, None):
        raise UsageError("--speculate drafts for the whole model; leave out --plan and --policy", code="U593")
    alone = fast or (policy, speculate, kv_cache) != (None, None, None)
    if alone and max_num_seqs not in (None, 1):
        raise UsageError(
            "--policy, --speculate, --fast and --kv-cache write one text at a time; leave out --max-num-seqs",
            code="U752",
        )
    at_once = 1 if alone else max_num_seqs
    if api_key is not None and (not api_key.isascii() or not api_key or api_key != api_key.strip()):
        raise UsageError(
            "the API key is empty, or has spaces around it or letters that are not ASCII; give another, or none",
            code="U592",
        )
    with bind(host, port) as sock:  # first: a port that is taken is known before a model is loaded
        if api_key is None and not is_loopback(host):
            typer.echo(f"shoal: anyone who reaches {host} can use this server; give it an --api-key", err=True)
        with progress_bars(quiet):
            loaded, chosen, weights = open_model(
                model, plan, **loading(device, dtype, trust_remote_code, device_map=device_map)
            )
        known = positions(loaded.model, context)
        longest = (known or LONGEST) if fast else None
        cached = tokens_cached(at_once, known, context)
        limits = Limits(
            queue, max_tokens, timeout, max_body << 10, context if at_once == 1 else min(known or cached, cached)
        )
        way = {"policy": policy, "draft": speculate, "kv_cache": kv_cache}
        with service(
            loaded,
            chosen_way(loaded, chosen, weights, **way, compiled=longest, at_once=at_once, cached=cached),
            name=name,
            limits=limits,
            host=host,
            key=api_key,
            on_request=lambda request: _log_request(request, as_json=json_, quiet=quiet),
        ) as made:
            sock.listen(128)
            said = {"plan": None if chosen is None else str(chosen), "policy": policy, "draft": speculate}
            said |= {} if kv_cache is None else {"kv_cache": kv_cache}
            _tell_address(url(sock), made.name, said, chat=made.can_chat, key=api_key is not None, as_json=json_)
            listen(made.app, sock, drain=drain)


def _require_extra() -> None:
    try:
        import prometheus_client
        import pydantic
        import starlette
        import uvicorn
    except ImportError as error:
        raise UsageError(
            f"shoal serve needs {error.name}, which is not installed; pip install 'shoal[serve]'", code="U590"
        ) from None
    del prometheus_client, pydantic, starlette, uvicorn


def _tell_settings(as_json: bool) -> None:
    """The options as a config file holds them; the key, which may come from the environment, is nobody's to see."""
    import yaml

    plain = {key: value for key, value in resolved().items() if key != "api_key"}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    emit({"config": text}, text, as_json=as_json)


def _tell_address(address: str, name: str, way: dict[str, str | None], *, chat: bool, key: bool, as_json: bool) -> None:
    if as_json:
        _line({"address": address, "model": name, **way})
        return
    path = "chat/completions" if chat else "completions"
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    body = shlex.quote(json.dumps({"model": name, **said}, ensure_ascii=False))
    authorization = '-H "Authorization: Bearer $SHOAL_API_KEY" ' if key else ""
    said_way = ", ".join(one for one in way.values() if one is not None)
    typer.echo(f"{name}{said_way and f' ({said_way})'} at {address}/v1")
    typer.echo(f"curl {address}/v1/{path} -H 'Content-Type: application/json' {authorization}-d {body}")


def _log_request(request: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    # the answer is sent: that nobody reads the log any more must not become a fault of the request
    with suppress(OSError):
        if as_json:
            _line(request)
        elif not quiet:
            typer.echo(
                f"{request['method']} {request['path']} {request['status']} {request['seconds']:.3f} s", err=True
            )


def _line(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False))
