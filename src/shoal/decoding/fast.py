"""Decoding with as little as possible between two tokens: a thin loop and compiled layers, the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers.cache_utils import StaticCache

from shoal.decoding.arguments import GREEDY_ALONE
from shoal.decoding.fast_layers import Call, compiled_call, compiled_calls, standing_in
from shoal.decoding.fast_legal import (
    refuse_arguments,
    refuse_deciding,
    refuse_difference,
    refuse_model,
    refuse_settings,
    why_not_compiled,
)
from shoal.decoding.fast_loop import Forward, Inputs, thin_loop
from shoal.decoding.listening import NewTokens
from shoal.errors import UsageError
from shoal.executing.bind import BoundPlan, bind, refuse_second_plan
from shoal.executing.timing import synchronized_time
from shoal.models.calls import device_of
from shoal.models.opened import open_model
from shoal.models.stacks import unwrap
from shoal.plan import Plan

Mode = Literal["auto", "layers", "step", "off"]
Menu = Mapping[str, Plan | str]
Key = tuple[str | None, int, int, int]

LEAST_LENGTH = 256
"""Places in the smallest cache of fixed length; longer ones double, so that few lengths are ever compiled for."""
CHECKED_TOKENS = 16
"""Tokens of the prompt on which a compiled step is compared with the model's own before it is used."""


@dataclass(frozen=True)
class Compiled:
    """What compiling for one plan, batch and length took, and how far its step is from the model's own."""

    plan: str | None
    batch: int
    length: int
    """Places in the cache: tokens of the prompt and new ones together."""
    seconds: float
    """Wall clock of the first compiled step."""
    difference: float
    """Largest difference of its logits, relative to the largest logit."""


