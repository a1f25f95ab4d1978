"""Stand-ins and merges: planted answers, null settings, and the promise that replacing is never worse than dropping."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal.data import Data
from shoal.errors import ModelError, ShoalError, UsageError
from shoal.executing.live import running
from shoal.fitting.holes import Pair, find_holes
from shoal.fitting.normal import Normal
from shoal.fitting.result import Job, Transformed
from shoal.fitting.writers import Prober, folded_map, folded_scale
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Map, Parallel, Plan, Run, check, drop, parse_plan
from shoal.recording.observe import observe
from shoal.recording.walk import Walk
from shoal.registry import entries, get

from .families import tiny
from .planted import PLANTED, data_of, planted, random_data

STAND_INS = ("bias-patch", "channel-scale", "linear-map", "low-rank-map", "refit", "replaceme")
MERGES = ("difference-sum", "laco-notebook", "mka", "slerp", "weighted-average")
NULLS = {"difference-sum": {"scale": 0.0}, "mka": {"share": 0.0}, "slerp": {"t": 0.0}, "weighted-average": {"t": 0.0}}
SHORT: dict[str, dict[str, Any]] = {"low-rank-map": {"rank": 4}}
HOLE = 2


def job(model: PreTrainedModel, removed: list[int], *, data: Data | None = None, batch: int = 4) -> Job:
    plan = Plan.identity(inspect(model))
    return Job(model, data or random_data(16, 24), drop(plan, removed) if removed else plan, batch=batch)


def do(name: str, given: Job, **options: Any) -> Transformed:
    return get("transforms", name).load()(given, **options)


@torch.no_grad()
def logits(model: PreTrainedModel, made: Transformed | None = None, seed: int = 9) -> torch.Tensor:
    ids = random_data(3, 16, seed=seed).ids
    if made is None:
        return model(input_ids=ids, use_cache=False).logits
    with running(model, made.plan, made.weights):
        return model(input_ids=ids, use_cache=False).logits


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@contextmanager
def layer_becomes(model: PreTrainedModel, change: Any, index: int = HOLE) -> Iterator[None]:
    """While this holds the layer answers change(its input) instead."""
    inspect(model)  # looks once at a model that it has not seen, and should see it as it is

    def answer(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        new = change(args[0] if args else kwargs["hidden_states"])
        return (new, *out[1:]) if isinstance(out, tuple) else new

    hook = find_stack(model).layer(index).register_forward_hook(answer, with_kwargs=True)
    yield
    hook.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral"])
def test_a_layer_that_is_a_linear_map_is_recovered(family: str) -> None:
    model, draw = tiny(family), torch.Generator().manual_seed(5)
    change = torch.randn(32, 3, generator=draw) @ torch.randn(3, 32, generator=draw) / 10
    bias = torch.randn(32, generator=draw) / 10
    with layer_becomes(model, lambda x: x + x @ change.T + bias):
        wanted = logits(model)
        for name, own in (("linear-map", {}), ("low-rank-map", {"rank": 3})):
            made = do(name, job(model, [HOLE]), **own)
            found = made.weights
            assert relative(logits(model, made), wanted) < 1e-3
            assert relative(found["map-2-2.bias"], bias) < 1e-3
            assert made.fits[0].stand_in < 1e-6 * made.fits[0].drop
        assert relative(found["map-2-2.up"] @ found["map-2-2.down"], change) < 1e-3
    assert made.plan.steps()[HOLE] == Map(HOLE, HOLE, "map-2-2")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("name", ["refit", "replaceme", "channel-scale"])
def test_what_the_mlp_before_could_have_written_is_recovered(name: str, family: str) -> None:
    """The removed layer adds a linear function of what the mlp before it wrote (or of what went into its matrix)."""
    model, draw = tiny(family), torch.Generator().manual_seed(5)
    matrix = "mlp.c_proj" if family == "gpt2" else "mlp.down_proj"
    module = find_stack(model).layer(HOLE - 1).get_submodule(matrix)
    inner = torch.randn(32, 64, generator=draw) / 10
    square, scale = torch.randn(32, 32, generator=draw) / 5, torch.rand(32, generator=draw)
    added = {
        "refit": lambda a, m: a @ inner.T,
        "replaceme": lambda a, m: m @ square.T,
        "channel-scale": lambda a, m: m * scale,
    }
    seen: dict[str, torch.Tensor] = {}
    hook = module.register_forward_hook(lambda _, args, out: seen.update(given=args[0], out=out))
    with layer_becomes(
        model, lambda x: x + added[name](seen["given"].view(*x.shape[:2], -1), seen["out"].view(x.shape))
    ):
        wanted = logits(model)
        # one batch: the hook knows the mlp's output of the last one only
        made = do(name, job(model, [HOLE], batch=16), ridge=1e-9)
    hook.remove()
    assert relative(logits(model, made), wanted) < 1e-3
    assert made.plan.steps()[HOLE - 1] == Run(HOLE - 1, weights=f"{name}-{HOLE - 1}")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_for_a_layer_that_does_nothing_every_stand_in_is_the_identity(family: str) -> None:
    model, layer = planted(family), PLANTED[family]
    wanted = logits(model)
    for name in STAND_INS:
        made = do(name, job(model, [layer]), **SHORT.get(name, {}))
        assert relative(logits(model, made), wanted) < 1e-5, name
        if name == "linear-map":
            assert torch.allclose(made.weights[f"map-{layer}-{layer}.weight"], torch.eye(32), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("name", STAND_INS)
def test_replacing_is_never_worse_than_dropping_on_the_calibration_text(name: str, family: str) -> None:
    model = tiny(family)
    for removed in ([1, 2], [0, 2], [3]):
        made = do(name, job(model, removed, batch=2), **SHORT.get(name, {}))
        assert not check(made.plan, inspect(model), {n: tuple(t.shape) for n, t in made.weights.items()})
        assert all(fit.stand_in <= fit.drop * (1 + 1e-9) for fit in made.fits)
        assert made.fits or made.notes
        assert torch.isfinite(logits(model, made)).all()
    if made.fits:
        assert made.fits[0].stand_in < made.fits[0].drop


def test_one_run_stands_in_for_layers_and_the_next_attention() -> None:
    model = tiny("llama")
    given = replace(job(model, []), plan=parse_plan("0,2m,3", Plan.identity(inspect(model))))
    made = do("refit", given)
    assert [fit.site for fit in made.fits] == ["2a"] and not made.notes
    assert made.fits[0].stand_in < made.fits[0].drop
    assert relative(logits(model, made), logits(model)) < relative(
        logits(model, Transformed(given.plan, {})), logits(model)
    )


def test_a_second_stand_in_is_fitted_on_the_stream_with_the_first() -> None:
    """The second map's error is that of the model as it will run, not that of the dense stream."""
    model, data = tiny("llama"), random_data(8, 24)
    made = do("linear-map", job(model, [1, 3], data=data), skip_first=0, ridge=1e-4)
    states: list[torch.Tensor] = []
    dense: list[torch.Tensor] = []
    observe(model, data.batches(8), lambda i, x, y: dense.append(y), before=lambda *_: None)
    with running(model, made.plan, made.weights):
        observe(model, data.batches(8), lambda i, x, y: states.append(y), before=lambda *_: None)
    kept = slice(0, 4)  # batches of 4: the second is held back only from 4 batches on
    out = states[-1] @ made.weights["map-3-3.weight"].T + made.weights["map-3-3.bias"]
    assert made.fits[1].stand_in == pytest.approx(float((out - dense[3]).square().mean()), rel=1e-4)
    assert len(made.fits) == 2 and kept


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_map_stands_in_for_a_part(part: str) -> None:
    model = tiny("llama")
    text = "0-1,2m,3" if part == "attention" else "0-1,2a,3"
    given = replace(job(model, []), plan=parse_plan(text, Plan.identity(inspect(model))))
    made = do("linear-map", given)
    assert str(made.plan).startswith("0-1,~2:map-2-attention,2m" if part == "attention" else "0-1,2a,~2:map-2-mlp")
    assert made.fits[0].site == ("2a" if part == "attention" else "2m")
    assert made.fits[0].stand_in < made.fits[0].drop
    assert relative(logits(model, made), logits(model)) < relative(
        logits(model, Transformed(given.plan, {})), logits(model)
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_first_tokens_are_not_fitted(side: str) -> None:
    """Sequences padded on either side give the map of the same sequences without padding."""
    model, data = tiny("llama"), random_data(6, 20)
    cut = slice(0, 12) if side == "right" else slice(8, 20)
    mask = torch.zeros_like(data.ids)
    mask[:, cut] = 1
    bare = do("linear-map", job(model, [HOLE], data=data_of(data.ids[:, cut])), ridge=1e-2)
    padded = do("linear-map", job(model, [HOLE], data=data_of(data.ids * mask, mask)), ridge=1e-2)
    for name in ("weight", "bias"):
        assert relative(padded.weights[f"map-2-2.{name}"], bare.weights[f"map-2-2.{name}"]) < 1e-4


def test_an_outlier_is_neither_fitted_nor_mapped() -> None:
    """One token whose state is a hundred times as long: the map is that of the others, and hands the token on."""
    model, data = copy.deepcopy(tiny("llama")), random_data(8, 24)
    data.ids[:, 5] = 1
    data.ids[data.ids == 1] = 4
    data.ids[:, 5] = 1
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 100
    made = do("linear-map", job(model, [HOLE], data=data))
    bare = do("linear-map", job(model, [HOLE], data=data), outlier=float("inf"))
    assert "map-2-2.limit" in made.weights and "map-2-2.limit" not in bare.weights
    assert relative(made.weights["map-2-2.weight"], bare.weights["map-2-2.weight"]) > 1e-3
    ids, plan = data.ids[:1], made.plan
    seen: list[torch.Tensor] = []
    hook = find_stack(model).layer(3).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for one, weights in ((drop(Plan.identity(inspect(model)), [HOLE]), {}), (plan, made.weights)):
            with running(model, one, weights):
                model(input_ids=ids, use_cache=False)
    hook.remove()
    assert torch.equal(seen[1][0, 5], seen[0][0, 5])
    assert not torch.allclose(seen[1][0, 6], seen[0][0, 6])


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


KINDS = ("layer", "ffn", "swiglu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_trained_net_comes_nearer_than_dropping_and_starts_from_it(family: str, kind: str) -> None:
    model, given = tiny(family), job(tiny(family), [1, 2])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    null = do("streamline", given, kind=kind, epochs=0, loss_epochs=0)
    assert null.plan == given.plan and not null.weights
    made = do("streamline", given, kind=kind, epochs=4, loss_epochs=1, rate=3e-3)
    assert str(made.plan) == ("0:streamline-0,3" if kind == "layer" else "0,~1-2,3")
    assert not check(made.plan, inspect(model), {n: tuple(t.shape) for n, t in made.weights.items()})
    (fit,) = made.fits
    assert fit.site == "1-2" and fit.drop == null.fits[0].drop and fit.held_drop == null.fits[0].held_drop
    assert fit.stand_in < fit.drop * 0.99 and (fit.held_stand_in or 0) < (fit.held_drop or 0)
    assert "language loss" in made.notes[0] and not null.notes
    again = do("streamline", given, kind=kind, epochs=4, loss_epochs=1, rate=3e-3)
    assert all(torch.equal(t, again.weights[n]) for n, t in made.weights.items())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_loss_is_that_of_the_model_with_its_nets(kind: str) -> None:
    """Trained on the loss alone, it falls on the very text; the errors of the states are as they were before."""
    model = tiny("llama")
    text = random_data(3, 24)
    given = job(model, [1, 3], data=text, batch=1)
    made = do("streamline", given, kind=kind, epochs=0, loss_epochs=6, rate=9e-3)
    assert [fit.drop for fit in made.fits] == [fit.stand_in for fit in made.fits]
    before, after = (float(piece) for piece in made.notes[0].split(": ")[1].split(" to "))
    losses = []
    for one in (Transformed(given.plan, {}), made):
        with running(model, one.plan, one.weights), torch.no_grad():
            losses.append(float(model(input_ids=text.ids, labels=text.ids, use_cache=False).loss))
    assert losses == pytest.approx([before, after], abs=1e-4) and after < before


def test_a_net_takes_over_from_the_holes_on_both_sides() -> None:
    model = tiny("llama")
    whole = do("streamline", job(model, [0, 2, 3]), epochs=2, loss_epochs=0, rate=1e-3)
    assert str(whole.plan) == "1:streamline-1" and [fit.site for fit in whole.fits] == ["0, 2-3"]
    given = replace(job(model, []), plan=parse_plan("0,1a,3", Plan.identity(inspect(model))))
    parts = do("streamline", given, kind="swiglu", epochs=2, loss_epochs=0, inner=5)
    assert str(parts.plan) == "0,1a,~1:map-1-mlp,~2,3" and parts.weights["map-2-2.up"].shape == (32, 5)
    assert [fit.site for fit in parts.fits] == ["1m", "2"]
    with pytest.raises(UsageError, match="U557"):
        do("streamline", given)


def test_folding_groups_shares_matrices_and_keeps_norms() -> None:
    model = tiny("llama")
    made = do("fold-groups", job(model, []), first=0, last=3)
    assert [step.layer for step in made.plan.steps() if isinstance(step, Run)] == [0, 0, 2, 2]
    stored = {name.split(".", 1)[1] for name in made.weights}
    assert stored == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    }
    norm = find_stack(model).layer(1).input_layernorm.weight
    assert torch.equal(made.weights["fold-1.input_layernorm.weight"], norm)
    assert do("fold-groups", job(model, []), first=0, last=3, group=1).plan.is_identity()
    around = do("fold-groups", job(model, [1]), first=0, last=2)
    assert str(around.plan) == "0,0:fold-2,3" and [fit.site for fit in around.fits] == ["2"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_folding_twins_changes_nothing(family: str) -> None:
    twins = copy.deepcopy(tiny(family))
    layers = find_stack(twins).layers
    layers[1].load_state_dict(layers[0].state_dict())
    folded = do("fold-groups", job(twins, []), first=0, last=1)
    assert folded.weights and relative(logits(twins, folded), logits(twins)) < 1e-4
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
    assert str(bypassed.plan) == "0,(1a|2a),(1m|2m),3"
    assert not check(bypassed.plan, inspect(model))
    stream = Walk(model, random_data(2, 12), batch=2).stream()
    stream.advance(Run(0))
    x = stream.states[0]
    with torch.no_grad():
        h = x + sum(stream.run(0, Run(layer, "attention")) - x for layer in (1, 2))
        stream.states[0] = h
        y = h + sum(stream.run(0, Run(layer, "mlp")) - h for layer in (1, 2))
    stream.states[0] = x
    for step in bypassed.plan.steps()[1:3]:
        stream.advance(step)
    assert relative(stream.states[0], y) < 1e-6, "what an attention wrote is counted once"
    still = planted("llama")
    pair = do("parallel-pairs", job(still, []), first=PLANTED["llama"], last=PLANTED["llama"] + 1)
    assert relative(logits(still, pair), logits(still)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe", "granite", "deepseek_v3", "opt"])
def test_a_fold_computes_what_the_explicit_step_computes(family: str) -> None:
    model = tiny(family)
    pair = Pair(job(model, [3], batch=2))
    prober, draw = Prober(pair), torch.Generator().manual_seed(3)
    turn, scale = torch.randn(32, 32, generator=draw) / 4, torch.rand(32, generator=draw) + 0.5
    for layer in (1, 2):
        for part in ("attention", "mlp"):
            writers = prober.writers(layer, part)
            assert writers
            module = find_stack(model).layer(layer)
            x = pair.pruned.states[0]
            with torch.no_grad():
                written = pair.pruned.run(0, Run(layer, part)) - x
                for own, wanted in (
                    (folded_map(module, writers, turn), written @ turn.T),
                    (folded_scale(module, writers, scale), written * scale),
                ):
                    out = pair.pruned.run(0, Run(layer, part, "own"), {f"own.{n}": t for n, t in own.items()})
                    assert float((out - x - wanted).abs().max()) < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_a_norm_behind_the_part_forbids_the_fold_and_says_so() -> None:
    model = tiny("olmo2")
    made = do("refit", job(model, [HOLE]))
    assert made.plan == job(model, [HOLE]).plan and not made.weights
    assert "cannot be rewritten exactly; 2 is only dropped" in made.notes[0]
    explicit = do("compensate", job(model, [HOLE]))
    assert any(isinstance(step, Map) for step in explicit.plan.steps()) and explicit.notes


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_compensating_in_the_weights_is_the_explicit_scale(family: str) -> None:
    model, given = tiny(family), job(tiny(family), [0, 2])
    folded, explicit = do("compensate", given), do("compensate", given, fold=False)
    assert not any(isinstance(step, Map) for step in folded.plan.steps())
    assert relative(logits(model, folded), logits(model, explicit)) < 1e-3, "the norms' epsilon aside"
    assert relative(logits(model, folded), logits(model, Transformed(given.plan, {}))) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3_text", "jamba"])
@torch.no_grad()
def test_a_walk_goes_where_the_model_goes(family: str) -> None:
    model, data = tiny(family), random_data(4, 12)
    seen: list[torch.Tensor] = []
    observe(model, data.batches(4), lambda i, x, y: seen.append(y.clone()), before=lambda *_: None)
    stream = Walk(model, data, batch=4).stream()
    for layer, wanted in enumerate(seen):
        stream.advance(Run(layer))
        assert torch.allclose(stream.states[0], wanted, atol=1e-6), layer


def test_normal_equations_are_least_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=draw) + 1, torch.randn(50, 3, generator=draw)
    sums = Normal(4, 3)
    for rows in (slice(0, 20), slice(20, 50)):
        sums.add(x[rows], y[rows])
    weight, bias = sums.solve(0.0)
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(50, 1)], 1).double(), y.double()).solution
    assert torch.allclose(torch.cat([weight.T, bias[None]]), wanted, atol=1e-8)  # type: ignore[index]
    assert sums.error(weight, bias) == pytest.approx(float((x.double() @ weight.T + bias - y).square().mean()))
    assert sums.solve(1e12, towards=torch.ones(3, 4))[0] == pytest.approx(torch.ones(3, 4), abs=1e-6)


