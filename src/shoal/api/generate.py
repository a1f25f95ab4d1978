"""generate: what a model writes, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shoal.api.assess import Source, opened, tokenizer_of
from shoal.api.depths import DepthStreamer, WrittenToken
from shoal.api.kv_cache import refuse_beside_kv_cache
from shoal.api.prompts import encoded
from shoal.compressing.cache import cache_to_write
from shoal.decoding.arguments import sampling, stopping
from shoal.decoding.decoder import Decoder
from shoal.decoding.streaming import TextPieces
from shoal.errors import UsageError
from shoal.executing.weights import Tensors
from shoal.graphs import fused
from shoal.live import Running, running
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_causal
from shoal.models.opened import open_model
from shoal.plan import Given, Plan


@dataclass(frozen=True)
class Answer:
    """What was written."""

    prompt: str
    text: str
    tokens: int
    plan: str | None
    policy: str | None = None
    trace: dict[str, Any] | None = None
    """With a policy: how deep each token went and what ran (`shoal.deciding.trace.Trace.to_dict`), and `written`: text,
    layers and confidence of each token that was written (`WrittenToken`)."""
    kv_cache: str | None = None
    graph: str | None = None
    """With graphs: what computed otherwise, and how far the logits are from those without (`Fused.describe`)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    loaded: Source,
    prompt: str,
    *,
    plan: Given | None = None,
    weights: Tensors | None = None,
    policy: str | None = None,
    kv_cache: str | None = None,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float = 1.0,
    chat: bool | None = None,
    seed: int = 0,
    fast: bool = False,
    graphs: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[WrittenToken], None] | None = None,
) -> Answer:
    """Generate from `prompt` with the model's own `generate`, under `plan` (with its `weights`) when one is
    given, and under `policy`, as `exit:confidence=0.9` or the policy.json of `shoal calibrate`; `on_text` is called
    with each finished piece of text, with a policy `on_token` with each token and its depth. `loaded`: what
    `shoal.load` gives, or what it takes. `kv_cache`: compress rows of the KV cache, as `minicache:start=16`. `fast`:
    compile the layers first, and raise what `FastDecoder` raises where that cannot be. `graphs`: other matrix products
    for the same logits (`shoal.graphs.fused`, and what it raises; U662 beside `fast`). Raises D440 without a tokenizer,
    P130 to P138 for a policy that cannot decide on this model, U605 for one calibrated for another, M379 for a
    generation config by which transformers cannot generate, U660 for a KV cache beside a policy or compiled layers, and
    what `cache_to_write` raises."""
    refuse_beside_kv_cache(kv_cache, policy=policy is not None, fast=fast)
    if fast and graphs:
        raise UsageError("compiled layers are fused by the compiler; leave out --fast or --graph", code="U662")
    loaded = opened(loaded)
    require_causal(loaded.model, "generate")
    tokenizer, inputs = tokenizer_of(loaded), encoded(loaded, prompt, chat)
    torch.manual_seed(seed)
    trace = None
    with ExitStack() as stack:
        handle = stack.enter_context(_ready(loaded.model, plan, weights, policy))
        graph = stack.enter_context(fused(loaded.model, *graphs)).describe() if graphs else None
        stack.enter_context(evaluating(loaded.model))
        streamer: Any = None if on_text is None else TextPieces(tokenizer, on_text)
        if handle is not None and handle.policy is not None:
            streamer = DepthStreamer(tokenizer, handle, on_token=on_token, on_text=on_text)
            stack.enter_context(streamer.watching(loaded.model))
        over = (
            {} if kv_cache is None else {"past_key_values": cache_to_write(loaded.model, kv_cache, inputs["input_ids"])}
        )
        ids = Decoder(loaded.model, compiled=fast).generate(
            **inputs,
            **sampling(temperature if sample else 0.0),
            **stopping(loaded.model, tokenizer),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **over,
        )
        if isinstance(streamer, DepthStreamer):
            trace = streamer.trace()
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Answer(prompt, text, len(new), None if plan is None else str(plan), policy, trace, kv_cache, graph)


def _ready(
    model: Any, plan: Given | None, weights: Tensors | None, policy: str | None
) -> AbstractContextManager[Running | None]:
    if policy is not None:
        return running(model, Plan.identity(open_model(model).spec) if plan is None else plan, weights, policy=policy)
    return nullcontext() if plan is None else running(model, plan, weights)
