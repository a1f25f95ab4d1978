"""Each measure against its formula said once more, naively, over models that are rebuilt or run by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shoal.errors import UsageError
from shoal.evaluation.scoring import logits_of
from shoal.live import running
from shoal.measures.block_influence import block_influence
from shoal.measures.cka import cka
from shoal.measures.kl_removed import kl_removed
from shoal.measures.lamp import lamp
from shoal.measures.linearity import linearity
from shoal.measures.macro_influence import macro_influence
from shoal.measures.magnitude import magnitude
from shoal.measures.residual_ratio import residual_ratio
from shoal.measures.spectrum import spectrum
from shoal.measures.taylor import taylor
from shoal.measures.top1_removed import top1_removed
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, drop
from shoal.writing.surgery import rewrite

from .families import DEPTH, tiny
from .planted import data_of, random_data
from .test_measures import mean_and_error, ragged, states_of

DATA = random_data(4, 12)


def cosine_apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 1 - torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_residual_ratio_is_the_naive_one(family: str) -> None:
    model, data = tiny(family), ragged()
    scores, states = residual_ratio(model, data, batch=3), states_of(model, data)
    medians = residual_ratio(model, data, batch=3, by="median")
    for layer in range(DEPTH):
        ratios = [(y - x).norm(dim=-1) / y.norm(dim=-1) for x, y in (sequence[layer] for sequence in states)]
        value, error = mean_and_error(ratios)
        assert scores.values[layer] == pytest.approx(value, rel=1e-5)
        assert scores.errors[layer] == pytest.approx(error, rel=1e-4)
        assert scores.detail["median"][layer] == pytest.approx(np.median(torch.cat(ratios)), rel=1e-5)
        assert medians.values[layer] == scores.detail["median"][layer] and medians.errors[layer] is None


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "granite"])
@torch.no_grad()
def test_parts_are_judged_by_what_they_add(family: str) -> None:
    """Gemma 2 puts norms behind its parts, Granite multiplies them, NeoX runs them side by side."""
    model = tiny(family, "eager")
    stack = find_stack(model)
    attention = block_influence(model, DATA, part="attention")
    mlp = block_influence(model, DATA, part="mlp")
    calls: dict[int, Any] = {}
    handles = [
        stack.layer(i).register_forward_hook(
            lambda _, args, kwargs, out, i=i: calls.__setitem__(i, (args, kwargs, out)), with_kwargs=True
        )
        for i in range(DEPTH)
    ]
    model(input_ids=DATA.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for layer, (args, kwargs, whole) in calls.items():
        alone = copy.deepcopy(stack.layer(layer))
        for parameter in alone.mlp.parameters():
            parameter.zero_()
        x, after = args[0] if args else kwargs["hidden_states"], alone(*args, **kwargs)
        after, out = (s[0] if isinstance(s, tuple) else s for s in (after, whole))
        assert attention.values[layer] == pytest.approx(cosine_apart(x, after).mean().item(), rel=1e-4)
        assert mlp.values[layer] == pytest.approx(cosine_apart(after, out).mean().item(), rel=1e-4)


def test_a_part_that_is_silent_scores_nothing_and_leaves_the_other_alone() -> None:
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    for measure in (block_influence, residual_ratio, cka, linearity):
        assert measure(model, DATA, part="mlp").values[1] == 0
        assert measure(model, DATA, part="attention").values[1] > 0


def test_layers_without_parts_are_named_and_a_model_without_any_is_refused() -> None:
    scores = block_influence(tiny("llama"), DATA, part="mlp")
    assert all(map(math.isfinite, scores.values)) and len(scores.notes) == 1
    for measure in (block_influence, magnitude):
        with pytest.raises(UsageError, match="measure with part=layer") as raised:
            measure(tiny("mamba2", "eager"), DATA, part="attention")
        assert raised.value.code == "U531"
    with running(tiny("llama"), "0-2"), pytest.raises(UsageError, match="attention alone needs the whole model"):
        block_influence(tiny("llama"), DATA, part="attention")


@torch.no_grad()
def test_kl_top1_and_macro_influence_are_the_naive_ones() -> None:
    model = tiny("qwen3")
    divergence, changed = kl_removed(model, DATA, batch=3), top1_removed(model, DATA, batch=2)
    turned = macro_influence(model, DATA, batch=3)
    dense, state = logits_of(model, DATA.ids, None), model.model(DATA.ids).last_hidden_state
    for layer in range(DEPTH):
        shorter = rewrite(model, drop(Plan.identity(inspect(model)), [layer]))
        other = logits_of(shorter, DATA.ids, None)
        p, q = (side.double().log_softmax(-1) for side in (dense, other))
        kl = (p.exp() * (p - q)).sum(-1)[:, :-1]
        assert divergence.values[layer] == pytest.approx(kl.mean().item(), rel=1e-4)
        assert divergence.errors[layer] == pytest.approx((kl.mean(-1).std() / 2).item(), rel=1e-4)
        assert changed.detail["kl"][layer] == pytest.approx(kl.mean().item(), rel=1e-4)
        differs = (dense.argmax(-1) != other.argmax(-1))[:, :-1].double()
        assert changed.values[layer] == pytest.approx(differs.mean().item())
        apart = cosine_apart(state, shorter.model(DATA.ids).last_hidden_state)[:, :-1]
        assert turned.values[layer] == pytest.approx(apart.mean().item(), rel=1e-4)


def test_taylor_is_gradient_times_weight_over_the_text_or_by_sequence() -> None:
    model, data = copy.deepcopy(tiny("llama")), random_data(3, 9)
    kept = model.model.layers[0].mlp.up_proj.weight
    kept.grad = torch.ones_like(kept)
    model.model.layers[2].requires_grad_(False)
    whole, single = taylor(model, data, at_once=3, batch=2), taylor(model, data, over="sequence")
    assert torch.equal(kept.grad, torch.ones_like(kept)) and model.model.layers[1].mlp.up_proj.weight.grad is None
    assert not any(p.requires_grad for p in model.model.layers[2].parameters()) and kept.requires_grad
    naive = copy.deepcopy(tiny("llama"))
    weights = [[p for p in layer.parameters() if p.dim() > 1] for layer in naive.model.layers]

    def gradients(ids: torch.Tensor) -> list[list[torch.Tensor]]:
        logits = naive(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return [list(torch.autograd.grad(loss, own, retain_graph=True)) for own in weights]

    def sizes(found: list[list[torch.Tensor]]) -> list[float]:
        return [
            sum((g * w).abs().sum().item() for g, w in zip(*own, strict=True))
            for own in zip(found, weights, strict=True)
        ]

    rows = np.array([sizes(gradients(row[None])) for row in data.ids])
    assert whole.values == pytest.approx(sizes(gradients(data.ids)), rel=1e-4) and whole.errors == (None,) * DEPTH
    assert single.values == pytest.approx(rows.mean(0), rel=1e-4)
    assert single.errors == pytest.approx(rows.std(0, ddof=1) / 3**0.5, rel=1e-4)
    mlp = taylor(model, data, part="mlp")
    assert all(0 < a < b for a, b in zip(mlp.values, whole.values, strict=True))


def test_magnitude_sums_up_matrices_only() -> None:
    model = tiny("mixtral")
    first, second, mlp = magnitude(model), magnitude(model, power=2), magnitude(model, part="mlp")
    for layer, own in enumerate(model.model.layers):
        matrices = [p.detach().double() for p in own.parameters() if p.dim() > 1]
        assert first.values[layer] == pytest.approx(sum(m.abs().sum().item() for m in matrices), rel=1e-6)
        assert second.values[layer] == pytest.approx(sum(m.square().sum().item() for m in matrices), rel=1e-6)
        assert 0 < mlp.values[layer] < first.values[layer]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_lamp_keeps_the_asked_share_by_the_papers_scores(sparsity: float) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[1].self_attn.q_proj.weight.data *= 4  # its own scale is no matter, and 4 leaves every digit
    scores = lamp(model, sparsity=sparsity)
    assert scores.values == lamp(tiny("llama"), sparsity=sparsity).values
    found: list[list[torch.Tensor]] = []
    for layer in model.model.layers:
        found.append([])
        for p in (p for p in layer.parameters() if p.dim() > 1):
            squares = p.detach().flatten().double().square().sort().values
            found[-1].append((squares / squares.flip(0).cumsum(0).flip(0)).float())  # the order is that of float32
            assert found[-1][-1].max() == 1
    flat = [torch.cat(own) for own in found]
    everything = torch.cat(flat).sort().values
    threshold = everything[round(len(everything) * sparsity)]
    naive = [(own >= threshold).double().mean().item() for own in flat]
    assert scores.values == pytest.approx(naive, rel=1e-12)
    total = sum(len(own) for own in flat)
    kept = sum(v * len(own) for v, own in zip(scores.values, flat, strict=True))
    assert round(kept) == round(total * (1 - sparsity))
    with pytest.raises(UsageError, match="not between 0 and 1"):
        lamp(model, sparsity=1.0)


@pytest.mark.parametrize("alpha", [2.0, 3.0, 5.0])
def test_spectrum_recovers_a_known_power_law(alpha: float) -> None:
    model = copy.deepcopy(tiny("llama"))
    wide = nn.Linear(400, 400, bias=False)
    shares = (torch.arange(400) + 0.5) / 400
    eigenvalues = shares.double() ** (-1 / (alpha - 1))  # quantiles of a tail from 1 on
    left, right = (torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64)).Q for _ in range(2))
    wide.weight.data = (left @ eigenvalues.sqrt().diag() @ right).float()
    for layer in model.model.layers:
        layer.mlp.up_proj = wide
    scores = spectrum(model)
    found = scores.detail["alpha"][0][
        [n for n, p in model.model.layers[0].named_parameters() if p.dim() > 1].index("mlp.up_proj.weight")
    ]
    assert found == pytest.approx(alpha, rel=0.05)
    assert "states an error in its implementation" in scores.notes[0]


def test_weights_that_are_not_here_are_refused() -> None:
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[1].mlp.register_buffer("packed", torch.zeros(100, 100, dtype=torch.int8))
    with pytest.raises(UsageError, match=r"mlp\.packed of layer 1 is quantised") as raised:
        magnitude(model)
    assert raised.value.code == "U534"
    away = copy.deepcopy(tiny("llama"))
    away.model.layers[2].mlp.to("meta")
    with pytest.raises(UsageError, match="layer 2 is offloaded"):
        spectrum(away)


def test_linearity_is_least_squares_judged_on_held_out_sequences() -> None:
    model, data = tiny("llama"), random_data(6, 60)
    scores, states = linearity(model, data, batch=2, ridge=0), states_of(model, data)
    small = linearity(model, data, memory=1e-9, ridge=0)
    assert small.values == pytest.approx(scores.values, rel=1e-9), "one layer at a time"
    for layer in range(DEPTH):
        for skip, value in ((1, scores.values[layer]), (0, scores.detail["with_first"][layer])):
            fit, held = (
                [torch.cat([states[i][layer][side][skip:] for i in rows]).numpy() for side in (0, 1)]
                for rows in ((0, 2, 3, 5), (1, 4))
            )
            ones = [np.pad(x, ((0, 0), (0, 1)), constant_values=1) for x in (fit[0], held[0])]
            solved = np.linalg.lstsq(ones[0], fit[1], rcond=None)[0]
            error = ((held[1] - ones[1] @ solved) ** 2).sum() / ((held[1] - held[1].mean(0)) ** 2).sum()
            assert value == pytest.approx(error, rel=1e-5)
    assert scores.tokens == 2 * 59 and scores.errors[0] > 0
    assert "hardly determine" in linearity(model, random_data(2, 12)).notes[1]
    with pytest.raises(UsageError, match="2 or more sequences") as raised:
        linearity(model, random_data(1, 12))
    assert raised.value.code == "U536"


def test_cka_is_the_unbiased_one_and_does_not_see_rotations() -> None:
    model, data = copy.deepcopy(tiny("llama")), random_data(3, 14)
    scores, states = cka(model, data, pairs="all", batch=2), states_of(model, data)

    def inner(k: np.ndarray, m: np.ndarray) -> float:
        n, one = len(k), np.ones(len(k))
        k, m = (g - np.diag(np.diag(g)) for g in (k, m))
        middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ m) + middle - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    for layer in range(DEPTH):
        pairs = [[s.numpy()[1:] for s in sequence[layer]] for sequence in states]
        grams = [(x @ x.T, y @ y.T) for x, y in pairs]
        shared, left, right = (sum(inner(a[i], a[j]) for a in grams) for i, j in ((0, 1), (0, 0), (1, 1)))
        assert 1 - scores.values[layer] == pytest.approx(shared / math.sqrt(left * right), rel=1e-6)
        assert scores.detail["matrix"][layer][layer + 1] == pytest.approx(1 - scores.values[layer], rel=1e-6)
        assert 0 < scores.errors[layer] < 1
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q
    model.model.layers[2].register_forward_hook(lambda _, args, out: args[0] @ turn)
    assert cka(model, data).values[2] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UsageError, match="needs 4 tokens in every sequence, and one has 3") as raised:
        cka(model, random_data(2, 4))
    assert raised.value.code == "U536"


def test_samples_add_up_to_the_values() -> None:
    model = tiny("llama")
    padded = data_of(DATA.ids, torch.ones_like(DATA.ids))
    for measure in (block_influence, residual_ratio, kl_removed, macro_influence):
        scores = measure(model, padded)
        for value, own in zip(scores.values, scores.samples, strict=True):
            assert math.fsum(own) / math.fsum(scores.counts) == pytest.approx(value, rel=1e-9)
