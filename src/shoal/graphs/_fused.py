"""Graphs on a live model: put on together, compared with what the model computed before, taken away again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.evaluation.decoding import CACHE_NAMES
from shoal.evaluation.scoring import accepts
from shoal.executing.bind import with_graph
from shoal.executing.layer_list import LayerProxyList
from shoal.graphs._graph import Graph
from shoal.models.calls import device_of, logits_in
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_causal
from shoal.models.load import Loaded
from shoal.models.opened import OpenedModel, open_model
from shoal.models.stacks import unwrap
from shoal.registry import Entry
from shoal.spelling import chosen

PROMPT, STEPS = 6, 2
"""Tokens on which both ways are compared: a prefill, then one token after the other from the cache."""


@dataclass(frozen=True)
class Fused:
    """Graphs that are on a model."""

    graphs: tuple[Graph, ...]
    difference: float
    """Largest difference of a logit between the model with and without them, as a share of the largest logit, over a
    prefill of a few tokens and steps from its cache."""
    limit: float
    """Of that difference, in the dtype of the model: 1e-3 in float32, 5e-2 in half precision."""

    @property
    def exact(self) -> bool:
        """Whether these logits were the same bits."""
        return self.difference == 0

    def describe(self) -> str:
        """One line: what computes otherwise, and how far the logits are apart."""
        names = ", ".join(f"{graph.name} ({graph.replaced} modules)" for graph in self.graphs)
        apart = "the same bits" if self.exact else f"within {self.difference:.1e} of the largest"
        return f"{names}: logits are {apart}" + "".join(_left(graph) for graph in self.graphs if graph.left)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        graphs = [{"name": g.name, "replaced": g.replaced, "left": dict(g.left)} for g in self.graphs]
        return {"graphs": graphs, "exact": self.exact, "difference": self.difference, "limit": self.limit}


def _left(graph: Graph) -> str:
    path, why = next(iter(graph.left.items()))
    return f"; {graph.name} leaves {len(graph.left)} as they are ({path}: {why})"


@contextmanager
def fused(model: nn.Module | OpenedModel | Loaded, *texts: str) -> Iterator[Fused]:
    """`with fused(model, "norms", "siblings"): ...` - the model computes the same with other matrix products.

    `texts`: graphs with their options (`shoal ls graphs`); those that change values are put on first, whatever the
    order. A plan that is to run with them is put on before, and taken away behind it. The model is compared
    with itself on entering, cached, and every tensor is put back at the end, bit for bit.

    Raises `UsageError`: U501 a name that does not exist, U502 an option, U662 a graph that does not fit this model or a
    policy that is running,
    U663 logits that are further apart than rounding explains; `ModelError` M322 for a model without next-token scores.
    """
    inner: Any = unwrap(model.model if isinstance(model, OpenedModel | Loaded) else model)
    require_causal(inner, "--graph")
    _refuse_deciding(inner)
    found = [chosen("graphs", text) for text in texts]
    found.sort(key=lambda pair: not _comes_first(pair[0]))
    _refuse_twice([entry.name for entry, _ in found])
    wanted, put = _compared(inner), list[Graph]()
    with ExitStack() as behind:
        for entry, options in found:
            graph: Graph = entry.load()(inner, **options)
            put.append(graph)
            behind.enter_context(with_graph(inner, graph.name))
            behind.callback(graph.take_away)
            graph.put()
        yield _judged(inner, put, wanted)


def _comes_first(entry: Entry) -> bool:
    return bool(getattr(import_module(entry.module), "COMES_FIRST", False))


def _refuse_deciding(model: Any) -> None:
    for stack in open_model(model).stacks:
        if isinstance(stack.layers, LayerProxyList) and stack.layers.executor.decides:
            raise UsageError(
                "--graph is for plans that decide nothing, and a policy or a draft is running; leave one of them out",
                code="U662",
            )


def _refuse_twice(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--graph {name} is given twice; give it once", code="U662")


def _judged(model: Any, graphs: list[Graph], wanted: list[torch.Tensor]) -> Fused:
    names = ", ".join(graph.name for graph in graphs)
    remedy = "leave it out, and report the family"
    try:
        have = _compared(model)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"--graph {names}: the model's forward fails with it ({error!s:.200}); {remedy}", code="U663"
        ) from error
    far = max(
        float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1e-6))
        for a, b in zip(wanted, have, strict=True)
    )
    limit = 1e-3 if wanted[0].dtype in (torch.float32, torch.float64) else 5e-2
    if not far <= limit:  # NaN is never at most the limit
        raise UsageError(
            f"--graph {names}: logits differ by {far:.2g} of the largest, more than {limit:g}; {remedy}", code="U663"
        )
    return Fused(tuple(graphs), far, limit)


def _compared(model: Any) -> list[torch.Tensor]:
    """Logits of a prefill and of steps from its cache; of a model without a cache those of the prefill."""
    ids = torch.arange(1, 1 + PROMPT + STEPS, device=device_of(model))[None]
    cache_name = next((name for name in CACHE_NAMES if accepts(model, name)), None)
    found: list[torch.Tensor] = []
    with evaluating(model):
        if cache_name is None:
            return [logits_in(model(input_ids=ids)).clone()]
        out = model(input_ids=ids[:, :PROMPT], use_cache=True)
        found.append(logits_in(out).clone())
        for at in range(PROMPT, PROMPT + STEPS):
            given: dict[str, Any] = {cache_name: getattr(out, cache_name), "use_cache": True}
            if accepts(model, "position_ids"):
                given["position_ids"] = torch.tensor([[at]], device=ids.device)
            out = model(input_ids=ids[:, at : at + 1], **given)
            found.append(logits_in(out).clone())
    return found
