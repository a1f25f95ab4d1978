"""Reuse of branches from step to step (Learning-to-Cache): identities, counts, planted branches, refusals."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoal.errors import ShoalError
from shoal.reuse.branches import Call, named_branches
from shoal.reuse.fit import fit_reuse, recorded_calls, reuse_error
from shoal.reuse.running import reusing
from shoal.reuse.schedule import ReuseSchedule

WIDTH, BLOCKS, STEPS = 8, 3, 6
PATTERNS = ("blocks.*.attention", "blocks.*.mlp")


class Mix(nn.Module):
    """Tokens read each other; like some attentions it answers a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.inner((x @ x.transpose(-1, -2)).softmax(-1) @ x), None


class Block(nn.Module):
    """A block of a diffusion transformer: the time step scales what goes into its branches and what they add."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Mix()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.conditions = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        a, b, c, d = self.conditions(time).chunk(4, -1)
        x = x + a * self.attention(x * (1 + b))[0]
        return x + c * self.mlp(x * (1 + d))


class TinyDiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor, *, t: float) -> dict[str, torch.Tensor]:
        time = self.embed(torch.tensor([t]))
        for block in self.blocks:
            x = block(x, time)
        return {"sample": x}


def tiny(seed: int = 0) -> TinyDiT:
    torch.manual_seed(seed)
    return TinyDiT().eval()


def sample(model: nn.Module, seed: int = 0, steps: int = STEPS) -> list[torch.Tensor]:
    """A sampler that changes its state in place; what the model made in each step."""
    x, made = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed)), []
    for step in range(steps):
        with torch.no_grad():
            made.append(model(x, t=1 - step / steps)["sample"])
        x.add_(made[-1], alpha=-0.2)
    return made


def recorded(model: nn.Module, seeds: int = 2) -> list[list[Call]]:
    runs = []
    for seed in range(seeds):
        with recorded_calls(model) as calls:
            sample(model, seed)
        runs.append(calls)
    return runs


def constant(model: nn.Module, beta: float, **options: Any) -> ReuseSchedule:
    return ReuseSchedule.constant(named_branches(model, PATTERNS), STEPS, beta, **options)


def counted(model: nn.Module) -> Counter[str]:
    """Counts by hooks of the modules inside the branches, which nobody wraps."""
    seen: Counter[str] = Counter()
    for name in named_branches(model, PATTERNS):
        inner = next(m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear))
        inner.register_forward_hook(lambda *_, name=name: seen.update([name]))
    return seen


def test_branches_are_found_by_pattern_in_the_order_of_the_model() -> None:
    assert named_branches(tiny(), PATTERNS) == tuple(f"blocks.{i}.{b}" for i in range(3) for b in ("attention", "mlp"))
    assert named_branches(tiny(), ["blocks.1.mlp"]) == ("blocks.1.mlp",)


def test_all_computed_is_the_dense_model_bit_for_bit() -> None:
    model, wanted = tiny(), sample(tiny())
    with reusing(model, constant(model, 1.0)) as trace:
        found = sample(model)
    assert all(map(torch.equal, found, wanted))
    assert trace.steps == STEPS and not trace.reused and set(trace.computed.values()) == {STEPS}


@pytest.mark.parametrize("every", [2, 3])
def test_all_reused_is_skipping_the_branches_of_these_steps(every: int) -> None:
    """Against a forward that is written out, in which a branch is a number of the full step before."""
    model, reference = tiny(), tiny()

    def written_out(x: torch.Tensor, kept: dict[str, torch.Tensor], full: bool, t: float) -> torch.Tensor:
        time = reference.embed(torch.tensor([t]))
        for i, block in enumerate(reference.blocks):
            assert isinstance(block, Block)
            a, b, c, d = block.conditions(time).chunk(4, -1)
            if full:
                kept[f"{i}a"] = block.attention(x * (1 + b))[0]
            x = x + a * kept[f"{i}a"]
            if full:
                kept[f"{i}m"] = block.mlp(x * (1 + d))
            x = x + c * kept[f"{i}m"]
        return x

    x, kept, wanted = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)), {}, []
    with torch.no_grad():
        for step in range(STEPS):
            wanted.append(written_out(x, kept, step % every == 0, 1 - step / STEPS))
            x = x - 0.2 * wanted[-1]
    with reusing(model, constant(model, 0.0, every=every)):
        found = sample(model)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, wanted, strict=True))
    assert not torch.allclose(found[1], sample(model)[1], atol=1e-3)


def test_what_is_computed_is_what_the_schedule_plans() -> None:
    model = tiny()
    betas = torch.rand(STEPS, 2 * BLOCKS, generator=torch.Generator().manual_seed(1))
    schedule = ReuseSchedule(named_branches(model, PATTERNS), betas, threshold=0.5)
    seen = counted(model)
    with reusing(model, schedule) as trace:
        sample(model)
    assert seen == schedule.planned == trace.computed
    assert sum(schedule.planned.values()) == int((betas[1::2] > 0.5).sum()) + 3 * 2 * BLOCKS
    assert all(trace.computed[name] + trace.reused[name] == STEPS for name in schedule.branches)


def test_afterwards_the_model_is_what_it_was() -> None:
    model = tiny().train()
    model.blocks[1].mlp.forward = model.blocks[1].mlp.forward  # as accelerate's hooks leave it
    next(model.parameters()).requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    attributes = {name: dict(m.__dict__) for name, m in model.named_modules()}
    asked = [p.requires_grad for p in model.parameters()]
    for block in ("runs", "breaks"):
        with reusing(model, constant(model, 0.0)):
            assert model.__dict__.keys() - attributes[""].keys() == {"forward"}
            sample(model)
            if block == "breaks":
                with pytest.raises(ShoalError, match="U708: the model is called a 7th time"):
                    sample(model, steps=1)
    fit_reuse(model, constant(model, 0.5), recorded(model), weight=1e-3)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == attributes
    assert all(torch.equal(model.state_dict()[name], one) for name, one in state.items())
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())


def test_what_is_done_to_an_answer_in_place_does_not_reach_what_is_kept() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.branch(x).mul_(3)

    model, x = InPlace(), torch.ones(1, WIDTH)
    with torch.no_grad(), reusing(model, ReuseSchedule.constant(["branch"], 3, 0.0, every=3)):
        assert torch.equal(model(x), model(x)) and torch.equal(model(x), model.branch(x) * 3)


def planted(changes: int) -> TinyDiT:
    """Only the mlp of block `changes` sees the time step; the others are given the same in every step."""
    model = tiny(2)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            weight, bias = block.conditions.weight, block.conditions.bias  # type: ignore[union-attr]
            weight.zero_()
            bias.zero_()
            bias.view(4, WIDTH)[2] = 0.0 if i != changes else 1.0
        model.embed.weight.fill_(8.0)
        model.blocks[changes].conditions.weight.view(4, WIDTH, WIDTH)[3] = torch.eye(WIDTH)  # type: ignore[union-attr]
    return model


def test_a_planted_branch_that_changes_is_computed_and_others_are_reused() -> None:
    model = planted(1)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    calls: list[Call] = [((x,), {"t": 1 - step / STEPS}) for step in range(STEPS)]
    start = constant(model, 0.5)
    made = fit_reuse(model, start, [calls], weight=1e-3, rate=0.2, epochs=40)
    cached = made.schedule.betas[1::2]
    at = start.branches.index("blocks.1.mlp")
    assert bool((cached[:, at] > 0.9).all())
    assert bool((torch.cat([cached[:, :at], cached[:, at + 1 :]], 1) < 0.1).all())
    assert made.losses[-1] < made.losses[0]
    assert made.schedule.planned == {name: STEPS if i == at else STEPS / 2 for i, name in enumerate(start.branches)}
    assert reuse_error(model, made.schedule, [calls]) < 1e-12
    assert reuse_error(model, constant(model, 0.0), [calls]) > 1e-3


def test_betas_are_learned_by_the_formula() -> None:
    """One step of AdamW from 0.5 is a move of the rate against the sign of the gradient, here by finite differences."""
    model, schedule = tiny(), constant(tiny(), 0.5)
    runs = recorded(model, seeds=1)
    weight, rate = 1e-3, 1e-2
    found = fit_reuse(model, schedule, runs, weight=weight, rate=rate).schedule.betas[1::2].logit()
    assert bool(((found.abs() - rate).abs() < 1e-4).all())
    for step in range(1, STEPS, 2):
        for at in range(2 * BLOCKS):
            high, low = (mixed_loss(model, runs[0], step, at, 0.5 + d, weight) for d in (1e-3, -1e-3))
            if abs(high - low) > 1e-7:
                assert math.copysign(1, low - high) == math.copysign(1, float(found[step // 2, at]))


def mixed_loss(model: TinyDiT, calls: list[Call], step: int, at: int, beta: float, weight: float) -> float:
    """Written out: kept and computed outputs mixed by hooks, all betas 0.5 but one."""
    names, kept = named_branches(model, PATTERNS), {}
    betas = [beta if i == at else 0.5 for i in range(len(names))]

    def mix(i: int, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        mixed = (1 - betas[i]) * kept[i] + betas[i] * first
        return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

    def hooked(answer: Callable[[int, Any], Any], call: Call) -> torch.Tensor:
        hooks = [
            model.get_submodule(n).register_forward_hook(lambda _, __, out, i=i: answer(i, out))
            for i, n in enumerate(names)
        ]
        try:
            return model(*call[0], **call[1])["sample"]
        finally:
            for hook in hooks:
                hook.remove()

    with torch.no_grad():
        hooked(lambda i, out: kept.update({i: out[0] if isinstance(out, tuple) else out}), calls[step - 1])
        wanted = model(*calls[step][0], **calls[step][1])["sample"]
        found = hooked(mix, calls[step])
    return float((found - wanted).double().square().mean()) + weight * sum(betas)


def test_a_larger_weight_computes_less() -> None:
    model, runs = tiny(), recorded(tiny())
    made = [
        fit_reuse(model, constant(model, 0.5), runs, weight=weight, rate=0.3, epochs=15).schedule
        for weight in (0.0, 1e-4, 10.0)
    ]
    counts = [sum(one.planned.values()) for one in made]
    assert counts[0] >= counts[1] > counts[2] == 3 * 2 * BLOCKS
    assert reuse_error(model, made[0], runs) <= reuse_error(model, made[1], runs) < reuse_error(model, made[2], runs)
    again = fit_reuse(model, constant(model, 0.5), runs, weight=1e-4, rate=0.3, epochs=15).schedule
    assert torch.equal(again.betas, made[1].betas)
    assert float(again.betas.min()) >= float(torch.tensor(-5.0).sigmoid()) - 1e-7


def test_a_schedule_that_was_saved_decides_the_same(tmp_path: Path) -> None:
    model = tiny()
    betas = torch.rand(STEPS, 2 * BLOCKS, generator=torch.Generator().manual_seed(4))
    schedule = ReuseSchedule(named_branches(model, PATTERNS), betas, every=3, threshold=0.4)
    read = ReuseSchedule.load(schedule.save(tmp_path / "kept"))
    assert torch.equal(read.betas, betas)
    assert (read.branches, read.every, read.threshold) == (schedule.branches, 3, 0.4)
    made = []
    for one in (schedule, read):
        with reusing(model, one):
            made.append(sample(model))
    assert all(map(torch.equal, *made))
    with pytest.raises(ShoalError, match=r"W286: .*kept is there already"):
        read.save(tmp_path / "kept")
    constant(model, 0.0).save(tmp_path / "kept", overwrite=True)
    assert not ReuseSchedule.load(tmp_path / "kept").betas.any()


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2}, {"branches": "blocks"}, {"branches": []}, {"branches": [1]}, {"every": 1}, {"every": "2"},
        {"threshold": 2}, {"threshold": None}, None, "[]", "{", "betas",
    ],
)  # fmt: skip
def test_a_folder_that_is_none_is_refused(damage: Any, tmp_path: Path) -> None:
    place = constant(tiny(), 0.5).save(tmp_path / "kept")
    if damage is None:
        (place / "reuse.json").unlink()
    elif damage == "betas":
        (place / "betas.safetensors").write_bytes(b"nothing")
    elif isinstance(damage, str):
        (place / "reuse.json").write_text(damage)
    else:
        said = json.loads((place / "reuse.json").read_text())
        (place / "reuse.json").write_text(json.dumps(said | damage))
    with pytest.raises(ShoalError, match=r"W286: .*kept is no reuse schedule"):
        ReuseSchedule.load(place)


class Odd(nn.Module):
    """Calls its branch as often as it is told, with as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.odd = nn.Linear(2, 2), nn.Sequential(nn.Identity())
        self.odd.forward = lambda x: {"no": x}  # type: ignore[method-assign]

    def forward(self, rows: int, times: int = 1, odd: bool = False) -> torch.Tensor:
        x = torch.ones(rows, 2)
        for _ in range(times):
            x = self.branch(x)
        if odd:
            self.odd(x)
        return x


