"""Merges, fused and folded groups, parallel pairs: formulas, and null settings that are dropping."""

from __future__ import annotations

import copy

import pytest
import torch

from shoal.errors import ModelError, UsageError
from shoal.fitting.result import Transformed
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Parallel, Run, check, cost, shapes_of
from shoal.recording.layer_inputs import LayerInputs

from .families import tiny
from .planted import PLANTED, planted, random_data
from .transform_jobs import EXAMPLES, HOLE, MERGES, do, job, logits, relative

NULLS = {name: dict(own.null) for name, own in EXAMPLES.items() if own.null is not None}


@pytest.mark.parametrize("name", MERGES)
def test_merging_two_equal_layers_gives_either(name: str) -> None:
    model = copy.deepcopy(tiny("llama"))
    layers = find_stack(model).layers
    layers[2].load_state_dict(layers[1].state_dict())
    made = do(name, job(model, [2]))
    own = layers[1].state_dict()
    assert made.weights and all(torch.equal(t, own[n.split(".", 1)[1]]) for n, t in made.weights.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("name", MERGES)
def test_a_merge_changes_tensors_and_its_null_setting_is_dropping_bit_for_bit(name: str, family: str) -> None:
    model, given = tiny(family), job(tiny(family), [1, 2])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    dropped = logits(model, Transformed(given.plan, {}))
    made = do(name, given)
    own = find_stack(model).layer(0).state_dict()
    matrices = {n: t for n, t in made.weights.items() if t.dim() >= 2}
    assert matrices and not any(torch.equal(t, own[n.split(".", 1)[1]]) for n, t in matrices.items())
    assert not torch.equal(logits(model, made), dropped)
    if name in NULLS:
        assert torch.equal(logits(model, do(name, given, **NULLS[name])), dropped)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_merges_by_their_formulas() -> None:
    model, given = tiny("llama"), job(tiny("llama"), [1, 2])
    zero, one, two = (find_stack(model).layer(i).mlp.down_proj.weight.detach() for i in range(3))
    found = {name: do(name, given).weights[f"{name}-0.mlp.down_proj.weight"] for name in MERGES if name != "mka"}
    assert torch.allclose(found["difference-sum"], one + two - zero, atol=1e-6)
    assert torch.equal(found["laco-notebook"], two)
    assert torch.allclose(found["weighted-average"], zero / 2 + (one + two) / 4, atol=1e-6)
    middle = (one + two) / 2
    angle = torch.arccos((zero * middle).sum() / zero.norm() / middle.norm())
    assert torch.allclose(found["slerp"], (zero + middle) * (angle / 2).sin() / angle.sin(), atol=1e-5)


def test_mka_compares_layers_by_what_they_say() -> None:
    from shoal.transforms.mka import _diffusion, _similarity

    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    own = _diffusion(x, 1.0, 0.5, 2)
    assert _similarity(own, own) == pytest.approx(1.0)
    assert _similarity(own, _diffusion(x @ turn, 1.0, 0.5, 2)) == pytest.approx(1.0)
    other = torch.randn(32, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert _similarity(own, _diffusion(other, 1.0, 0.5, 2)) < 0.6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fusing_a_group_lowers_its_error_and_starts_from_dropping(family: str) -> None:
    model, given = tiny(family), job(tiny(family), [HOLE])
    dropped = logits(model, Transformed(given.plan, {}))
    null = do("fuse-group", given, epochs=0)
    assert torch.equal(logits(model, null), dropped)
    made = do("fuse-group", given, rate=1e-2, epochs=4)
    fit = made.fits[0]
    assert fit.stand_in < fit.drop * 0.8 and fit.drop == null.fits[0].drop
    assert {step.weights for step in made.plan.steps() if isinstance(step, Run)} == {
        None,
        "fuse-group-1",
        "fuse-group-3",
    }
    assert all(p.grad is None for p in model.parameters())
    again = do("fuse-group", given, rate=1e-2, epochs=4)
    assert all(torch.equal(t, again.weights[n]) for n, t in made.weights.items())


def test_folding_groups_shares_matrices_and_keeps_norms() -> None:
    model = tiny("llama")
    made = do("fold-groups", job(model, []), first=0, last=3)
    assert str(made.plan) == "0,1=0:fold-1,2,3=2:fold-3"
    assert {name.split(".", 1)[1] for name in made.weights} == {"self_attn.o_proj.scale", "mlp.down_proj.scale"}
    assert all(tensor.shape == (1,) for tensor in made.weights.values())
    held = sum(p.numel() for n in (1, 3) for p in find_stack(model).layer(n).parameters() if p.dim() > 1)
    spec = inspect(model)
    assert cost(made.plan, spec, weights=shapes_of(made.weights)).params == spec.params - held + 4
    assert do("fold-groups", job(model, []), first=0, last=3, group=1).plan.is_identity()
    around = do("fold-groups", job(model, [1]), first=0, last=2)
    assert str(around.plan) == "0,2=0:fold-2,3" and [fit.site for fit in around.fits] == ["2"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_folding_twins_changes_nothing(family: str) -> None:
    twins = copy.deepcopy(tiny(family))
    layers = find_stack(twins).layers
    layers[1].load_state_dict(layers[0].state_dict())
    folded = do("fold-groups", job(twins, []), first=0, last=1)
    assert "1=0" in str(folded.plan) and relative(logits(twins, folded), logits(twins)) < 1e-4
    assert ("a norm is behind" in folded.fits[0].note) == (family == "olmo2")


def test_parallel_pairs() -> None:
    model = tiny("llama")
    made = do("parallel-pairs", job(model, []), first=1, last=3)
    assert made.plan.steps() == (Run(0), Parallel((Run(1), Run(2))), Run(3))
    assert do("parallel-pairs", job(model, []), first=0, last=3, group=1).plan.is_identity()
    assert do("parallel-pairs", job(model, [])).plan == made.plan.with_steps(
        (Run(0), Parallel((Run(1), Run(2))), Run(3))
    )
    bypassed = do("parallel-pairs", job(model, []), first=1, last=3, bypass=True)
    assert str(bypassed.plan) == "0,(1|2)bypass,3"
    assert not check(bypassed.plan, inspect(model))
    stream = LayerInputs(model, random_data(2, 12), batch=2).stream()
    stream.advance(Run(0))
    x = stream.states[0]
    with torch.no_grad():
        y = h = x
        for layer in (1, 2):
            stream.states[0] = x
            wrote = stream.run(0, Run(layer, "attention")) - x
            stream.states[0] = h = h + wrote
            y = y + wrote + stream.run(0, Run(layer, "mlp")) - h
    stream.states[0] = x
    stream.advance(bypassed.plan.steps()[1])
    assert relative(stream.states[0], y) < 1e-6, "an mlp sees no later attention, and each is counted once"
    still = planted("llama")
    pair = do("parallel-pairs", job(still, []), first=PLANTED["llama"], last=PLANTED["llama"] + 1)
    assert relative(logits(still, pair), logits(still)) < 1e-5


def test_layers_of_two_kinds_are_not_merged() -> None:
    with pytest.raises(UsageError, match="U556"):
        do("weighted-average", job(tiny("deepseek_v3"), [2]))
    with pytest.raises(ModelError, match="M316"):
        do("linear-map", job(tiny("gemma3n_text"), [1]))
