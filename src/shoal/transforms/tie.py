"""Ties by a pattern: fewer unique layers than run, each run keeping its norms and biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, assert_never

import torch

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.merge import combined
from shoal.fitting.result import Job, Transformed
from shoal.models.neuron_places import neuron_places
from shoal.models.opened import open_model
from shoal.plan import Run, Step
from shoal.plan.select import run_of
from shoal.plan.sources import StackLayer
from shoal.plan.steps import PartName

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    refused=(
        ((), {"unique": 0}, "U559"),
        ((), {"unique": 99}, "U559"),
        ((), {"pattern": "sandwich", "unique": 2}, "U559"),
        ((), {"pattern": "encoder"}, "U559"),
        ((), {"start": "joined"}, "U559"),
    )
)
Within = Literal["sequence", "cycle", "cycle-rev", "sandwich", "all"]
Pattern = Within | Literal["encoder"]
Start = Literal["first", "last", "stepwise", "average", "random", "joined"]


def tie(
    job: Job,
    *,
    pattern: Pattern = "cycle",
    unique: int | None = None,
    start: Start = "first",
    seed: int = 0,
    part: PartName = "layer",
) -> Transformed:
    """Let the layers that run share `unique` sets of matrices by a pattern; norms and biases stay their own.

    Of N layers with M unique sets (without `unique` half of them; one for `all`, three for `sandwich`), layer i has
    set: `sequence` floor(i M / N), neighbours alike (M = N / 2: immediate sharing in pairs); `cycle` i mod M;
    `cycle-rev` the same, in the last M layers from the other end; `sandwich` the first and the last layer their own and
    all between them one (M = 3 always); `all` one for all. `encoder`, of encoder-decoders: each layer of the decoder
    has the matrices of the encoder's layer of its number (`0-5=encoder.0-5`); its attention to the encoder, for which
    the encoder has none, is its own.
    `start` says with which matrices a set begins: those of its `first` or `last` layer; `stepwise`, of the layer
    round(s (N - 1) / (M - 1)) for set s, so that first and last layer of the base are kept; `average`, the mean of its
    layers'; `random`, numbers of the same standard deviation, drawn with `seed`, to compare with; `joined` (with
    `part` mlp), all neurons of the set's layers in one wider mlp, which makes the mean of what their mlps make: as many
    parameters as before, and as many times the FLOPs as layers share it. The last four are new tensors that the runs
    share (`0=tie-0`), and so can learn (the learner `plan`). `part`: only attentions or only mlps are tied. Stored
    parameters fall (but of `joined`); FLOPs and KV do not. `unique` N changes nothing. A tied model is hardly usable
    before it is trained: low rank alone at equal stored values is better without training. Raises U559 for numbers that
    fit no layers, for mlps that cannot be joined, and where something else runs than whole layers with their own
    tensors.

    Source: Takase and Kiyono 2021 (sequence, cycle, cycle-rev; arXiv 2104.06022); Subformer, Reid et al. 2021
    (sandwich, arXiv 2101.00234); MobileLLM, Liu et al. 2024 (pairs, arXiv 2402.14905); ALBERT, Lan et al. 2019 (all,
    arXiv 1909.11942); One Wide Feedforward, Pessoa Pires et al. 2023 (arXiv 2309.01826: one mlp for all, `joined` its
    width at equal parameters); Tied Transformers, Xia et al. 2019 (encoder; AAAI 33). Starts: relaxed recursive
    transformers, Bae et al. 2024 (arXiv 2410.20672, section 2.2).

    How we differ: there norms are shared too, as the plan `0-14,0-14` does; the systems train from random numbers, but
    for the last. Tied Transformers tie the whole of encoder and decoder, where here the attention to the encoder is the
    decoder's own; and the embeddings, which here are tied as the model has them.
    """
    runs = _runs(job)
    if pattern == "encoder":
        _require_encoder(job, runs, whole=(unique, start, part) == (None, "first", "layer"))
        tied = tuple(replace(run, tie=StackLayer("encoder", run.layer)) for run in runs)
        return Transformed(job.plan.with_steps(tied, job.stack), job.weights)
    sets = _sets(pattern, len(runs), unique)
    if start == "joined" and part != "mlp":
        raise UsageError(
            f"tie: start=joined joins neurons of mlps, and part={part} ties more; give part=mlp", code="U559"
        )
    layers = [run.layer for run in runs]
    weights = dict(job.weights)
    steps: list[Step] = []
    count = max(sets) + 1
    for number, run in enumerate(runs):
        members = [layers[n] for n, own in enumerate(sets) if own == sets[number]]
        name = f"tie-{sets[number]}"
        if len(members) == 1 and start != "stepwise":
            steps.append(run)
        elif start in ("first", "last"):
            steps += _tied(run, members[0 if start == "first" else -1], part)
        else:
            steps += _tied(run, name, part)
            source = layers[round(sets[number] * (len(runs) - 1) / max(count - 1, 1))]
            shares = dict.fromkeys(members, 1 / len(members)) if start == "average" else {source: 1.0}
            if not any(key.startswith(f"{name}.") for key in weights):
                joined = start == "joined"
                weights |= _joined(job, name, members) if joined else _shared(job, name, run.layer, shares, part)
                if start == "random":
                    weights |= _drawn(weights, name, sets[number], seed)
        job.tell(number + 1, len(runs), "tie")
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights)


def _runs(job: Job) -> list[Run]:
    """The runs of the plan, whole layers with their own tensors, each once. Raises U559 for anything else."""
    steps = job.plan.steps(job.stack)
    found = [run for run in map(run_of, steps) if run is not None and run == Run(run.layer)]
    if len(found) < len(steps) or len({run.layer for run in found}) < len(found):
        raise UsageError(
            f"tie shares the matrices of whole layers that run once with their own, and the plan {job.plan} runs "
            "something else; tie first, then add it",
            code="U559",
        )
    return found


def _require_encoder(job: Job, runs: list[Run], *, whole: bool) -> None:
    """Raise U559 where the runs cannot each have the matrices of an encoder's layer. `whole`: nothing else is asked."""
    depths = {name: depth for name, depth in job.plan.base.depths if name != job.plan.stack_name(job.stack)}
    if not whole or max(run.layer for run in runs) >= depths.get("encoder", 0):
        raise UsageError(
            "tie:pattern=encoder gives the layers of a decoder the matrices of the encoder's layers of the same "
            f"numbers, whole and as they are, and this model has {depths.get('encoder', 0)} encoder layers beside; "
            "leave the other options out, or name an encoder-decoder whose encoder is as deep",
            code="U559",
        )