@pytest.mark.parametrize(
    ("calls", "branch", "words"),
    [
        ([(1, 2)], "branch", "is called twice in a step"),
        ([(1, 0), (1, 1)], "branch", "was not called in the last full step"),
        ([(1,), (2,)], "branch", r"was given \[\(1, 2\)\] and is now given \[\(2, 2\)\]"),
        ([(1, 1, True)], "odd", "makes a dict"),
    ],
)
def test_a_branch_that_cannot_be_reused_is_refused(calls: list[tuple[Any, ...]], branch: str, words: str) -> None:
    model = Odd()
    *before, last = calls
    with reusing(model, ReuseSchedule.constant([branch], 4, 0.0)):
        for call in before:
            model(*call)
        with pytest.raises(ShoalError, match=words) as caught:
            model(*last)
    assert caught.value.code == "U709"


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda m: named_branches(m, ["layers.*"]), "U707", "no module of the model is called layers"),
        (lambda m: named_branches(m, ["blocks.0", "blocks.*.mlp"]), "U707", "blocks.0.mlp is inside"),
        (lambda m: reusing(m, ReuseSchedule.constant(["mlp"], 4, 1)).__enter__(), "U707", "has no module mlp"),
        (lambda m: constant(m, 2.0), "U707", "a beta is no number from 0 to 1"),
        (lambda m: constant(m, math.nan), "U707", "a beta is no number"),
        (lambda m: constant(m, 0.5, every=1), "U707", "every=1"),
        (lambda m: constant(m, 0.5, threshold=-1), "U707", "threshold=-1"),
        (lambda m: ReuseSchedule.constant(["a"], 0, 1), "U707", "steps=0"),
        (lambda m: ReuseSchedule.constant(["a", "a"], 2, 1), "U707", "named twice"),
        (lambda m: ReuseSchedule(("a",), torch.ones(2, 2)), "U707", r"not \[steps, 1 branches\]"),
        (lambda m: ReuseSchedule((), torch.ones(2, 0)), "U707", "0 branches"),
        (lambda m: fit_reuse(m, constant(m, 0.5), []), "U708", "have no"),
        (lambda m: fit_reuse(m, constant(m, 0.5), [recorded(m)[0][:4]]), "U708", "have 4"),
        (lambda m: fit_reuse(m, constant(m, 0.5), recorded(m), weight=-1), "U707", "weight=-1"),
        (lambda m: fit_reuse(m, constant(m, 0.5), recorded(m), rate=0), "U707", "rate=0"),
        (lambda m: fit_reuse(m, constant(m, 0.5), recorded(m), epochs=0), "U707", "epochs=0"),
        (lambda m: fit_reuse(m, ReuseSchedule.constant(["embed"], 1, 1), [[((), {})]]), "U708", "one step"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(make: Callable[[nn.Module], Any], code: str, words: str) -> None:
    with pytest.raises(ShoalError, match=words) as caught:
        make(tiny())
    assert caught.value.code == code


def test_a_loss_that_is_no_number_stops_the_fit() -> None:
    model = tiny()
    runs = recorded(model)
    runs[0][3][0][0].fill_(math.inf)
    with pytest.raises(ShoalError, match="U709: the loss of step 3 is nan"):
        fit_reuse(model, constant(model, 0.5), runs)
    assert "forward" not in model.__dict__
