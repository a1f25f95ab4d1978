"""Linearity: how far a layer is from a linear map of its input, judged on text that the map was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.errors import UsageError
from shoal.evaluation.stats import ratio
from shoal.executing.inputs import require_whole
from shoal.models.opened import open_model
from shoal.recording.observe import observe
from shoal.scores import Scores

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress

HELD_OUT = 3
"""One sequence of so many is held out."""


def linearity(
    model: Any,
    data: Data,
    *,
    of: Literal["state", "change"] = "state",
    part: Literal["layer", "attention", "mlp"] = "layer",
    skip_first: int = 1,
    ridge: float = 1e-8,
    memory: float = 2.0,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The share of a layer's output that the best affine map of its input leaves unexplained on held-out text.

    e_i = sum_t |y_t - (x_t A + b)|^2 / sum_t |y_t - mean(y)|^2, x and y [tokens, hidden] the input and output of layer
    i (or of its attention or mlp, as in block influence), A [hidden, hidden] and b [hidden] fitted by least squares to
    the other sequences; 1 - e_i is the linearity score. `of="change"` divides by the spread of y - x instead, which
    shows what the residual connection hides. The detail holds `with_first`, the same with all tokens fitted and scored.

    Source: Secretly Linear (Razzhigaev et al. 2024, arXiv 2405.12250), whose score is a generalised Procrustes one.

    How we differ: the paper fits and scores the same tokens, which is trivially perfect for few of them: here every
    third sequence is held out and the standard error is over these, for the fitted map as it is. The first `skip_first`
    tokens, whose huge states would be all that is fitted, and padding are left out. A is fitted as I plus a map of the
    change, with `ridge` times the mean variance on its diagonal, from float64 normal equations that are summed up batch
    by batch; the text is run twice for each group of layers whose equations fit `memory` GiB. Raises U536 for fewer
    than two sequences, U508 when no token is left, U531 for missing parts, U507 while a plan is running.
    """
    require_whole(model, "linearity", stack)
    found = open_model(model).stack(stack)
    _require(data, skip_first)
    held = [row for row in range(len(data)) if row % HELD_OUT == 1]
    fitted = [row for row in range(len(data)) if row % HELD_OUT != 1]
    width = model.config.get_text_config(decoder=True).hidden_size
    size = max(1, int(memory * 2**30 // (2 * 8 * (width + 1) ** 2)))
    residuals: list[_Residuals] = []
    done = 0

    def watched(rows: list[int], sums: Sequence[Any], first: int) -> None:
        """One run over `rows`, the kept tokens of every sequence handed to the layers from `first` on."""
        keep = torch.ones(1, 1, dtype=torch.bool)

        def before_layer(ids: torch.Tensor, mask: torch.Tensor | None, _: int) -> None:
            nonlocal keep
            keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()

        def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
            nonlocal done
            before_layer(ids, mask, 0)
            done += len(ids)
            if progress is not None:
                progress(done, len(data) * -(-found.depth // size), "linearity")

        def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
            if first <= index < first + len(sums):
                change = y.cpu().double() - x.cpu().double()
                for row, real in enumerate(keep):
                    sums[index - first].add(x[row].cpu().double()[real], change[row][real], skip_first)

        observe(
            model,
            _batches(data, rows, batch),
            watch,
            before=before,
            before_layer=before_layer,
            progress=progress,
            stack=stack,
            part=part,
        )

    for start in range(0, found.depth, size):
        equations = [_Equations() for _ in range(start, min(start + size, found.depth))]
        watched(fitted, equations, start)
        tests = [_Residuals(own.solved(ridge), own.solved(ridge, whole=True), of) for own in equations]
        watched(held, tests, start)
        residuals += tests
    return _scores(data, found.name, residuals, skip_first, of, (len(fitted), len(held), width))


class _Equations:
    """The normal equations of one layer: sums over tokens [x, 1]^T [x, 1] and [x, 1]^T change, the first tokens
    apart."""

    def __init__(self) -> None:
        self.left: torch.Tensor | None = None
        self.right = torch.empty(0)
        self.first: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, change: torch.Tensor, skip: int) -> None:
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        if self.left is None:
            self.left = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
            self.right = torch.zeros(x.shape[1], change.shape[1], dtype=torch.float64)
        self.first.append((x[:skip], change[:skip]))
        self.left += x[skip:].T @ x[skip:]
        self.right += x[skip:].T @ change[skip:]

    def solved(self, ridge: float, *, whole: bool = False) -> torch.Tensor | None:
        """The map [hidden + 1, hidden] from [x, 1] to the change; None for a layer without the part."""
        if self.left is None:
            return None
        left, right = self.left.clone(), self.right.clone()
        for x, change in self.first if whole else ():
            left += x.T @ x
            right += x.T @ change
        # centred, so that the ridge neither shrinks the offset nor is set by the mean
        count = left[-1, -1]
        mean_x, mean_c = left[-1, :-1] / count, right[-1] / count
        inner = left[:-1, :-1] - count * torch.outer(mean_x, mean_x)
        cross = right[:-1] - count * torch.outer(mean_x, mean_c)
        inner.diagonal().add_(ridge * inner.diagonal().mean().clamp(min=1e-30))
        slope = torch.linalg.solve(inner, cross)
        return torch.cat([slope, (mean_c - mean_x @ slope)[None]])


class _Residuals:
    """Squared residuals and spreads of one layer by held-out sequence, without and with the first tokens."""

    def __init__(self, without: torch.Tensor | None, whole: torch.Tensor | None, of: str) -> None:
        self.maps, self.of = (without, whole), of
        self.rows: list[list[tuple[float, torch.Tensor, torch.Tensor, int]]] = [[], []]

    def add(self, x: torch.Tensor, change: torch.Tensor, skip: int) -> None:
        for rows, fitted, part in zip(self.rows, self.maps, (slice(skip, None), slice(None)), strict=True):
            assert fitted is not None
            ones, own = torch.nn.functional.pad(x[part], (0, 1), value=1.0), change[part]
            target = own if self.of == "change" else own + x[part]
            error = (own - ones @ fitted).square().sum().item()
            rows.append((error, target.sum(0), target.square().sum(0), len(own)))

    def shares(self) -> list[tuple[float, float | None]]:
        """(share left unexplained, its error) without and with the first tokens."""
        found: list[tuple[float, float | None]] = []
        for rows in self.rows:
            count = sum(n for *_, n in rows)
            if not count:
                found.append((math.nan, None))
                continue
            mean = torch.stack([s for _, s, _, _ in rows]).sum(0) / count
            errors = [error for error, *_ in rows]
            spreads = [(squares - 2 * mean * s + n * mean.square()).sum().item() for _, s, squares, n in rows]
            found.append(ratio(errors, spreads) if any(errors) else (0.0, 0.0 if len(rows) > 1 else None))
        return found


def _scores(
    data: Data, stack: str, residuals: list[_Residuals], skip_first: int, of: str, sizes: tuple[int, int, int]
) -> Scores:
    shares = [own.shares() for own in residuals]
    fitted, held, width = sizes
    tokens = max((sum(n for *_, n in own.rows[0]) for own in residuals), default=0)
    notes = [f"fitted to {fitted} sequences, judged on {held} others, the first {skip_first} tokens of each left out"]
    seen = fitted * max(0, data.ids.shape[1] - skip_first)
    if seen < 2 * width:
        notes.append(f"{seen} tokens hardly determine a map of {width} dimensions; give more text")
    return Scores(
        measure="linearity",
        stack=stack,
        unit=f"unexplained share of the {of}",
        values=tuple(without[0] for without, _ in shares),
        errors=tuple(without[1] for without, _ in shares),
        sequences=len(data),
        tokens=tokens,
        data=data.info.describe(),
        notes=tuple(notes),
        detail={"with_first": [whole[0] for _, whole in shares]},
    )


def _batches(data: Data, rows: list[int], batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        yield data.ids[part], None if data.mask is None else data.mask[part]


def _require(data: Data, skip_first: int) -> None:
    if len(data) < 2:
        raise UsageError(
            f"linearity needs 2 or more sequences, one to fit and one to judge, not {len(data)}; use --limit 2 or more",
            code="U536",
        )
    longest = data.ids.shape[1] if data.mask is None else int(data.mask.sum(-1).max())
    if not 0 <= skip_first < longest:
        raise UsageError(
            f"leaving out the first {skip_first} tokens of sequences of {longest} counts none; use 0 to {longest - 1}",
            code="U508",
        )