def _sets(pattern: Within, count: int, unique: int | None) -> list[int]:
    """The set of each of so many layers. Raises U559 for numbers that fit no layers."""
    fixed = {"all": 1, "sandwich": 3}.get(pattern)
    number = fixed or (count // 2 if unique is None else unique)
    if not 1 <= number <= count or (fixed is not None and unique not in (None, fixed)):
        raise UsageError(
            f"tie: {count} layers have no {unique if unique is not None else number} sets of matrices by the pattern "
            f"{pattern}; give unique={fixed or max(1, count // 2)}",
            code="U559",
        )
    match pattern:
        case "sequence" | "all":
            return [n * number // count for n in range(count)]
        case "cycle":
            return [n % number for n in range(count)]
        case "cycle-rev":
            return [count - 1 - n if n >= max(count - number, number) else n % number for n in range(count)]
        case "sandwich":
            return [0, *[1] * (count - 2), 2]
        case _:
            assert_never(pattern)


def _tied(run: Run, owner: int | str, part: PartName) -> list[Step]:
    """The run with the matrices of another layer, or of a part of it; or with new ones, which are those of the part."""
    if owner == run.layer:
        return [run]
    if part == "layer" or isinstance(owner, str):
        return [replace(run, tie=owner)]
    return [Run(run.layer, one, tie=owner if one == part else None) for one in ("attention", "mlp")]


def _joined(job: Job, name: str, members: list[int]) -> dict[str, torch.Tensor]:
    """Under ID.NAME the tensors of all neurons of these layers, read by as much less as there are layers."""
    opened = open_model(job.model)
    stack, made = opened.stack(job.stack), dict[str, torch.Tensor]()
    known = neuron_places(opened, members, job.stack)
    first = known[members[0]]
    for layer, one in known.items():
        if isinstance(one, str) or isinstance(first, str) or one.spec != first.spec:
            why = one if isinstance(one, str) else f"it has not the neurons of layer {members[0]}"
            raise UsageError(f"tie: the mlp of layer {layer} cannot be joined with others: {why}", code="U559")
        for tensor in one.spec.tensors:
            held = stack.layer(layer).get_parameter(tensor.name).detach()
            rows = one.rows(tensor.name, held) / (len(members) if tensor == one.spec.reads else 1)
            before = made.get(tensor.name)
            made[tensor.name] = rows if before is None else torch.cat([before, rows.to(before)])
    assert not isinstance(first, str)
    return {f"{name}.{key}": first.tensor(key, rows) for key, rows in made.items()}


def _drawn(weights: Mapping[str, torch.Tensor], name: str, number: int, seed: int) -> dict[str, torch.Tensor]:
    """Random matrices in the place of those of a set, each with the standard deviation of the one that it replaces."""
    generator = torch.Generator().manual_seed(seed * 1000 + number)
    old = {key: tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}
    return {
        key: (torch.randn(tensor.shape, generator=generator) * tensor.float().std()).to(tensor)
        for key, tensor in old.items()
    }


def _shared(job: Job, name: str, layer: int, shares: dict[int, float], part: PartName) -> dict[str, torch.Tensor]:
    """The matrices of a set, ID.NAME, of the whole layer or of a part."""
    opened = open_model(job.model)
    parts = opened.facts(job.stack).layers[layer].parts
    inside = ("",) if part == "layer" else tuple(f"{module}." for module in getattr(parts, part, ()))
    made = combined(opened.model, name, layer, shares, job.stack)
    named = {key.partition(".")[2]: tensor for key, tensor in made.items()}
    return {f"{name}.{key}": tensor for key, tensor in named.items() if key.startswith(inside)}
