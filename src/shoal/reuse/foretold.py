"""Neurons that a cheap product foretells to be nothing behind the activation are not computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from shoal.atomic import write_atomically
from shoal.errors import PlanError, WriteError, first_line
from shoal.models.linear import matrix_of
from shoal.models.opened import OpenedModel, open_model
from shoal.reuse.branches import Around, Call, around_forwards
from shoal.reuse.neurons import NeuronMlp, linear_of_some, neuron_mlps

NAMES = ("bias", "left", "right")
THRESHOLD = "threshold"


@dataclass(frozen=True, eq=False)
class Foretold:
    """What foretells the neurons of each layer's mlp."""

    tensors: Mapping[int, Mapping[str, torch.Tensor]]
    """By layer `left` [neurons, rank], `right` [rank, hidden] and `bias` [neurons]."""
    threshold: float = 0.0
    """A neuron is computed where its foretold number in front of the activation is above this."""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all. Raises W229."""
        flat = {f"{layer}.{name}": one.contiguous() for layer, own in self.tensors.items() for name, one in own.items()}
        write_atomically(path, save(flat | {THRESHOLD: torch.tensor([self.threshold])}), "the foretold neurons")

    @staticmethod
    def load(path: str | Path) -> Foretold:
        """Read what `save` wrote. Raises W286 for what is no such file."""
        try:
            return _read(load_file(path))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise WriteError(
                f"{path} holds no foretold neurons ({first_line(error)}); name a file that Foretold.save wrote",
                code="W286",
            ) from None


def _read(flat: dict[str, torch.Tensor]) -> Foretold:
    threshold = float(flat.pop(THRESHOLD))
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in flat.items():
        layer, _, name = key.partition(".")
        found.setdefault(int(layer), {})[name] = tensor
    if not found or any(sorted(own) != sorted(NAMES) for own in found.values()):
        raise ValueError(f"each layer needs {', '.join(NAMES)}")
    return Foretold(found, threshold)


@dataclass
class NeuronTrace:
    """What has happened in a block so far, in neurons times tokens."""

    total: int = 0
    kept: int = 0
    """That were foretold to be something."""
    computed: int = 0
    """A call computes for all of its tokens what any of them needs."""


@contextmanager
def leaving_out(
    model: nn.Module | OpenedModel, foretold: Foretold, *, stack: str | None = None
) -> Iterator[NeuronTrace]:
    """Until the end of the block the mlps of these layers compute no neuron that is foretold to be nothing.

    x the mlp's input [tokens, hidden], z' = left right x + bias the numbers that are foretold in front of the
    activation, s_j = [z'_j > threshold] for each token: the matrices that make neurons and the one that reads them are
    used at the rows of neurons with s_j = 1 for some token of the call, and a neuron is set to 0 where s_j = 0, so that
    a token's answer does not depend on its neighbours. One token at a time computes least. Where s_j = 1 for all, the
    layer runs as it is. Nothing of the model is changed; afterwards it has the attributes that it had.

    Raises P160 for a layer whose mlp has no neurons that are known, and for tensors of another shape.

    Source: Dong et al. 2017 (More is Less, arXiv 1703.08651): a low-cost collaborative layer foretells zeros.

    How we differ: an mlp of a pretrained Transformer in place of convolutions trained with their collaborative layers;
    the foretold numbers decide alone, and do not multiply what is computed.
    """
    opened = open_model(model)
    mlps = neuron_mlps(opened, sorted(foretold.tensors), stack)
    trace = NeuronTrace()
    pairs: list[tuple[nn.Module, Around]] = []
    for mlp in mlps:
        _require_fit(mlp, foretold.tensors[mlp.layer])
        run = _MlpRun(mlp, foretold, trace)
        pairs += [(module, partial(run.makes, module)) for module in mlp.makers]
        pairs.append((mlp.reader, run.reads))
    with around_forwards(pairs):
        yield trace


def _require_fit(mlp: NeuronMlp, tensors: Mapping[str, torch.Tensor]) -> None:
    neurons, inputs = matrix_of(mlp.makers[0]).shape
    shapes = {name: tuple(tensors[name].shape) for name in NAMES}
    rank = shapes["right"][0] if shapes["right"] else 0
    if shapes != {"bias": (neurons,), "left": (neurons, rank), "right": (rank, inputs)}:
        words = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise PlanError(
            f"what foretells the neurons of layer {mlp.layer} does not fit its matrix of {[neurons, inputs]}: {words}; "
            "fit it on this model",
            code="P160",
        )


class _MlpRun:
    """The calls of one mlp: from the first matrix that makes neurons to the one that reads them."""

    def __init__(self, mlp: NeuronMlp, foretold: Foretold, trace: NeuronTrace) -> None:
        self.mlp, self.threshold, self.trace = mlp, foretold.threshold, trace
        self.tensors = foretold.tensors[mlp.layer]
        self.kept: torch.Tensor | None = None
        """[..., neurons] of the call under way."""
        self.rows: torch.Tensor | None = None
        """The numbers of the neurons that this call computes; None: all."""

    def makes(self, module: nn.Module, forward: Callable[[], Any], call: Call) -> Any:
        x = call[0][0]
        if self.kept is None:
            self._begin(x)
        return forward() if self.rows is None else linear_of_some(module, x, self.rows, dim=0)

    def reads(self, forward: Callable[[], Any], call: Call) -> Any:
        kept, rows, neurons = self.kept, self.rows, call[0][0]
        self.kept = self.rows = None
        if kept is None or (rows is None and bool(kept.all())):
            return forward()
        every = torch.arange(self.mlp.count, device=neurons.device) if rows is None else rows
        seen = kept[..., every].reshape(neurons.shape)
        return linear_of_some(self.mlp.reader, neurons.masked_fill(~seen, 0), every, dim=1)

    def _begin(self, x: torch.Tensor) -> None:
        left, right, bias = (self.tensors[name].to(x.device, torch.float32) for name in ("left", "right", "bias"))
        self.kept = kept = x.detach().float() @ right.T @ left.T + bias > self.threshold
        count, tokens = self.mlp.count, kept.numel() // self.mlp.count
        rows = kept.reshape(-1, count).any(0).nonzero().flatten()
        self.rows = None if len(rows) == count else rows
        self.trace.total += tokens * count
        self.trace.kept += int(kept.sum())
        self.trace.computed += tokens * len(rows)
