"""What a compressing cache is made for: the rows of a live model under its plan, all of them empty."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from shoal.errors import PlanError, UsageError
from shoal.executing.later import LaterExecutor
from shoal.executing.layer_list import LayerProxyList
from shoal.models.kinds import require_causal
from shoal.models.opened import OpenedModel, open_model
from shoal.plan.spec import KVSpec
from shoal.plan.steps import runs


@dataclass(frozen=True)
class CacheJob:
    """The rows of one cache for one batch of texts."""

    rows: tuple[Any, ...]
    """An empty row of transformers for each slot of the plan, in the order in which they are written."""
    layers: tuple[int, ...]
    """For each row the base layer that writes it."""
    kv: tuple[KVSpec, ...]
    """For each row what that layer keeps."""
    base_rows: tuple[int, ...]
    """For each row the row of the base model's own cache that it stands for."""
    real: torch.Tensor | None = None
    """Bool [batch, tokens]: which columns of the prompt are no padding; None: all."""
    ids: torch.Tensor | None = None
    """The prompt [batch, tokens], where it is known."""

    def require_plain(self, name: str, rows: Sequence[int]) -> None:
        """Raise P161 for a row whose keys and values are not kept token by token for the whole text."""
        for row in rows:
            if type(self.rows[row]) is not DynamicLayer or self.kv[row].kind != "full" or self.kv[row].state:
                raise PlanError(
                    f"{name} compresses rows that keep every token, and row {row}, of layer {self.layers[row]}, is "
                    f"{_kept(self.kv[row])}; choose other rows, or leave --kv-cache out",
                    code="P161",
                )

    def require_alike(self, name: str, rows: Sequence[int]) -> None:
        """Raise P161 for rows of one group whose keys and values have other shapes."""
        shapes = {row: (self.kv[row].heads, self.kv[row].key_dim, self.kv[row].value_dim) for row in rows}
        for row in rows[1:]:
            if shapes[row] != shapes[rows[0]]:
                raise PlanError(
                    f"{name} shares rows of one shape, and row {row} has {shapes[row]} heads and dimensions where row "
                    f"{rows[0]} has {shapes[rows[0]]}; choose other rows, or leave --kv-cache out",
                    code="P161",
                )

    def first_row(self, name: str, start: int | None) -> int:
        """`start` itself, or the middle where it is not given. Raises U659 for one beyond the rows."""
        if start is None:
            return len(self.rows) // 2
        if not 0 <= start < len(self.rows):
            raise UsageError(
                f"{name} begins at row {start}, and the cache has the rows 0 to {len(self.rows) - 1}; choose one of "
                "them",
                code="U659",
            )
        return start


def share(name: str, option: str, value: float) -> float:
    """`value` itself when it is a share. Raises U659."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name} takes {option} from 0 to 1, not {value:g}", code="U659")
    return value


def _kept(kv: KVSpec) -> str:
    if kv.kind == "sliding":
        return f"a window of {kv.window} tokens"
    if kv.kind == "recurrent" or kv.state:
        return "a recurrent state"
    return "of another kind"


def cache_job(model: Any, mask: torch.Tensor | None = None, ids: torch.Tensor | None = None) -> CacheJob:
    """What a cache for `model`, with the plan that runs on it now, is made for.

    `mask` and `ids` [batch, tokens]: those of the prompt; 0 in `mask` is padding. Raises M322 for a model that does not
    continue text, P161 under a policy or a draft and for a model that keeps no keys and values token by token.
    """
    opened = open_model(model)
    require_causal(opened.model, "a compressing KV cache")
    stock = _stock_rows(opened)
    written = _written(opened, len(stock))
    # a layer that runs twice has a row of its own for each execution
    rows = tuple(copy.deepcopy(stock[row]) for row in written)
    layers = tuple(_layer_of(opened, row) for row in written)
    kv = tuple(opened.spec.stack("decoder").layers[layer].kv for layer in layers)
    real = None if mask is None or bool(mask.bool().all()) else mask.bool()
    return CacheJob(rows, layers, kv, written, real, ids)


def _written(opened: OpenedModel, depth: int) -> tuple[int, ...]:
    """The base rows in the order of the slots that the running plan writes; without a plan all of them."""
    layers = opened.stack("decoder").layers
    if isinstance(layers, LayerProxyList):
        if isinstance(layers.executor, LaterExecutor):
            raise PlanError(
                "under this plan layers read others that run later, and a prompt is gone over again until nothing "
                "changes, which rows that are compressed once cannot follow; leave --kv-cache out",
                code="P161",
            )
        if layers.executor.decides:
            raise PlanError(
                "a policy or a draft is running on this model, and decides itself what the KV cache is given; a "
                "compressing cache goes with a plan alone",
                code="P161",
            )
        if layers.executor.sharing.fewer:
            raise PlanError(
                "tensors of this plan make fewer heads of keys and values for some layers, which a compressing cache "
                "cannot put together with those of others; leave --kv-cache out",
                code="P161",
            )
        half = next((run for run in runs(layers.executor.steps) if run.half is not None), None)
        if half is not None:
            raise PlanError(
                f"layer {half.layer} stores its {half.half} alone under this plan, and a compressing "
                "cache holds keys with their values; leave --kv-cache out, or share both",
                code="P161",
            )
        found: tuple[int, ...] = layers.executor.rows
        return found
    return tuple(range(depth))


def _stock_rows(opened: OpenedModel) -> list[Any]:
    if not any(layer.kv.per_token for layer in opened.spec.stack("decoder").layers):
        raise PlanError(
            f"{type(opened.model).__name__} keeps no keys and values token by token, so there is nothing to compress; "
            "leave --kv-cache out",
            code="P161",
        )
    return list(DynamicCache(config=opened.model.config).layers)


def _layer_of(opened: OpenedModel, row: int) -> int:
    """The base layer that writes a base row: layers that read another's row have its number too."""
    layers = opened.spec.stack("decoder").layers
    owners = [i for i, fact in enumerate(opened.facts("decoder").layers) if fact.row == row]
    return next((i for i in owners if layers[i].kv.kind != "shared"), min(row, len(layers) - 1))
