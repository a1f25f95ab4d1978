"""What threads that call one model at once do not share: the record of a forward, and a layer that is exchanged."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from shoal.executing.forward import Forward
from shoal.executing.sharing import Sharing
from shoal.models.first import first_only
from shoal.models.lists import Stack
from shoal.plan import Run
from shoal.plan.steps import Step, runs


class _Local(threading.local):
    def __init__(self) -> None:
        self.forward = Forward()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Local:
        return _Local()


class InForward:
    """Something that is in one forward in each thread that calls it."""

    def __init__(self) -> None:
        self._local = _Local()

    @property
    def now(self) -> Forward:
        """The forward that this thread is in."""
        return self._local.forward

    @now.setter
    def now(self, forward: Forward) -> None:
        self._local.forward = forward


class Exchanges:
    """Layers in which a run puts something in place of something else for the length of its call: one thread at a
    time calls them. A copy has a lock of its own."""

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers, self._lock = frozenset(layers), threading.RLock()

    def during(self, layer: int) -> AbstractContextManager[Any]:
        """What stands around a call of `layer`. Compiled code is made by one thread and exchanges nothing."""
        return self._lock if layer in self.layers and not torch.compiler.is_compiling() else nullcontext()

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchanges:
        return Exchanges(self.layers)


def _changes(run: Run) -> bool:
    """Whether the run puts something in place of something else in its layer."""
    return run.part != "layer" or not run.own_tensors or bool(run.layer_sources)


def exchanges_of(stack: Stack, steps: tuple[Step, ...], sharing: Sharing) -> Exchanges:
    """Of the runs of a stack: those of a part, with own tensors, that take something from another layer, all where
    heads of keys and values are fewer, and where another layer takes the place of the first."""
    if first_only(stack) is not None or sharing.fewer:
        return Exchanges(range(stack.depth))
    changing = {run.layer for run in runs(steps) if _changes(run)}
    return Exchanges(changing | sharing.maps)
