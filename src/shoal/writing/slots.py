"""The slots of a stock model: a layer of the plan in each, or an attention run with the mlp run behind it."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from shoal.errors import WriteError, first_line
from shoal.models.families import family_of
from shoal.models.halves import Halves, follows
from shoal.models.meta import meta_model
from shoal.models.opened import open_model
from shoal.models.stacks import Stack, find_stacks
from shoal.plan import Run, format_steps
from shoal.plan.capabilities import refusals, refused
from shoal.plan.select import paired
from shoal.plan.steps import Step
from shoal.writing.blueprint import AND, MlpHalf, StackSlots
from shoal.writing.same_layers import first_difference
from shoal.writing.shared_kv import native_readers

Slot = tuple[Run, MlpHalf | None]
"""What one layer of a stock model runs: a layer or a part of it, or an attention and the mlp of another run."""


def slots_of(
    model: PreTrainedModel, stack: Stack, steps: tuple[Step, ...], *, zero_parts: bool, joined: bool = True
) -> StackSlots:
    """The slots of `steps`. An attention run with an mlp run behind it is one slot, whatever layers they are of; what
    a layer's place makes of it (mask, window, rotary tables, its entries in the config) is that of the attention's.

    `zero_parts`: any other run of a part is a slot too, whose other part is zeroed. Raises W201-W205 and W210 for what
    no stock layer does, W283 for an attention and an mlp that are no layer together.
    """
    readers = native_readers(model, stack, steps)
    for no in refusals(steps, "written"):
        if no.trait != "part" and not (no.trait == "KV source" and readers):
            raise WriteError(no.message, code=no.code)
    pairs = paired(steps)
    found = [one for run, mlp in pairs for one in _slots(model, stack, run, mlp, zero_parts=zero_parts, joined=joined)]
    return StackSlots(
        tuple(run.layer for run, _ in found),
        tuple(
            (slot, "mlp" if run.part == "attention" else "attention")
            for slot, (run, half) in enumerate(found)
            if run.part != "layer" and half is None
        ),
        tuple((slot, AND.join(run.ids)) for slot, (run, _) in enumerate(found) if run.ids),
        tuple((slot, run.tied_to) for slot, (run, _) in enumerate(found) if run.tied_to is not None),
        tuple((slot, half) for slot, (_, half) in enumerate(found) if half is not None),
        readers,
    )


def _slots(
    model: PreTrainedModel, stack: Stack, run: Run, mlp: Run | None, *, zero_parts: bool, joined: bool
) -> list[Slot]:
    if mlp is None:
        alone = None if zero_parts or run.part == "layer" else refused("part", "written", run)
        if alone is not None:
            raise WriteError(alone.message, code=alone.code)
        return [(run, None)]
    slot, why = _joined(model, stack, run, mlp) if joined else (None, "")
    if slot is not None:
        return [slot]
    if zero_parts:
        return [(run, None), (mlp, None)]
    pair = format_steps((run, mlp))
    raise WriteError(
        f"steps {pair} cannot be written as one layer of a stock checkpoint: {why}; run the plan live, or ask for "
        "zeroed projections (--zero-parts: exact, saves nothing)",
        code="W283",
    )


def _joined(model: PreTrainedModel, stack: Stack, attention: Run, mlp: Run) -> tuple[Slot | None, str]:
    """The slot of the two, or None and why there is none."""
    same = attention == replace(mlp, part="attention")
    found = open_model(model).remember(
        f"the mlp of {stack.name} layer {mlp.layer} behind the attention of {attention.layer}, the same: {same}",
        lambda: _tried(model, stack, attention.layer, mlp.layer, same=same),
    )
    if isinstance(found, str):
        return None, found
    if same:
        return (replace(attention, part="layer"), None), ""
    return (attention, MlpHalf(mlp.layer, found, AND.join(mlp.ids) or None, mlp.tied_to)), ""


def _tried(model: PreTrainedModel, stack: Stack, attention: int, mlp: int, *, same: bool) -> tuple[str, ...] | str:
    """How the names of the tensors begin that come with the mlp; otherwise why the two are no layer together."""
    first, second = (_halves(model, stack, layer) for layer in (attention, mlp))
    if first is None or second is None:
        return "whether its mlp reads what its attention wrote cannot be tried, as the model does not run here"
    if first.parts.mlp != second.parts.mlp:
        return f"layers {attention} and {mlp} have another mlp"
    for name in first.parts.mlp:
        one, other = (half.children[name] for half in (first, second))
        if (why := first_difference(one, other, family_of(stack.config).numbering)) is not None:
            return f"the mlp of layer {mlp} is not built as that of layer {attention}: {name}: {why}"
    try:
        outside = follows(first, second, same=same)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        return f"whether its mlp reads what its attention wrote cannot be tried ({first_line(error)})"
    return outside if isinstance(outside, str) else (*(f"{name}." for name in first.parts.mlp), *sorted(outside))


def _halves(model: PreTrainedModel, stack: Stack, layer: int) -> Halves | None:
    opened = open_model(model)
    fact = opened.facts(stack.name).layers[layer]
    if fact.called is None or fact.parts is None:
        return None
    empty = opened.remember("the same without weights", lambda: meta_model(model.config, like=model))
    own = next(one for one in find_stacks(empty) if one.name == stack.name)
    return opened.remember(f"the halves of {stack.name} layer {layer}", lambda: Halves(own.layer(layer), fact))
