"""The contract matrix of planned checkpoints: every family x plan, written, read by another process, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import shoal
from shoal.errors import ShoalError
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.linear import is_linear, matrix_of
from shoal.models.load import Loaded
from shoal.models.stacks import find_stack
from shoal.plan import Given, Plan, cost, parse_plan, shapes_of
from shoal.transforms.narrow import narrow
from shoal.writing.planned_folder import write_planned

from . import matrix, planned_child
from .families import DEPTH, FAMILIES, VOCAB
from .matrix import EAGER, KINDS, LENGTH, PREFILL, Outcome, kv_pair, plan_text
from .planted import random_data

Weights = dict[str, torch.Tensor]
SIZE = 32


@dataclass(frozen=True)
class Kind:
    """A plan of 4 layers, or what makes it of a model, and the new tensors that it names."""

    text: str
    weights: Callable[[PreTrainedModel], Weights] | None = None


def drawn(*shape: int, seed: int = 3) -> torch.Tensor:
    """Small numbers."""
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_of(model: PreTrainedModel, layer: int) -> tuple[str, nn.Module]:
    """The first module of a layer that multiplies by a matrix, and its name."""
    return next((n, m) for n, m in find_stack(model).layer(layer).named_modules() if is_linear(m))


def factors(*places: str, layer: int = 1, names: tuple[str, str] = ("up", "down")) -> Callable[[Any], Weights]:
    """A change of rank 2 of one matrix of `layer` for each id in `places`, or two factors in its place."""

    def made(model: PreTrainedModel) -> Weights:
        path, module = linear_of(model, layer)
        out, into = matrix_of(module).shape
        first, second = names
        found = {}
        for seed, place in enumerate(places):
            found[f"{place}.{path}.{first}"] = drawn(out, 2, seed=seed)
            found[f"{place}.{path}.{second}"] = drawn(2, into, seed=seed + 9)
        return found

    return made


def replaced(model: PreTrainedModel) -> Weights:
    """Another tensor in place of each that layer 1 has, smaller by a tenth."""
    return {f"own.{n}": 0.9 * p.detach() for n, p in find_stack(model).layer(1).named_parameters()}


def scaled(model: PreTrainedModel) -> Weights:
    """What a module makes, scaled and shifted."""
    path, module = linear_of(model, 1)
    return {f"own.{path}.scale": torch.tensor([0.8]), f"own.{path}.shift": drawn(matrix_of(module).shape[0])}


def fixed(**tensors: torch.Tensor) -> Callable[[Any], Weights]:
    """Tensors that are the same for every model, `_` in their names for `.`."""
    return lambda model: {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def one_head(model: PreTrainedModel) -> Weights:
    """The mean of the heads of keys, and of those of values, of layer 1."""
    found = {}
    for name, p in find_stack(model).layer(1).named_parameters():
        if name.rpartition(".")[0].endswith(("k_proj", "v_proj")) and p.shape[0] < SIZE:
            found[f"own.{name}"] = p.detach().unflatten(0, (2, -1)).mean(0)
    if not found:
        raise NoPlanError("it has no two heads of keys and values in modules of their own")
    return found


def everything(model: PreTrainedModel) -> Weights:
    """What the plan of all kinds names."""
    return factors("one", "two")(model) | fixed(m__down=drawn(4, SIZE), m__up=drawn(SIZE, 4), m__limit=FAR)(model)


class NoPlanError(Exception):
    """The family has no such plan, and why."""


FAR = torch.tensor([30.0])
LENS = {"head__lens": torch.eye(SIZE) + drawn(SIZE, SIZE), "head__lens_bias": drawn(SIZE)}
MORE = {
    "loop": Kind("0,[1-2]x3,3"),
    "all tied to one": Kind("0,1-3=0"),
    "tied half": Kind("0,1a,1m=0,2-3"),
    "halves of two layers": Kind("0,1a,2m,3"),
    "group, mean": Kind("0,(1|2)mean,3"),
    "group, bypass": Kind("0,(1|2)bypass,3"),
    "low-rank map": Kind(
        "0-1,~2:m,3", fixed(m__down=drawn(4, SIZE), m__gate=drawn(4, SIZE), m__up=drawn(SIZE, 4), m__bias=drawn(SIZE))
    ),
    "map with a limit": Kind("0-1,~2:m,3", fixed(m__weight=torch.eye(SIZE) + drawn(SIZE, SIZE), m__limit=FAR)),
    "table": Kind("0-1,~2:m,3", fixed(m__keys=drawn(5, SIZE), m__values=drawn(5, SIZE, seed=4))),
    "a change per run": Kind("0,1:one,1:two,3", factors("one", "two")),
    "low rank": Kind("0,1:low,2-3", factors("low", names=("left", "right"))),
    "own tensors": Kind("0,1:own,2-3", replaced),
    "scale and shift": Kind("0,1:own,2-3", scaled),
    "around, of depths": Kind(
        "0-1,2:own,3",
        fixed(
            **{"own__reads__-1": drawn(SIZE, SIZE), "own__reads__0": drawn(SIZE), "own__shift": drawn(SIZE)},
            own__mixer__weight=drawn(1, SIZE), own__mixer__bias=drawn(1), own__masks=drawn(2, SIZE),
        ),
    ),
    "fewer neurons": Kind("0-3"),
    "fewer heads": Kind("0,1:own,2-3", one_head),
    "added values": Kind("@v+:mix", fixed(mix__values=torch.tensor([0.25, 0.75]))),
    "head with a lens": Kind("0-3,!end=head", fixed(**LENS)),
    "head of its own": Kind("0-3,!end=head", fixed(head__weight=drawn(VOCAB, SIZE), head__bias=drawn(VOCAB))),
    "head of depths": Kind(
        "0-3,!end=head", fixed(head__keeps=torch.tensor([0.7]), head__reads__0=drawn(SIZE, SIZE), **LENS)
    ),
    "scores of depths": Kind(
        "0-3,!end=head",
        fixed(head__logits__1=drawn(VOCAB), head__logits__3=1 + drawn(VOCAB), head__plausible=torch.tensor([0.01])),
    ),
    "all at once": Kind("0,1:one,2a,(1|2),~3:m,3=1:two", everything),
    "gate": Kind("0-1,2?g,3"),
    "exit": Kind("0-1,!early=head?g,2-3", fixed(**LENS)),
}  # fmt: skip
"""What a plan can say beside the kinds of the matrix."""
ALL = (*KINDS, *MORE)
ENDS = [PREFILL, PREFILL + 1, *range(PREFILL + 2, LENGTH + 1)]


def plan_of(model: PreTrainedModel, kind: str) -> tuple[Given, Weights]:
    """The plan of a kind on a model, and its new tensors. Raises `NoPlanError`, and what makes them raises."""
    if kind in KINDS:
        return plan_text(kind, inspect(model)), matrix._weights(model, kind) or {}
    if kind == "fewer neurons":
        identity = Plan.identity(inspect(model))
        found = narrow(Job(model, random_data(2, 8), identity, {}), keep=0.5, by="order", layers="1-2")
        return found.plan, dict(found.weights)
    one = MORE[kind]
    weights = {} if one.weights is None else one.weights(model)
    if kind == "added values":
        source, taker = kv_pair(inspect(model))
        return ",".join(f"{n}@v{source}+:mix" if n == taker else str(n) for n in range(DEPTH)), weights
    return one.text, weights


def attention_of(family: str, kind: str) -> str:
    """SDPA, where the family and the kind have it."""
    eager = kind in EAGER or isinstance(matrix._model(family, "sdpa"), str)
    return "eager" if eager else "sdpa"


class Reader:
    """The process that loads folders; it starts with the first question."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer to one request."""
        if self.process is None:
            source = str(Path(shoal.__file__).parents[1])
            words = [sys.executable, "-P", planned_child.__file__, source]
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the process that loads planned checkpoints ended; its errors are above"
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Let it end."""
        if self.process is not None:
            self.process.communicate()
            self.process = None


READER = Reader()


def run_cell(family: str, kind: str) -> Outcome:
    """One cell: right, refused by a code before anything is written, not possible, wrong or crashed."""
    attention = attention_of(family, kind)
    model = matrix._model(family, attention)
    assert not isinstance(model, str), model
    batch = matrix._batch("left-padded")
    try:
        plan, weights = plan_of(model, kind)
        with tempfile.TemporaryDirectory(prefix="shoal-planned-") as scratch:
            return _compared(model, plan, weights, batch, attention, Path(scratch))
    except NoPlanError as why:
        return Outcome("not possible", str(why))
    except ShoalError as error:
        return Outcome("refused", error.code)
    except Exception as error:  # a cell that falls over is a finding, not the end of the matrix
        return Outcome("crashed", f"{type(error).__name__}: {error}")


def _compared(
    model: PreTrainedModel, given: Given, weights: Weights, batch: Weights, attention: str, scratch: Path
) -> Outcome:
    folder = scratch / "one"
    spec = inspect(model)
    plan = given if isinstance(given, Plan) else parse_plan(str(given), Plan.identity(spec))
    write_planned(Loaded(model, None, "tiny"), plan, folder, weights=weights, prove=False)
    # as a loaded model has them: torch chooses the product of a matrix by whether the matrix learns
    own = {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in weights.items()}
    with running(model, plan, own):
        want = {
            "uncached": planned_child.uncached(model, batch),
            "cached": planned_child.cached(model, batch, ENDS),
        }
    save_file(batch, scratch / "batch.safetensors")
    request = {"folder": folder, "batch": scratch / "batch.safetensors", "answer": scratch / "answer.safetensors"}
    said = READER.ask({name: str(file) for name, file in request.items()} | {"attention": attention, "ends": ENDS})
    if "error" in said:
        return Outcome("wrong", said["error"])
    found = load_file(scratch / "answer.safetensors")
    for what, logits in want.items():
        if not torch.equal(found[what], logits):
            apart = (found[what] - logits).abs().max().item()
            return Outcome("wrong", f"{what} differs by {apart:.1e}")
    priced = cost(plan, spec, weights=shapes_of(weights)).params
    if not said["disk"] == said["memory"] == priced:
        return Outcome("wrong", f"{said['disk']} parameters on disk, {said['memory']} in memory, {priced} as its cost")
    return Outcome("right")


Cells = dict[tuple[str, str], Outcome]


def section(outcomes: Cells | None = None) -> str:
    """The part of the page on planned checkpoints."""
    if outcomes is None:
        outcomes = {(family, kind): run_cell(family, kind) for family in FAMILIES for kind in ALL}
        READER.close()
    notes: dict[str, int] = {}
    rows = [
        f"| {family} | {' | '.join(_verdict(outcomes[family, kind], notes) for kind in ALL)} |" for family in FAMILIES
    ]
    states = [outcome.state for outcome in outcomes.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)).replace("right", "same")
    heads = " | ".join(f"{kind}<br>`{_text(kind)}`" for kind in ALL)
    table = [f"| family | {heads} |", "|---" * (len(ALL) + 1) + "|", *rows]
    footnotes = [f"{number}. {why}" for why, number in notes.items()]
    return "\n".join([SECTION.format(cells=len(outcomes), counts=counts), *table, "", *footnotes, ""])


SECTION = """## Planned checkpoints

Each plan written as a [planned checkpoint](plans.md#planned-checkpoints), and read by another process with `import
shoal.auto` and `AutoModelForCausalLM.from_pretrained`. **same**: for a left-padded batch of two the logits of one pass
and of cached passes (a prefill, single tokens) are those of the live plan bit for bit, and the parameters in the
safetensors files, those in memory with each storage once, and those that `cost` counts are one number. The live plan is
given its new tensors as parameters, as a loaded model has them: torch chooses by that how it multiplies. SDPA, or eager
attention where the family or the plan needs it. A code: refused before anything is written; **n/a**: the family has no
such plan.

{cells} cells: {counts}.
"""


def _text(kind: str) -> str:
    found = MORE[kind].text if kind in MORE else matrix.PLANS.get(kind, f"i{matrix.SHARED.get(kind)}j")
    return ("i@vj+:mix" if kind == "added values" else found).replace("|", r"\|")


def _verdict(outcome: Outcome, notes: dict[str, int]) -> str:
    if outcome.state == "right":
        return "same"
    if outcome.state == "refused":
        return outcome.why
    word = "n/a" if outcome.state == "not possible" else outcome.state
    return f"{word}<sup>{notes.setdefault(outcome.why, len(notes) + 1)}</sup>"