def test_holes() -> None:
    plan = Plan.identity(inspect(tiny("llama")))

    def holes(text: str) -> list[tuple[int, str]]:
        return [(hole.position, str(hole)) for hole in find_holes(parse_plan(text, plan), "x")]

    assert holes("0,3") == [(1, "1-2")]
    assert holes("1-2") == [(0, "0"), (2, "3")]
    assert holes("0,1m,2a,3") == [(1, "1a"), (3, "2m")]
    assert holes("0,2a,2m,3") == [(1, "1")]
    assert holes("1a") == [(0, "0"), (1, "1m"), (1, "2-3")]
    for text in ("0,2,1", "0,1x2,2", "0,(1|2)", "0-1,2@1"):
        with pytest.raises(UsageError, match="U552"):
            holes(text)
    with pytest.raises(UsageError, match="U553"):
        holes("0-3")


WRONG = {
    "linear-map": ([HOLE], {"skip_first": 24}, "U554"),
    "low-rank-map": ([HOLE], {"rank": 33}, "U555"),
    "slerp": ([HOLE], {"t": 1.5}, "U558"),
    "weighted-average": ([0], {}, "U557"),
    "difference-sum": ([], {}, "U553"),
    "mka": ([HOLE], {"share": -1.0}, "U558"),
    "fuse-group": ([HOLE], {"neighbours": 0}, "U557"),
    "parallel-pairs": ([], {"first": 2, "last": 2}, "U559"),
    "fold-groups": ([1], {"first": 0, "last": 2, "group": 3}, "U559"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_done_is_refused(name: str) -> None:
    removed, options, code = WRONG[name]
    with pytest.raises(ShoalError, match=code):
        do(name, job(tiny("llama"), removed), **options)


def test_layers_of_two_kinds_are_not_merged() -> None:
    with pytest.raises(UsageError, match="U556"):
        do("weighted-average", job(tiny("deepseek_v3"), [2]))
    with pytest.raises(ModelError, match="M316"):
        do("linear-map", job(tiny("gemma3n_text"), [1]))


def test_every_transform_is_tested_here() -> None:
    named = {*STAND_INS, *MERGES, "compensate", "fuse-group", "fold-groups", "parallel-pairs", "streamline"}
    assert set(entries("transforms")) == named
