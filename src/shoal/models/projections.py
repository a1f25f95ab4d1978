"""The matrices of an attention by heads: which row or column is which channel, and their tensors rewritten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from shoal.models.precision import in_float64


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear module and the channels of heads in it."""

    module: str
    """Its name within the layer."""
    channels: tuple[tuple[int, ...], ...]
    """For each head its channels: outputs of the module, or inputs of the one behind the attention."""
    turned: bool
    """Whether its weight is [inputs, outputs]."""


@dataclass(frozen=True, slots=True)
class ScoreSide:
    """How queries and keys are made."""

    queries: Projection
    keys: Projection
    pairs: tuple[tuple[int, int], ...]
    """Channels of a head that positions turn together, as real and imaginary part of one number."""
    plain: tuple[int, ...]
    """Channels of a head that no position turns."""


@dataclass(frozen=True, slots=True)
class Projections:
    """The matrices of one attention by heads. A text in the place of a side says why it is not known."""

    values: Projection
    output: Projection
    scores: ScoreSide | str

    @property
    def group(self) -> int:
        """How many heads attend with the values of one."""
        return len(self.output.channels) // len(self.values.channels)

    def readers(self, head: int) -> range:
        """The heads that attend with the values of `head`."""
        return range(head * self.group, (head + 1) * self.group)


class HeadMatrices:
    """The matrices of one attention in float64, each [outputs, inputs] with its bias, if it has one, as last column."""

    def __init__(self, layer: nn.Module, known: Projections, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """`tensors`: by their names within the layer those that stand in the place of its own."""
        self.known, self.layer, self.tensors = known, layer, tensors or {}
        sides = [] if isinstance(known.scores, str) else [known.scores.queries, known.scores.keys]
        self.tables = {one.module: self._read(one) for one in (*sides, known.values, known.output)}

    def _own(self, name: str) -> torch.Tensor | None:
        if name in self.tensors:
            return self.tensors[name]
        module, _, leaf = name.rpartition(".")
        return self.layer.get_submodule(module)._parameters.get(leaf)

    def _read(self, one: Projection) -> torch.Tensor:
        weight, bias = self._own(f"{one.module}.weight"), self._own(f"{one.module}.bias")
        assert weight is not None
        table = in_float64(weight.detach().T if one.turned else weight.detach())
        return table.clone() if bias is None else torch.cat([table, in_float64(bias.detach())[:, None]], 1)

    def biased(self, one: Projection) -> bool:
        """Whether the module adds a bias."""
        return self._own(f"{one.module}.bias") is not None

    def rows(self, one: Projection, head: int) -> torch.Tensor:
        """What makes the channels of a head, [dim, inputs (and 1 for a bias)]."""
        return self.tables[one.module][list(one.channels[head])]

    def put_rows(self, one: Projection, head: int, rows: torch.Tensor) -> None:
        """Let `rows` make the channels of a head."""
        self.tables[one.module][list(one.channels[head])] = rows.to(self.tables[one.module])

    def columns(self, head: int) -> torch.Tensor:
        """What the output matrix makes of a head, [hidden, dim]."""
        one = self.known.output
        return self.tables[one.module][:, list(one.channels[head])]

    def put_columns(self, head: int, columns: torch.Tensor) -> None:
        """Let the output matrix make `columns` of a head."""
        one = self.known.output
        self.tables[one.module][:, list(one.channels[head])] = columns.to(self.tables[one.module])

    def rewritten(self, *, source: bool) -> dict[str, torch.Tensor]:
        """`written` of queries and output, and of a `source` of keys and values these too."""
        known = self.known
        sides = (
            [] if isinstance(known.scores, str) else [known.scores.queries, *([known.scores.keys] if source else [])]
        )
        return self.written(*sides, known.output, *([known.values] if source else []))

    def written(self, *which: Projection) -> dict[str, torch.Tensor]:
        """The tensors of these modules by their names within the layer, as the layer has them."""
        made: dict[str, torch.Tensor] = {}
        for one in which:
            table, weight = self.tables[one.module], self._own(f"{one.module}.weight")
            assert weight is not None
            if self.biased(one):
                bias = self._own(f"{one.module}.bias")
                assert bias is not None
                table, made[f"{one.module}.bias"] = table[:, :-1], table[:, -1].to(bias).contiguous()
            made[f"{one.module}.weight"] = (table.T if one.turned else table).to(weight).contiguous()
        return made