class FastDecoder:
    """Greedy and sampled decoding of one model under one plan, none, or a menu of plans.

    The tokens are those of `model.generate` with the same arguments: its processors, stopping criteria and streamers
    are kept. Compiled arithmetic takes sums in another order, so logits agree to rounding and a tie may fall the other
    way. The model is as it was between two calls.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | str | Menu | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        *,
        mode: Mode = "auto",
        backend: str = "inductor",
    ) -> None:
        """`plan`: what `shoal.running` takes, or a menu {name: plan}; None runs the model as it is, a plan that is
        running already included. `weights`: the tensors that the plans name, as `running` takes them.

        `mode`: "layers" compiles the layers and the head one by one (seconds, whatever the depth, shared by all
        plans), "step" the whole step (minutes on a CPU, once a plan; with CUDA graphs on a GPU), "off" neither. "auto"
        is "layers" on a CPU, "step" elsewhere, and "off" for a model that cannot be compiled (`why_off` says why).
        `backend`: torch.compile's. Raises `PlanError` as `running` does, and `UsageError`: U563 a model that does not
        continue text, is in training mode, or cannot be compiled although asked for, U565 a menu without a plan or an
        unknown way to compile.
        """
        self.model: Any = unwrap(model)
        refuse_model(self.model)
        if mode not in get_args(Mode):
            known = ", ".join(get_args(Mode))
            raise UsageError(f"mode={mode!r} is unknown; use one of {known}", code="U565")
        if isinstance(plan, Mapping) and not plan:
            raise UsageError("the menu holds no plan; give one or more by name", code="U565")
        self.why_off = why_not_compiled(self.model)
        if self.why_off is not None and mode in ("layers", "step"):
            raise UsageError(
                f'{type(self.model).__name__} cannot be compiled: {self.why_off}; use mode="off"', code="U563"
            )
        own = "layers" if device_of(self.model).type == "cpu" else "step"
        self.mode = ("off" if self.why_off else own) if mode == "auto" else mode
        self.compiled: dict[Key, Compiled] = {}
        """What was compiled so far."""
        self._backend = backend
        self._calls: dict[Any, Call] = {}
        self._caches: dict[str | None, tuple[Key, StaticCache]] = {}
        self._planned = {name: None if one is None else _bound(self.model, one, weights) for name, one in _named(plan)}

    @property
    def plans(self) -> list[str]:
        """The names of the menu; none when there is no menu."""
        return [name for name in self._planned if name is not None]

    def generate(self, inputs: torch.Tensor | None = None, *, plan: str | None = None, **kwargs: Any) -> torch.Tensor:
        """Token ids [batch, prompt + new]: what `model.generate(inputs, **kwargs)` returns.

        `inputs`: token ids [batch, prompt], left-padded with their `attention_mask` where they differ in length.
        `plan`: a name of the menu; needed when there is one. Raises `UsageError`: U562 an argument that the fast path
        does not take (beams, assistants, scores, caches, ...), U563 a model in training mode, U564 a compiled step that
        is not the model's own, U566 a name that the menu does not have, U567 when something that runs on the model
        decides token by token; `PlanError` P122 when another plan is running.
        """
        refuse_arguments(kwargs)
        refuse_model(self.model)
        if plan not in self._planned:
            names = ", ".join(self.plans) or "no plans by name"
            raise UsageError(f"plan={plan!r} is not in the menu; it has {names}", code="U566")
        streamer = kwargs.get("streamer")
        refuse_deciding([stack.layers for stack in open_model(self.model).stacks])

        def loop(model: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
            refuse_settings(prepared["generation_config"])
            write = thin_loop if self.mode == "off" else partial(self._loop, plan)
            return write(model, input_ids, streamer=streamer, **prepared)

        with self._switched(plan):
            refuse_deciding([stack.layers for stack in open_model(self.model).stacks])
            stock = type(self.model).generate  # the instance's may be this very method
            tokens: torch.Tensor = stock(self.model, inputs, custom_generate=loop, **kwargs)
        return tokens

    def prepare(self, tokens: int) -> None:
        """Compile for one sequence of up to `tokens` tokens, for every plan of the menu, by writing two tokens."""
        ids = torch.ones((1, CHECKED_TOKENS), dtype=torch.long, device=device_of(self.model))
        asked = GREEDY_ALONE | {"min_new_tokens": 2, "max_new_tokens": tokens - CHECKED_TOKENS}
        for plan in self._planned:
            second = NewTokens(CHECKED_TOKENS + 1, bool)  # not the first: that one comes from the prompt's pass
            self.generate(ids, plan=plan, attention_mask=torch.ones_like(ids), stopping_criteria=[second], **asked)

    def _loop(
        self, plan: str | None, model: Any, input_ids: torch.Tensor, *, generation_config: Any, **prepared: Any
    ) -> torch.Tensor:
        """The thin loop over a compiled step and a cache of fixed length; `prepared`: what `generate` made ready."""
        key, cache = self._cache(plan, input_ids.shape[0], generation_config.max_length)
        forward, modules = self._compiled_step(key)
        if key not in self.compiled:
            own = ("streamer", "logits_processor", "stopping_criteria")
            inputs = {name: value for name, value in prepared.items() if name not in own}
            self._check(key, forward, modules, cache, input_ids, generation_config, inputs)
        cache.reset()
        prepared |= {"generation_config": generation_config, "past_key_values": cache}
        return thin_loop(model, input_ids, forward=forward, stepping=standing_in(modules), **prepared)

    def _check(
        self,
        key: Key,
        forward: Forward,
        modules: list[tuple[nn.Module, Any]],
        cache: StaticCache,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        """Compile by running one step, and compare it with the model's own step on the cache that it would use."""
        ids, kwargs = _shortened(input_ids, model_kwargs)
        own = self.model._prefill(ids, generation_config, kwargs)
        after = torch.cat([ids, own.logits[:, -1:].argmax(-1)], dim=-1)
        want = self.model(**Inputs(self.model, own, dict(kwargs)).after(after)).logits[:, -1]
        cache.reset()
        kwargs["past_key_values"] = cache
        first = self.model._prefill(ids, generation_config, kwargs)
        inputs = Inputs(self.model, first, kwargs).after(after)
        with standing_in(modules):
            start = synchronized_time(ids.device)
            have = forward(**inputs).logits[:, -1]
            seconds = synchronized_time(ids.device) - start
        plan, batch, length, _ = key
        self.compiled[key] = Compiled(plan, batch, length, seconds, refuse_difference(want, have))

    def _cache(self, plan: str | None, batch: int, tokens: int) -> tuple[Key, StaticCache]:
        """The cache for this plan: rows stay in the plan's order, so each plan of a menu keeps its own."""
        length = max(LEAST_LENGTH, 1 << (tokens - 1).bit_length())
        key = plan, batch, length, torch.get_num_threads()
        if plan not in self._caches or self._caches[plan][0] != key:
            self._caches[plan] = key, StaticCache(config=self.model.config, max_cache_len=length)
        return self._caches[plan]

    def _compiled_step(self, key: Key) -> tuple[Forward, list[tuple[nn.Module, Any]]]:
        """What runs a step, and what stands in for which modules meanwhile."""
        sliding = any(self._caches[key[0]][1].is_sliding)
        own: Any = key if self.mode == "step" else key[1:]
        if own not in self._calls:
            self._calls[own] = compiled_call(self._options(), self._backend, dynamic=None if sliding else False)
        call = self._calls[own]
        if self.mode == "layers":
            return self.model, compiled_calls(self.model, open_model(self.model).stack("decoder"), call)

        def forward(**inputs: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return call(self.model, (), inputs)

        return forward, []

    def _options(self) -> dict[str, Any] | None:
        if self._backend != "inductor":
            return None
        from shoal.decoding.fast_matvec import OneRow  # the compiler takes a second to import

        return {"post_grad_custom_pre_pass": OneRow(), "triton.cudagraphs": device_of(self.model).type == "cuda"}

    @contextmanager
    def _switched(self, plan: str | None) -> Iterator[None]:
        """Run that plan; afterwards the model is as it was. Raises P122 when another plan is running."""
        bound = self._planned[plan]
        with nullcontext() if bound is None else bound.running():
            yield


@contextmanager
def fast_generate(model: nn.Module, *, mode: Mode = "auto") -> Iterator[FastDecoder]:
    """`model.generate` takes the fast path inside; what `FastDecoder` raises, it raises. A plan may be put on and taken
    off meanwhile."""
    decoder = FastDecoder(model, mode=mode)
    inner = decoder.model
    try:
        inner.generate = decoder.generate
        yield decoder
    finally:
        inner.__dict__.pop("generate", None)


def _bound(model: nn.Module, plan: Plan | str, weights: Mapping[str, torch.Tensor] | None) -> BoundPlan:
    opened = open_model(model)
    refuse_second_plan(opened)
    return bind(opened, plan, weights)


def _named(plan: Plan | str | Menu | None) -> Iterator[tuple[str | None, Plan | str | None]]:
    if isinstance(plan, Mapping):
        yield from plan.items()
    else:
        yield None, plan


def _shortened(input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The last tokens of the prompt with their mask and positions; all of it when more goes with them."""
    kwargs = dict(model_kwargs)
    length = input_ids.shape[1]
    along = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and value.shape[-1] == length}
    if not along <= {"attention_mask", "position_ids"}:
        return input_ids, kwargs
    for name in along:
        kwargs[name] = kwargs[name][..., -CHECKED_TOKENS:]
    return input_ids[:, -CHECKED_TOKENS:], kwargs
