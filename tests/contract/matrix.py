"""The contract matrix: every family x plan x attention x cache x batch is right, refused or says why not."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, StaticCache

from shoal.errors import ShoalError
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.linear import is_linear, is_transposed, matrix_of
from shoal.models.stacks import find_stack
from shoal.plan import Spec

from .families import DEPTH, FAMILIES, VOCAB, tiny
from .paged import paged_logits
from .references import by_hand, later_kv, shared_kv, silenced, tied, with_map_of

PLANS = {
    "identity": "0-3",
    "drop": "0-1,3",
    "drop first": "1-3",
    "attention only": "0,1a,2-3",
    "mlp only": "0m,1-3",
    "repeat": "0,1x2,2-3",
    "reorder": "0,2,1,3",
    "parallel": "0,(1|2),3",
    "map": "0-1,~2,3",
    "tie": "0-1,2=1,3",
    "relaxed tie": "0-1,2=1:own,3",
    "shared matrices": "0-1,2=new:own,3",
    "tensors around": "0-1,2:around,3",
}
SHARED = {"KV source": "@", "keys alone": "@k", "values alone": "@v", "attention map": "@a", "later source": "@"}
EAGER = ("attention map", "later source")
"""Kinds of plans whose reference is computed with eager attention."""
KINDS = (*PLANS, *SHARED)
AROUND = {"keeps": 0.9, "reads.0": 0.2, "change": 0.5}
"""The tensors [1] around a run."""
SHRUNK = 0.9
"""Shared matrices are those of the layer times this."""
ATTENTIONS = ("sdpa", "eager")
CACHES = ("dynamic", "static", "paged")
BATCHES = ("one", "left-padded")
WAYS = tuple((c, b) for c in CACHES for b in BATCHES if (c, b) != ("paged", "one"))
"""A paged cache is given the rows of a batch as requests of different lengths; one alone shows nothing more."""
LIMIT = 1e-4
LENGTH, PREFILL = 12, 7


@dataclass(frozen=True)
class Outcome:
    """`state` is right, refused (`why` is the code), not possible (transformers itself cannot, `why` says so), wrong or
    crashed."""

    state: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.why}" if self.why else self.state


Engine = Callable[..., AbstractContextManager[Any]]
"""(model, notation, weights or None) -> a context in which the model runs the plan."""


def run_cell(
    family: str, kind: str, attention: str, cache_kind: str, batch_kind: str, engine: Engine = running
) -> Outcome:
    """One cell of the matrix."""
    model = _model(family, attention)
    if isinstance(model, str):
        return Outcome("not possible", model)
    baseline = _baseline(family, attention, cache_kind, batch_kind)
    if baseline is not None:
        return Outcome("not possible", baseline)
    notation = plan_text(kind, inspect(model))
    weights = _weights(model, kind)
    expected = _expected(family, kind, attention, batch_kind)
    batch = _batch(batch_kind)
    try:
        with engine(model, notation, weights):
            whole = _uncached(model, batch)
            steps = _cached(model, batch, cache_kind)
    except ShoalError as error:
        return Outcome("refused", error.code)
    except Exception as error:  # a cell that falls over is a finding, not the end of the matrix
        return Outcome("crashed", f"{type(error).__name__}: {error}")
    if isinstance(expected, str):
        return Outcome("wrong", f"accepted, but there is no reference: {expected}")
    return _judge(kind, expected, whole, steps, batch)


def _judge(kind: str, expected: torch.Tensor, whole: torch.Tensor, steps: torch.Tensor, batch: Any) -> Outcome:
    seen = batch["attention_mask"].bool()
    if kind == "identity" and not torch.equal(whole, expected):
        return Outcome("wrong", "the identity plan is not bit-exact")
    for what, got in (("uncached", whole), ("cached", steps)):
        error = (got - expected)[seen].abs().max().item()
        if not error <= LIMIT:
            return Outcome("wrong", f"{what} differs by {error:.1e}")
    return Outcome("right")


def plan_text(kind: str, spec: Spec) -> str:
    """The plan of one kind for a model of 4 layers."""
    if kind in SHARED:
        source, reader = kv_pair(spec) if kind != "later source" else reversed(kv_pair(spec))
        return ",".join(f"{i}{SHARED[kind]}{source}" if i == reader else str(i) for i in range(DEPTH))
    return PLANS[kind]


def kv_pair(spec: Spec) -> tuple[int, int]:
    """The first two layers of one kind with KV; layers 0 and 1 when there are none, which check must refuse."""
    layers = spec.stack().layers
    for reader in layers:
        for source in layers[: reader.index]:
            if source.kind == reader.kind and source.kv == reader.kv and source.kv.kind in ("full", "sliding"):
                return source.index, reader.index
    return 0, 1


@cache
def _model(family: str, attention: str) -> PreTrainedModel | str:
    try:
        return tiny(family, attention)
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        return f"transformers has no {attention} attention for it"


@cache
def _batch(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = 1 if kind == "one" else 2
    ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if kind == "left-padded":
        ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@cache
def _map_weight() -> torch.Tensor:
    return torch.eye(32) + 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(2))


def _weights(model: PreTrainedModel, kind: str) -> dict[str, torch.Tensor] | None:
    """The new tensors that the plan of a kind names."""
    if kind == "map":
        return {"map-2-2.weight": _map_weight(), "map-2-2.bias": torch.linspace(-0.1, 0.1, 32)}
    if kind == "tensors around":
        return {f"around.{name}": torch.tensor([value]) for name, value in AROUND.items()}
    if kind not in ("relaxed tie", "shared matrices"):
        return None
    path, (up, down) = _factors(model)
    own = {f"own.{path}.up": up, f"own.{path}.down": down}
    if kind == "relaxed tie":
        return own
    named = find_stack(model).layer(2).named_parameters()
    return own | {f"new.{name}": SHRUNK * p.detach() for name, p in named if p.dim() > 1}


def _factors(model: PreTrainedModel) -> tuple[str, tuple[torch.Tensor, torch.Tensor]]:
    """A linear module of layer 2, and a change of rank 2 of its matrix."""
    path, module = next((n, m) for n, m in find_stack(model).layer(2).named_modules() if is_linear(m))
    out, into = matrix_of(module).shape
    generator = torch.Generator().manual_seed(4)
    return path, (torch.randn(out, 2, generator=generator) * 0.2, torch.randn(2, into, generator=generator) * 0.2)


@contextmanager
def _changed(model: PreTrainedModel, factor: float = 1.0) -> Iterator[None]:
    """The linear module's matrix with its change, and all matrices of its layer times `factor`."""
    path, (up, down) = _factors(model)
    layer = find_stack(model).layer(2)
    module, change = layer.get_submodule(path), up @ down
    saved = {name: p.detach().clone() for name, p in layer.named_parameters() if p.dim() > 1}
    try:
        for name in saved:
            layer.get_parameter(name).data *= factor
        module.weight.data += change.T if is_transposed(module) else change
        yield
    finally:
        for name, value in saved.items():
            layer.get_parameter(name).data.copy_(value)


