"""One pass over data, watching what goes into each layer and what comes out; only the watcher keeps anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.errors import ModelError, UsageError
from shoal.executing.conductor import PlannedList
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.models.parts import without
from shoal.models.probe import LayerFacts
from shoal.models.stacks import Stack, unwrap
from shoal.models.streamed import is_streamed
from shoal.plan.steps import PartName

if TYPE_CHECKING:
    from shoal.recording.layer_major import LayerMajor

Turn = Callable[[torch.Tensor, torch.Tensor | None, int], None]
"""Called with ids, mask and the number of the first sequence of the batch whose turn it is."""
Watch = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with the base layer, its input and its output, each [batch, length, hidden], in the order of execution."""


@torch.no_grad()
def observe(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    watch: Watch,
    *,
    before: Callable[[torch.Tensor, torch.Tensor | None], None],
    turn: Turn | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    stack: str | None = None,
    part: PartName = "layer",
) -> None:
    """Run `model` without its head on every batch of (ids, mask), [batch, length] each, and call `watch` at each layer.

    `before` is called with each batch before it runs. Works on the model as it is: under a running plan, layers that
    do not run are not seen, and one that runs twice is seen twice. Residual streams side by side (Gemma 3n) are seen as
    one hidden state. The decoder beside an encoder reads the text that its encoder reads.
    `part`: "attention" watches the step from a layer's input to the state with its attention added, "mlp" the one from
    there to the layer's output. The state between is what the layer makes without its mlp, whatever norms and
    multipliers stand around the parts; it costs each layer's attention once more. Layers without such parts are not
    seen. `turn`: of a watcher that can take the batches layer by layer; called with ids, mask and the number of the
    first sequence before each run of a layer. Where layers are read from files, all batches then pass one layer before
    the next is read, and `progress` tells how many layers were. Raises M316 for a state without a token axis, U531 when
    no layer has parts, U507 for parts of a running plan, M323 for a stack that reads no text, U576 for states of all
    batches that fit neither memory nor disk.
    """
    inner = unwrap(model)
    found = open_model(inner).stack(stack)
    size: list[int] = []
    handles = []
    facts = None if part == "layer" else _with_parts(inner, found, part)

    prepared = _prepared(inner, found, batches) if turn is not None else None

    def hook(index: int) -> Callable[..., None]:
        def seen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            ends = [args[0] if args else kwargs["hidden_states"], out]
            if facts is not None:
                parts = facts[index].parts
                if parts is None:
                    return
                # past __call__, so that neither this hook nor another one fires again
                with without(layer, parts.mlp, facts[index].returns):
                    between = layer.forward(*args, **kwargs)
                ends[1 if part == "attention" else 0] = between
            x, y = (_tokens_first(end[0] if isinstance(end, tuple) else end, size, index) for end in ends)
            watch(index, x.to(y.device), y)

        return seen

    try:
        with evaluating(inner):
            for index in range(found.depth):
                handles += [found.layer(index).register_forward_hook(hook(index), with_kwargs=True)]
            if prepared is not None and turn is not None:
                _layer_by_layer(prepared, before, turn, size, progress)
                return
            for ids, mask in batches:
                size[:] = ids.shape
                before(ids, mask)
                _pass(inner, ids, mask, found)
    finally:
        for handle in handles:
            handle.remove()


def _prepared(
    inner: PreTrainedModel, found: Stack, batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]]
) -> LayerMajor | None:
    """The batches at the door, where reading a layer once for all of them is worth it and possible: a whole stack in
    files, run by the base model."""
    from shoal.recording.layer_major import LayerMajor  # it is built on the walk, which is built on this file

    whole = not isinstance(found.layers, PlannedList) and _around(inner, found) is inner.base_model
    return LayerMajor(inner, found, batches) if whole and is_streamed(found) else None


def _layer_by_layer(
    prepared: LayerMajor,
    before: Callable[[torch.Tensor, torch.Tensor | None], None],
    turn: Turn,
    size: list[int],
    progress: Callable[[int, int, str], None] | None,
) -> None:
    for ids, mask in prepared.rows:
        before(ids, mask)

    def at(ids: torch.Tensor, mask: torch.Tensor | None, first: int) -> None:
        size[:] = ids.shape
        turn(ids, mask, first)

    depth = prepared.stack.depth
    prepared.run(at, None if progress is None else lambda done: progress(done, depth, "layers read"))


def forward_without_head(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What the head is given, [batch, length, hidden], for `ids` and `mask` [batch, length]; the caller chooses the
    modes and whether gradients are kept."""
    state: torch.Tensor = _pass(unwrap(model), ids, mask, open_model(model).stack()).last_hidden_state
    return state


def _pass(inner: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, found: Stack) -> Any:
    backbone = _around(inner, found)
    more = {"use_cache": False} if found.name == "decoder" else {}
    return backbone(**inputs_of(backbone, ids, mask), **more)


def _with_parts(inner: nn.Module, found: Stack, part: PartName) -> list[LayerFacts]:
    require_whole(inner, f"{part} alone", found.name)
    known = open_model(inner).facts(found.name)
    if all(fact.parts is None for fact in known.layers):
        raise UsageError(
            f"no layer of this model has an {part} of its own{f' ({known.parts_note})' if known.parts_note else ''}; "
            "measure with part=layer",
            code="U531",
        )
    return known.layers


def _around(model: PreTrainedModel, stack: Stack) -> Any:
    """The part of the model that runs the stack. Without the head, the dearest matrix of a small model, which no layer
    needs; without the decoder or the other stack."""
    if stack.name == "decoder":
        return model.base_model
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and stack.owner in m.modules()]
    if "input_ids" not in inspect.signature(around[-1].forward).parameters:
        raise ModelError(
            f"the stack {stack.name!r} of {type(model).__name__} reads no text, and measures have no other data; "
            "remove layers by their position (--method position)",
            code="M323",
        )
    return around[-1]


def require_whole(model: nn.Module, what: str, stack: str | None = None) -> None:
    """Raise U507 when a plan is running on the stack: `what` needs the base model's own layers, once and in order."""
    if isinstance(open_model(model).stack(stack).layers, PlannedList):
        raise UsageError(f"{what} needs the whole model, but a plan is running on it; restore it first", code="U507")


def input_device(model: Any) -> torch.device:
    """Where a model reads its inputs; an offloaded one moves them itself."""
    device = torch.device(model.device)
    return torch.device("cpu") if device.type == "meta" else device


def inputs_of(backbone: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The keyword arguments of a pass over ids and mask [batch, length], on the backbone's device."""
    device = input_device(backbone)
    inputs = {"input_ids": ids.to(device)}
    if "decoder_input_ids" in inspect.signature(backbone.forward).parameters:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if mask is not None:
        inputs["attention_mask"] = mask.to(device)
        if not bool(mask[:, 0].all()) and "position_ids" in inspect.signature(backbone.forward).parameters:
            # most models count positions from the first column, padding or not
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
    return inputs


def _tokens_first(state: torch.Tensor, size: list[int], index: int) -> torch.Tensor:
    """`state` as [batch, length, hidden], whether streams come before the batch, after the tokens or not at all."""
    if state.dim() == 4 and list(state.shape[1:3]) == size:
        state = state.movedim(0, 2)
    if state.dim() < 3 or list(state.shape[:2]) != size:
        raise ModelError(
            f"layer {index} hands on a state {list(state.shape)} for {size[0]} x {size[1]} tokens, which is no hidden "
            "state for each token; measure another stack",
            code="M316",
        )
    return state.flatten(2)
