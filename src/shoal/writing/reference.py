"""The proof's live side: what a written folder must show, computed on the model while the plan runs on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from shoal.live import running
from shoal.models.context import positions_of
from shoal.models.evaluating import evaluating
from shoal.models.kinds import CAUSAL, auto_of
from shoal.models.opened import open_model
from shoal.models.own_code import runs_own_code
from shoal.models.stacks import find_stacks, unwrap
from shoal.plan import Plan, Shape, Spec, cost
from shoal.writing import proof_child as measure
from shoal.writing.blueprint import Blueprint
from shoal.writing.surgery import blueprint
from shoal.writing.tensors import moved_tensors, resized_tensors

TOKENS = 24
"""Tokens of each sequence whose logits are compared."""
TEXTS = (
    "The harbour was quiet in the early morning, and only a few boats had left for the open water.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))",
    "Question: Which planet is closest to the sun?\nAnswer:",
)


@dataclass(frozen=True)
class Expected:
    """What must be counted in the reloaded model."""

    parameters: int
    depth: int
    kv_per_token: int
    """Bytes."""
    kv_elements: int
    """At `TOKENS` tokens, or as many as the model takes."""
    rows: list[list[int]] | None = None
    weights: dict[str, int] | None = None
    """The bit sum of every tensor."""
    depths: dict[str, int] | None = None
    """By stack, for another kind than a causal model."""
    digest: str | None = None
    """Of the bit sums of an earlier proof, when there is no base to take them from."""


@dataclass(frozen=True)
class Reference:
    """One side of a proof: tensors and figures to compare with, and how to load the folder to compare fairly."""

    expected: Expected
    tensors: dict[str, torch.Tensor]
    """SET.ids and SET.mask, and with a live model SET.uncached and SET.cached, for the sets random, padded and text."""
    device: str
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[list[int], ...] = ()
    tokens: int = 0
    greedy: tuple[tuple[list[int], list[float]], ...] = ()
    """For each prompt the live tokens, and at each the gap between the two highest scores."""
    largest: float = 0.0
    """The largest absolute live logit."""
    auto: str = CAUSAL
    """The Auto class that loads the folder."""
    depths: dict[str, str] | None = None
    """For another kind than a causal model: by stack, the field of its config that holds the depth."""
    adapter: str | None = None
    """The folder of an adapter that peft puts into the reloaded model."""
    needs_shoal: bool = False
    """Whether the fresh process imports `shoal.auto`: a planned checkpoint."""
    carried: frozenset[str] = frozenset()
    """Tensors that the folder holds beside those of its model, as its config announces."""


class LiveSide(NamedTuple):
    """What a model computes while a plan runs on it."""

    tensors: dict[str, torch.Tensor]
    rows: dict[str, Any] | None
    """What `kv_facts` says of its cache."""
    prompts: tuple[list[int], ...]
    tokens: int
    greedy: tuple[tuple[list[int], list[float]], ...]
    largest: float


def live_reference(
    model: nn.Module,
    plan: Plan,
    *,
    tokenizer: Any = None,
    greedy: tuple[int, int] = (3, 32),
    plans: Blueprint | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Reference:
    """Run the forwards of the proof on `model` under `plan`. `greedy`: how many prompts, how many tokens for each.

    Holds no copy of the weights. Raises what `running` and `blueprint` raise.
    """
    inner = unwrap(model)
    plans = plans or blueprint(inner, plan, zero_parts=True, weights=weights)
    spec = open_model(inner).spec
    moved, fewer = expected_weights(inner, plans)
    side = live_side(inner, plan, tokenizer=tokenizer, greedy=greedy, weights=weights)
    expected = counts(plans, spec, inner, side.tensors["random.ids"].shape[1])
    whole = not plans.zeroed  # a part that is only silenced still fills its row of the cache
    return Reference(
        replace(
            expected,
            parameters=expected.parameters - fewer,
            rows=side.rows["rows"] if side.rows is not None and whole else None,
            weights=moved,
        ),
        side.tensors,
        prompts=side.prompts,
        tokens=side.tokens,
        greedy=side.greedy,
        largest=side.largest,
        auto=auto_of(inner) or CAUSAL,
        **load_settings(inner),
    )


def adapter_reference(
    model: PreTrainedModel,
    plan: Plan,
    folder: str,
    *,
    tokenizer: Any = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Reference:
    """What a written folder must compute with the adapter `folder`: what `model`, with the base's adapter in it,
    computes live."""
    side = live_side(model, plan, tokenizer=tokenizer, greedy=(2, 16), weights=weights)
    return Reference(
        Expected(0, 0, 0, 0),
        side.tensors,
        prompts=side.prompts,
        tokens=side.tokens,
        greedy=side.greedy,
        largest=side.largest,
        auto=auto_of(model) or CAUSAL,
        adapter=folder,
        **load_settings(model),
    )


def live_side(
    inner: PreTrainedModel,
    plan: Plan,
    *,
    tokenizer: Any,
    greedy: tuple[int, int],
    weights: Mapping[str, torch.Tensor] | None,
) -> LiveSide:
    """The forwards of the proof on a model under a plan."""
    sets = probe_sets(inner, tokenizer)
    prompts = [prompt for prompt in _prompts(sets, tokenizer, greedy[0]) if len(prompt) < _context(inner)]
    tokens = min(greedy[1], _context(inner) - max(len(p) for p in prompts)) if prompts else 0
    tensors: dict[str, torch.Tensor] = {}
    largest = 0.0
    with quiet(), evaluating(inner), running(inner, plan, weights):
        for name, (ids, mask) in sets.items():
            found = {"uncached": measure.uncached(inner, ids, mask), "cached": measure.cached(inner, ids, mask)}
            largest = max(largest, float(found["uncached"].abs()[mask.bool()].max()))
            found |= {"ids": ids, "mask": mask}
            tensors |= {f"{name}.{kind}": t.cpu().contiguous() for kind, t in found.items() if t is not None}
        rows = measure.kv_facts(inner, *sets["random"])
        chosen = tuple(measure.greedy(inner, torch.tensor([p], device=inner.device), tokens) for p in prompts)
    return LiveSide(tensors, rows, tuple(prompts), tokens, chosen, largest)


def counted_reference(model: PreTrainedModel, *, device: str, digest: str | None = None) -> Reference:
    """What a folder must show when there is no base to compare with: the counts of its own config, and logits that do
    not depend on the cache. `model` may be on the meta device; `digest` is that of an earlier proof."""
    spec = open_model(model).spec
    sets = probe_sets(model, None, device="cpu")
    plan = Plan.identity(spec)
    slots = tuple(range(spec.stack().depth))
    expected = counts(Blueprint(plan, slots, (), model.config, {}), spec, model, sets["random"][0].shape[1])
    tensors = {f"{n}.{kind}": t for n, pair in sets.items() for kind, t in zip(("ids", "mask"), pair, strict=True)}
    return Reference(
        replace(expected, digest=digest),
        tensors,
        auto=auto_of(model) or CAUSAL,
        **load_settings(model) | {"device": device},
    )


def expected_weights(model: PreTrainedModel, plans: Blueprint) -> tuple[dict[str, int], int]:
    """The bit sum of every tensor of the stock model, from those of `model`; and by how many elements the tensors
    outside the layers become smaller."""
    state = model.state_dict()
    base = {name: torch.tensor(value) for name, value in measure.bit_sums(state).items()}
    moved, opened = base, open_model(model)
    new = {name: torch.tensor(value) for name, value in measure.bit_sums(plans.weights).items()}
    fewer = 0
    for stack in find_stacks(model):
        own = plans.of(stack.name)
        moved = moved_tensors(moved, stack, replace(own, weights=new), opened, base)
        resized = resized_tensors(state, stack, own.slots)
        fewer += sum(state[name].numel() - tensor.numel() for name, tensor in resized.items())
        moved |= {name: torch.tensor(value) for name, value in measure.bit_sums(resized).items()}
    return {name: int(value) for name, value in moved.items()}, fewer


def load_settings(model: PreTrainedModel) -> dict[str, Any]:
    """How the fresh process must load a folder to compute as `model` does: device, dtype and options of the load."""
    options = {"attn_implementation": model.config._attn_implementation}
    experts = getattr(model.config, "_experts_implementation", None)
    if experts is not None:
        options["experts_implementation"] = experts
    if runs_own_code(model, model.config):
        options["trust_remote_code"] = True
    return {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."), "options": options}


def probe_sets(
    model: PreTrainedModel, tokenizer: Any, device: str | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(ids, mask) by name: random [1, t], padded [2, t] with its second row padded on the left, and text [1, t]."""
    config = model.config.get_text_config(decoder=True)
    length = max(2, min(TOKENS, _context(model) // 2))  # what a second token adds to the cache is counted
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, : length // 4] = 0
    sets = {"random": (ids[:1], mask[:1]), "padded": (ids[1:], mask[1:])}
    if tokenizer is not None:
        text = torch.tensor([tokenizer(TEXTS[0])["input_ids"][:length]])
        if text.shape[1] > 1 and int(text.max()) < config.vocab_size:
            sets["text"] = (text, torch.ones_like(text))
    place = device or model.device
    return {name: (i.to(place), m.to(place)) for name, (i, m) in sets.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor hints of transformers; both as they were afterwards."""
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def counts(plans: Blueprint, spec: Spec, model: PreTrainedModel, length: int) -> Expected:
    """A stock checkpoint runs whole layers, also where the plan silences a part, so that is what is costed."""
    priced = cost(plans.whole, spec, Shape(context=length))
    reads = dict(plans.readers)
    layers = [spec.stack().layers[i] for slot, i in enumerate(plans.slots) if slot not in reads]
    # the plan's cost says how many tokens a window sees; transformers stores one less, as the next token brings its own
    less = sum(layer.kv.per_token for layer in layers if layer.kv.window is not None and layer.kv.window <= length)
    return Expected(
        parameters=priced.written_params - plans.fewer,
        depth=len(plans.slots),
        kv_per_token=priced.kv_per_token * model.dtype.itemsize,
        kv_elements=priced.kv_elements - less,
    )


def _prompts(sets: dict[str, tuple[torch.Tensor, torch.Tensor]], tokenizer: Any, count: int) -> list[list[int]]:
    """Texts, and random ids when there are not enough of them: a model without a tokenizer generates too."""
    texts = [tokenizer(text)["input_ids"][:TOKENS] for text in TEXTS] if "text" in sets else []
    randoms = [row[: len(row) // 2].tolist() for name in ("random", "padded") for row in sets[name][0]]
    return [*texts, *randoms][:count]


def _context(model: PreTrainedModel) -> int:
    found = positions_of(model) or 0
    return found if found > 1 else 1_000_000