@cache
def _expected(family: str, kind: str, attention: str, batch_kind: str) -> torch.Tensor | str:
    model, batch = tiny(family, "eager" if kind in EAGER else attention), _batch(batch_kind)
    try:
        return _reference(model, batch, kind)
    except (AssertionError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _reference(model: PreTrainedModel, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    def in_order(*order: int) -> Any:
        def chain(call: Any, h: torch.Tensor) -> torch.Tensor:
            for index in order:
                h = call(index, h)
            return h

        return chain

    def mapped(call: Any, h: torch.Tensor) -> torch.Tensor:
        h = call(1, call(0, h))
        return call(3, h @ _map_weight().T + torch.linspace(-0.1, 0.1, 32))

    def side_by_side(call: Any, h: torch.Tensor) -> torch.Tensor:
        h = call(0, h)
        return call(3, call(1, h) + call(2, h) - h)

    def around(call: Any, h: torch.Tensor) -> torch.Tensor:
        behind = call(0, h)
        before = call(1, behind) * AROUND["keeps"] + behind * AROUND["reads.0"]
        return call(3, before + AROUND["change"] * (call(2, before) - before))

    if kind == "identity":
        return _uncached(model, batch)
    if kind in SHARED:
        return _shared_reference(model, batch, kind)
    if kind in ("attention only", "mlp only"):
        with silenced(model, *((1, "mlp") if kind == "attention only" else (0, "attention"))):
            return _uncached(model, batch)
    if kind in ("tie", "relaxed tie"):
        with tied(model, 2, 1), _changed(model) if kind == "relaxed tie" else nullcontext():
            return _uncached(model, batch)
    if kind == "shared matrices":
        with _changed(model, factor=SHRUNK):
            return _uncached(model, batch)
    orders = {"drop": (0, 1, 3), "drop first": (1, 2, 3), "repeat": (0, 1, 1, 2, 3), "reorder": (0, 2, 1, 3)}
    chain = (
        in_order(*orders[kind])
        if kind in orders
        else {"parallel": side_by_side, "map": mapped, "tensors around": around}[kind]
    )
    return by_hand(model, batch, chain)


def _shared_reference(model: PreTrainedModel, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    source, reader = kv_pair(inspect(model))
    if kind == "attention map":
        return with_map_of(model, batch, source, reader)
    if kind == "later source":
        return later_kv(model, batch, source=reader, reader=source)
    return shared_kv(model, batch, source, reader, halves=SHARED[kind][1:] or "kv")


@cache
def _baseline(family: str, attention: str, cache_kind: str, batch_kind: str) -> str | None:
    """Why the stock model itself cannot do this cell, or None when its cached forward equals its uncached one."""
    model, batch = tiny(family, attention), _batch(batch_kind)
    try:
        whole, steps = _uncached(model, batch), _cached(model, batch, cache_kind)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, NotImplementedError, IndexError) as error:
        return f"the stock model cannot: {type(error).__name__}: {str(error).partition('. ')[0]}"
    error = (whole - steps)[batch["attention_mask"].bool()].abs().max().item()
    return (
        None if error <= LIMIT else f"the stock model's cached forward differs from its uncached one by over {LIMIT:g}"
    )


@torch.no_grad()
def _uncached(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).logits


@torch.no_grad()
def _cached(model: PreTrainedModel, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """Logits of a prefill, then (attention only) a chunk of two tokens as in verification, then single tokens."""
    config = model.config
    if kind == "paged":
        return paged_logits(model, batch, [PREFILL, PREFILL + 2, *range(PREFILL + 3, LENGTH + 1)])
    past = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=LENGTH + 4)
    name = "cache_params" if config.model_type.startswith("mamba") else "past_key_values"
    chunk = 1 if any(past.is_linear) else 2
    out, start = [], 0
    for end in (PREFILL, PREFILL + chunk, *range(PREFILL + chunk + 1, LENGTH + 1)):
        ids, mask = batch["input_ids"][:, start:end], batch["attention_mask"][:, :end]
        out.append(model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: past}).logits)
        start = end
    return torch.cat(out, 1)


