"""One pass over data, watching what goes into each layer and what comes out; only the caller keeps anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from shoal.errors import ModelError, UsageError
from shoal.executing.bind import bind
from shoal.executing.executor import Executor
from shoal.executing.inputs import backbone_of, require_whole, run_stack
from shoal.executing.layer_list import LayerProxyList
from shoal.executing.recorder import Recorder, RunRecord
from shoal.models.evaluating import evaluating
from shoal.models.opened import OpenedModel, open_model
from shoal.models.stacks import Stack
from shoal.models.streamed import is_streamed
from shoal.plan.steps import PartName
from shoal.recording.layer_major import BeforeLayer, LayerMajor

Watch = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with the base layer, its input and its output, each [batch, length, hidden], in the order of execution."""


@torch.no_grad()
def observe(
    model: nn.Module | OpenedModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    watch: Watch,
    *,
    before: Callable[[torch.Tensor, torch.Tensor | None], None],
    before_layer: BeforeLayer | None = None,
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
    seen. `before_layer`: given by a caller that can take the batches layer by layer; it is called with ids, mask and
    the number of the first sequence before each run of a layer. Where layers are read from files, all batches then pass
    one layer before the next is read, and `progress` is called with the number of layers read.

    Raises M316 for a state without a token axis, U531 when no layer has parts, U507 for parts of a running plan, M323
    for a stack that reads no text, U576 for states of all batches that fit neither memory nor disk.
    """
    opened = open_model(model)
    found = opened.stack(stack)
    size: list[int] = []
    if part != "layer":
        _require_parts(opened, found, part)
    recorder = _CallsBack(watch, part, [fact.parts is not None for fact in opened.facts(found.name).layers], size)
    prepared = _prepared(opened, found, batches) if before_layer is not None else None
    with evaluating(opened.model):
        if prepared is not None and before_layer is not None:
            _layer_by_layer(prepared, recorder, before, before_layer, size, progress)
            return
        with _executor(opened, found) as executor, executor.recording(recorder):
            for ids, mask in batches:
                size[:] = ids.shape
                before(ids, mask)
                run_stack(opened.model, found, ids, mask)


@contextmanager
def _executor(opened: OpenedModel, stack: Stack) -> Iterator[Executor]:
    """What runs the stack: a plan that is on it already, or the whole model's."""
    planned = stack.layers
    if isinstance(planned, LayerProxyList):
        yield planned.executor
        return
    with bind(opened).running() as bound:
        yield bound.executor(stack.name)


class _CallsBack(Recorder):
    """Calls a function with the input and output of every run of a layer, or of its part."""

    def __init__(self, watch: Watch, part: PartName, has_parts: Sequence[bool], size: list[int]) -> None:
        self.watch, self.part, self.has_parts, self.size = watch, part, has_parts, size

    def ran(self, record: RunRecord) -> None:
        layer = record.run.layer
        if self.part != "layer" and not self.has_parts[layer]:
            return
        x, y = record.input, record.output
        if self.part == "attention":
            y = record.behind_attention()
        elif self.part == "mlp":
            x = record.behind_attention()
        x, y = (_tokens_first(state, self.size, layer) for state in (x, y))
        self.watch(layer, x.to(y.device), y)


def _prepared(
    opened: OpenedModel, found: Stack, batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]]
) -> LayerMajor | None:
    """The batches as hidden states in front of the first layer, where each layer can be read once for all of them: a
    whole stack in files, run by the base model."""
    whole = not isinstance(found.layers, LayerProxyList) and backbone_of(opened.model, found) is opened.model.base_model
    return LayerMajor(opened, found, batches) if whole and is_streamed(found) else None


def _layer_by_layer(
    prepared: LayerMajor,
    recorder: Recorder,
    before: Callable[[torch.Tensor, torch.Tensor | None], None],
    before_layer: BeforeLayer,
    size: list[int],
    progress: Callable[[int, int, str], None] | None,
) -> None:
    for ids, mask in prepared.rows:
        before(ids, mask)

    def at(ids: torch.Tensor, mask: torch.Tensor | None, first: int) -> None:
        size[:] = ids.shape
        before_layer(ids, mask, first)

    depth = prepared.stack.depth
    prepared.run(at, None if progress is None else lambda done: progress(done, depth, "layers read"), recorder)


def _require_parts(opened: OpenedModel, found: Stack, part: PartName) -> None:
    require_whole(opened, f"{part} alone", found.name)
    known = opened.facts(found.name)
    if all(fact.parts is None for fact in known.layers):
        raise UsageError(
            f"no layer of this model has an {part} of its own{f' ({known.parts_note})' if known.parts_note else ''}; "
            "measure with part=layer",
            code="U531",
        )


def require_token_axis(state: torch.Tensor, size: Sequence[int], index: int) -> None:
    """Raise M316 unless layer `index` hands on one state for each token, [batch, length, hidden]; size: [batch,
    length]."""
    if state.dim() != 3 or list(state.shape[:2]) != list(size):
        raise _no_token_axis(state, size, index)


def _tokens_first(state: torch.Tensor, size: list[int], index: int) -> torch.Tensor:
    """`state` as [batch, length, hidden], whether streams come before the batch, after the tokens or not at all."""
    if state.dim() == 4 and list(state.shape[1:3]) == size:
        state = state.movedim(0, 2)
    if state.dim() < 3 or list(state.shape[:2]) != size:
        raise _no_token_axis(state, size, index)
    return state.flatten(2)


def _no_token_axis(state: torch.Tensor, size: Sequence[int], index: int) -> ModelError:
    return ModelError(
        f"layer {index} hands on a state {list(state.shape)} for {size[0]} x {size[1]} tokens, which is no hidden "
        "state for each token; measure another stack",
        code="M316",
    )