Cell = tuple[str, str, str, str, str]


def cells(families: Iterable[str] = tuple(FAMILIES), attentions: Iterable[str] = ATTENTIONS) -> list[Cell]:
    """All cells, family by family."""
    return [(f, k, a, c, b) for f in families for a in attentions for k in KINDS for c, b in WAYS]


def run_all(engine: Engine = running) -> dict[Cell, Outcome]:
    """The whole matrix; about a minute on one core."""
    return {cell: run_cell(*cell, engine=engine) for cell in cells()}


def markdown(outcomes: dict[Cell, Outcome] | None = None) -> str:
    """The matrix as a page: a row for each family, a column for each kind of plan."""
    outcomes = outcomes or run_all()
    notes: dict[str, int] = {}
    rows = [
        f"| {family} | " + " | ".join(_verdict(_of(outcomes, family, kind), notes) for kind in KINDS) + " |"
        for family in FAMILIES
    ]
    texts = PLANS | {kind: f"i{mark}j" for kind, mark in SHARED.items()} | {"later source": "i@j,j"}
    columns = [f"{kind}<br>`{texts[kind]}`".replace("|", r"\|") for kind in KINDS]
    states = [outcome.state for outcome in outcomes.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    versions = f"Python {platform.python_version()}, torch {_release(torch)}, transformers {_release(transformers)}"
    head = PAGE.format(cells=len(outcomes), counts=counts, versions=versions, limit=LIMIT, each=_per_entry())
    footnotes = [f"{number}. {why}" for why, number in notes.items()]
    table = [f"| family | {' | '.join(columns)} |", "|---" * (len(KINDS) + 1) + "|", *rows]
    return "\n".join([head, *table, "", *footnotes, ""])


PAGE = """# Contract matrix

Written by `make docs` (`python -m tests.contract.matrix`); do not edit. {versions}, float32 on the CPU.

Every entry stands for {each} cells: SDPA and eager attention, with a dynamic and a static KV cache for one sequence and
for a left-padded batch of two, and with the paged KV cache of transformers' continuous batching for the rows of that
batch as requests without padding; on a random model of 4 layers. **right**: the live plan's logits, in one pass and in
cached passes (a prefill, a chunk of two tokens, single tokens), are within {limit:g} of the stock layers called by
hand; the identity plan is equal bit for bit. **P1xx**: refused with this code before anything runs.
**n/a**: the stock model itself cannot do the cell.

{cells} cells: {counts}.
"""


def _per_entry() -> int:
    return len(ATTENTIONS) * len(WAYS)


def _release(module: Any) -> str:
    return str(module.__version__).partition("+")[0]


def _of(outcomes: dict[Cell, Outcome], family: str, kind: str) -> list[Outcome]:
    return [outcome for cell, outcome in outcomes.items() if cell[:2] == (family, kind)]


def _verdict(outcomes: list[Outcome], notes: dict[str, int]) -> str:
    """As in `right 8/8`, `P105` or `4 right, 4 n/a` with the numbers of the footnotes that say why."""
    if all(outcome.state == "right" for outcome in outcomes):
        return f"right {len(outcomes)}/{len(outcomes)}"
    pieces = []
    for state in dict.fromkeys(outcome.state for outcome in outcomes):
        whys = [outcome.why for outcome in outcomes if outcome.state == state]
        if state == "refused":
            pieces.append("/".join(sorted(set(whys))) + (f" in {len(whys)}" if len(whys) < len(outcomes) else ""))
            continue
        marks = sorted({notes.setdefault(why, len(notes) + 1) for why in whys if why})
        word = "n/a" if state == "not possible" else state
        pieces.append(f"{len(whys)} {word}" + (f"<sup>{','.join(map(str, marks))}</sup>" if marks else ""))
    return ", ".join(sorted(pieces, key=lambda piece: "n/a" in piece))


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    from .planned_cells import section

    (Path(__file__).parents[2] / "docs" / "contract-matrix.md").write_text(f"{markdown()}\n{section()}")
