"""The policy `widths`: how many neurons each token or sequence uses, against the model that has no others."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.api.heal import heal
from shoal.api.heal_publish import publish_healed
from shoal.data import Data
from shoal.deciding.learning import Learning
from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.executing.weights import load_weights
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, load_plan, parse_plan
from shoal.transforms.narrow import narrow

from .families import FAMILIES, VOCAB, tiny
from .healing import batch_of as training_batch
from .healing import deep, gradients, learner_of
from .live_models import PADDED, own
from .planted import data_of, random_data
from .policy_cells import LENGTH, PREFILL, batch_of, stepped, whole
from .shares import every, only
from .test_neurons import DENSE
from .test_policies import FEW, NO_STATIC, attention_of
from .test_training_rows import checkpointing, learning, passed, same

EXACT = {"atol": 1e-5, "rtol": 1e-5}
SHARES = (0.25, 0.5, 0.75, 1.0)


def spec_of(model: Any) -> Any:
    return open_model(model).spec


def gated(model: Any) -> list[int]:
    """Two layers with neurons, the last but one where it has any."""
    return [n for n, layer in enumerate(spec_of(model).stack().layers) if layer.neurons is not None and n < 3][-2:]


def names(layers: list[int]) -> str:
    return ",".join(map(str, layers))


def drawn(model: Any, asked: str, seed: int = 11, plan: str = "0-3") -> dict[str, torch.Tensor]:
    """Gates that take every choice now and then."""
    spec = spec_of(model)
    draw = torch.Generator().manual_seed(seed)
    started = make_policy(asked, parse_plan(plan, Plan.identity(spec)), spec).start(spec)
    return {name: torch.randn(one.shape, generator=draw) for name, one in started.items()}


def narrowed(model: Any, shares: dict[int, float], plan: str = "0-3", weights: Any = None) -> torch.Tensor:
    """Logits of the plan whose mlps have these shares of their neurons, and no others."""
    made = Job(model, random_data(2, 8), parse_plan(plan, Plan.identity(spec_of(model))), weights or {})
    for layer, keep in shares.items():
        found = narrow(made, keep=keep, by="order", layers=str(layer))
        made = Job(model, made.data, found.plan, found.weights)
    with running(model, made.plan, made.weights):
        return whole(model, batch_of(2))


@pytest.mark.parametrize("family", every(3, DENSE))
@pytest.mark.parametrize("share", SHARES)
def test_a_width_for_all_is_the_model_without_the_other_neurons(family: str, share: float) -> None:
    """Bit for bit: the matrices are shorter for the call, and so counted."""
    model = tiny(family, "eager")
    layers = gated(model)
    right = narrowed(model, dict.fromkeys(layers, share))
    with running(model, "0-3", policy=f"widths:layers={names(layers)},always={share}") as handle:
        assert torch.equal(whole(model, batch_of(2)), right)
        counts = handle.trace.counts
    assert counts.asked == counts.tokens * (4 - len(layers) / 2 * (1 - share))
    assert counts.to_dict()["simulated"] == 0
    assert torch.equal(narrowed(model, {}), whole(model, batch_of(2)))


def of_tokens(model: Any, choices: torch.Tensor, shares: str) -> tuple[torch.Tensor, Any]:
    """Logits where the tokens take these choices [rows, LENGTH] in the gated layers, with what the trace counted."""
    spec = spec_of(model)
    asked = f"widths:layers={names(gated(model))},grain=token,shares={shares}"
    policy = make_policy(asked, Plan.identity(spec), spec)
    scores = torch.nn.functional.one_hot(choices, len(shares.split("+"))).float()

    def given(run: Any, forward: Any, hidden: Any) -> torch.Tensor:
        return scores[: forward.rows, forward.past : forward.past + forward.tokens]

    policy._scores = given  # type: ignore[attr-defined]
    policy.check_tensors = lambda *_: None  # type: ignore[method-assign]
    with running(model, policy.plan, policy=policy) as handle:
        logits = whole(model, batch_of(2))
    return logits, handle.trace


@pytest.mark.parametrize("family", every(3, DENSE))
def test_sequences_of_a_batch_have_widths_of_their_own(family: str) -> None:
    """Each is what it would be alone, in a model that has no other neurons."""
    model = tiny(family, "eager")
    seen, layers = batch_of(2)["attention_mask"].bool(), gated(model)
    for one, other in ((0, 2), (1, 3), (3, 0)):
        choices = torch.tensor([[one], [other]]).expand(2, LENGTH)
        found, trace = of_tokens(model, choices, "0.25+0.5+0.75+1")
        for row, choice in enumerate((one, other)):
            right = narrowed(model, dict.fromkeys(layers, SHARES[choice]))
            torch.testing.assert_close(found[row][seen[row]], right[row][seen[row]], **EXACT)
            assert trace.depths[row][-1] == 4 - len(layers) / 2 * (1 - SHARES[choice])
        left = len(layers) / 2 * (2 - SHARES[one] - SHARES[other])
        assert trace.counts.to_dict()["simulated"] == pytest.approx(LENGTH * left)


def test_a_token_without_a_width_is_without_the_mlp() -> None:
    model = tiny("llama")
    choices = torch.randint(0, 2, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    found, trace = of_tokens(model, choices, "0+1")

    def silenced(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return out * choices[..., None]

    handles = [find_stack(model).layer(n).mlp.register_forward_hook(silenced) for n in gated(model)]
    right = whole(model, batch_of(2))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, right, **EXACT)
    assert trace.counts.asked == 3 * 2 * LENGTH + int(choices.sum())


@pytest.mark.parametrize("grain", ["row", "token"])
def test_gates_as_they_begin_are_the_dense_model_bit_for_bit(grain: str) -> None:
    model = tiny("llama")
    dense = whole(model, batch_of(2))
    for more in ("", ",scale=true"):
        asked, spec = f"widths:grain={grain}{more}", spec_of(model)
        tensors = make_policy(asked, Plan.identity(spec), spec).start(spec)
        with running(model, "0-3", tensors, policy=asked) as handle:
            assert torch.equal(whole(model, batch_of(2)), dense)
            with handle.learning(Learning()):
                found = model(**batch_of(2), use_cache=False).logits
            assert torch.equal(found.detach(), dense)


WAYS = ("layers=1-3", "layers=1-2,grain=token", "layers=1-2,grain=token,scale=true", "layers=1-2,scale=true",
        "layers=1-3,grain=none", "layers=1-2,shares=0.5+1,grain=token")  # fmt: skip
REFUSED = dict.fromkeys(
    (
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "gpt_oss",
        "mamba2",
        "deepseek_v3",
        "gemma3n_text",
        "llama4_text",
        "nemotron_h",
    ),
    dict.fromkeys(WAYS, "P168"),
)
"""What is refused, family by family; a refusal that is not in this table is a regression."""


# stock Jamba continues a text otherwise than in one pass
@pytest.mark.parametrize("family", only((*FEW, "opt"), [family for family in FAMILIES if family != "jamba"]))
def test_one_pass_is_a_prefill_and_steps(family: str) -> None:
    model = tiny(family, "eager" if family == "mamba2" else attention_of(family))
    found, spared = dict[str, str](), 0.0
    for way in WAYS:
        asked = f"widths:{way}"
        try:
            tensors = drawn(model, asked)
            with running(model, "0-3", tensors, policy=asked):
                pass
        except ShoalError as error:
            found[way] = str(error.code)
            continue
        for rows in (1, 2):
            batch = batch_of(rows)
            seen = batch["attention_mask"].bool()
            with running(model, "0-3", tensors, policy=asked) as handle:
                handle.prompt = PREFILL
                right, deep = whole(model, batch), handle.trace.depths
                counts = handle.trace.counts
                spared += 4 - counts.asked / counts.tokens
                handle.prompt = None
                got = {"dynamic": stepped(model, batch, "dynamic")}
                assert handle.trace.depths == deep
                if family not in NO_STATIC:
                    got["static"] = stepped(model, batch, "static")
            for kind, logits in got.items():
                error = (logits - right)[seen].abs().max().item()
                if not error <= 1e-4:
                    found[way] = f"{rows} rows, {kind}: differs by {error:.1e}"
    assert found == REFUSED.get(family, {})
    assert spared > 0.5 or len(found) == len(WAYS)


def test_widths_of_sorted_neurons_are_the_narrower_plans_of_the_sorted_one() -> None:
    """A plan with tensors of its own is what is cut, and a plan that is narrow already has shares of what it has."""
    model = tiny("llama")
    spec, data = spec_of(model), random_data(4, 24)
    for keep in (1.0, 0.5):
        made = narrow(Job(model, data, Plan.identity(spec), {}), keep=keep, by="output")
        shorter = narrow(Job(model, data, made.plan, made.weights), keep=0.5, by="order") if keep == 1 else narrow(
            Job(model, data, Plan.identity(spec), {}), keep=0.25, by="output")  # fmt: skip
        with running(model, shorter.plan, shorter.weights):
            right = whole(model, batch_of(2))
        with running(model, made.plan, made.weights, policy="widths:layers=0-3,always=0.5"):
            assert torch.equal(whole(model, batch_of(2)), right)
        with running(model, made.plan, made.weights, policy="widths:layers=0-3,always=1"):
            dense = whole(model, batch_of(2))
        with running(model, made.plan, made.weights):
            assert torch.equal(whole(model, batch_of(2)), dense)


def test_kept_neurons_are_rescaled() -> None:
    """LC-Net's: each group of neurons by a factor of the sequence, as down projections that are scaled by hand."""
    model = copy.deepcopy(tiny("llama"))
    asked = "widths:layers=1,shares=0.5+1,scale=true,grain=none"
    spec = spec_of(model)
    tensors = {name: one + 0.0 for name, one in make_policy(asked, Plan.identity(spec), spec).start(spec).items()}
    assert set(tensors) == {"width-1.bias", "width-1.scale", "width-1.scale_bias"}
    tensors["width-1.scale_bias"] = torch.tensor([1.0, -2.0])
    with running(model, "0-3", tensors, policy=asked):
        found = whole(model, batch_of(2))
    tensors["width-1.bias"] = torch.tensor([1.0, 0.0])
    with running(model, "0-3", tensors, policy=asked):
        half = whole(model, batch_of(2))
    down = find_stack(model).layer(1).mlp.down_proj.weight
    count = down.shape[1]
    factor = 2 * torch.tensor([1.0, -2.0]).sigmoid()
    with torch.no_grad():
        down *= factor.repeat_interleave(count // 2)
    torch.testing.assert_close(found, whole(model, batch_of(2)), **EXACT)
    with torch.no_grad():
        down[:, count // 2 :] = 0
    torch.testing.assert_close(half, whole(model, batch_of(2)), **EXACT)


@pytest.mark.parametrize("relax", ["straight-through", "gumbel"])
@pytest.mark.parametrize("grain", ["row", "token", "none"])
def test_a_gradient_reaches_every_choice(grain: str, relax: str) -> None:
    """Of skipped mlps too; and what is noted for the density is the share of the neurons."""
    model = tiny("llama")
    asked = f"widths:layers=1-2,grain={grain},relax={relax}"
    for begin in ("drawn", "closed"):
        tensors = {name: one.requires_grad_() for name, one in drawn(model, asked).items()}
        if begin == "closed":
            tensors["width-1.bias"] = torch.tensor([50.0, 0, 0, 0, 0]).requires_grad_()
            tensors["width-1.bias"].data[:1] = 3.0
        with running(model, "0-3", tensors, policy=asked) as handle, handle.learning(Learning(seed=3)) as now:
            loss = model(**batch_of(2), use_cache=False).logits.square().mean()
            noted = torch.stack(now.ledger["gates"])
            (loss + noted.mean()).backward()
        assert noted.shape == (2, 2, LENGTH)
        assert {round(float(one), 6) for one in noted.detach().flatten()} <= {0, 0.25, 0.5, 0.75, 1}
        for name, one in tensors.items():
            assert one.grad is not None and (one.grad.abs() > 0).any(), (begin, name)
        assert (tensors["width-1.bias"].grad.abs() > 0).all()
    model.zero_grad()


@pytest.mark.parametrize(
    "policy", ["widths:layers=1-2", "widths:layers=1-2,grain=token,scale=true", "fractional:layers=1-2"]
)
def test_choices_learn_the_same_under_gradient_checkpointing(policy: str) -> None:
    found = []
    for reentrant in (None, False):
        model = learning(own("llama"))
        checkpointing(model, reentrant)
        tensors = {name: torch.nn.Parameter(one) for name, one in drawn(model, policy).items()}
        with running(model, "0-3", tensors, policy=policy) as handle, handle.learning(Learning(seed=11)):
            found.append(passed(model, tensors, **PADDED))
    assert set(tensors) <= found[0][1].keys()
    same(found[0], found[1])


@pytest.mark.parametrize("policy", ["widths:layers=1", "fractional:layers=1", "routed:layers=1,grain=row"])
def test_a_layer_that_runs_twice_is_decided_once_for_each_sequence(policy: str) -> None:
    """What is cached is what one pass computes, though the second run sees another state than the first."""
    model, batch = tiny("llama"), batch_of(2)
    seen, differ = batch["attention_mask"].bool(), 0
    for seed in range(4):
        tensors = drawn(model, policy, seed, "0,1,1,2-3")
        with running(model, "0,1,1,2-3", tensors, policy=policy) as handle:
            handle.prompt = PREFILL
            right, depths = whole(model, batch), handle.trace.depths
            handle.prompt = None
            found = stepped(model, batch, "dynamic")
            assert handle.trace.depths == depths
        torch.testing.assert_close(found[seen], right[seen], **EXACT)
        differ += depths[0][-1] < 5
    assert differ, "some gate of these leaves something out"


@pytest.mark.parametrize("policy", ["widths:grain=none", "fractional:grain=none"])
def test_the_density_is_the_share_of_neurons_or_bits(policy: str) -> None:
    """Of all layers: by hand for choices that read nothing, and towards less where it is above its target."""
    shares = [0.0, 0.25, 0.5, 1.0, 1.0]
    places = [[0, 1, 2, 4, 4], [0, 1, 2, 3, 3]][policy.startswith("fractional")]
    count = 5 if policy.startswith("widths") else 4
    gate = "width" if count == 5 else "bits"
    chosen = {f"{gate}-{n}.bias": 3.0 * torch.eye(count)[place] for n, place in enumerate(places, 1)}
    size = 0.5 if count == 5 else 1.0
    right = (6 - size * sum(1 - one for one in shares)) / 6
    with learner_of(
        deep(), "density:by=linear", learn=["gates"], plan="0-5", weights=chosen, policy=policy
    ) as learner:  # fmt: skip
        batch = training_batch()
        counted = batch["labels"].ne(-100).sum()
        with torch.no_grad():
            loss = learner(**batch, num_items_in_batch=counted)["loss"]
        assert float(loss) == pytest.approx(right, abs=1e-6)
        found = gradients(learner, batch, 4)
        for name, place in zip(chosen, places, strict=True):
            gradient = next(one for key, one in found.items() if key.endswith(name))
            assert gradient[place] > 0 or place < count - 1, "all of it is made less likely"
            assert gradient[0] < 0, "and none of it more likely"


HALF = VOCAB // 2


@cache
def halves_useful() -> Any:
    """A model in which the second half of the neurons of layer 2 does something for tokens of the upper half of the
    vocabulary alone; the first half does for all."""
    model: Any = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        embedded = model.get_input_embeddings().weight
        embedded[:, 0] = torch.where(torch.arange(VOCAB) < HALF, -4.0, 4.0)
        embedded[:, 1] = 4.0
        for number, layer in enumerate(find_stack(model).layers):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(name).weight.mul_(0.1)
                layer.get_submodule(name).weight[:2] = 0.0  # nobody changes the marks
            if number == 2:
                gate, down = layer.mlp.gate_proj.weight, layer.mlp.down_proj.weight
                gate.zero_()
                gate[: len(gate) // 2, 1], gate[len(gate) // 2 :, 0] = 20.0, 20.0
                down.copy_(0.3 * torch.randn(down.shape, generator=torch.Generator().manual_seed(0)))
                down[:2] = 0.0
    return model


def of_one_half(count: int, seed: int) -> Data:
    """Sequences, each of tokens of one half."""
    draw = torch.Generator().manual_seed(seed)
    upper = torch.randint(0, 2, (count, 1), generator=draw)
    return data_of(torch.randint(3, HALF, (count, 16), generator=draw) + HALF * upper)


def test_sequences_that_need_half_of_an_mlp_use_half_and_are_read_again(tmp_path: Path) -> None:
    """The recipe finds whose second half is useless; the folder, read again, decides the same, bit for bit."""
    loaded = Loaded(halves_useful(), None, "planted")
    asked = {"layers": "2", "shares": "0.5+1", "target": 0.96875, "rate": 0.05, "recover": "gates"}
    found = heal(
        loaded, Plan.identity(loaded.opened.spec), "ebert", settings=asked, tokens=12_000, batch=4, held=32,
        data=of_one_half(400, 7), watch=of_one_half(4, 8),
    )  # fmt: skip
    held = of_one_half(32, 9)
    with running(loaded.model, found.plan, found.weights, policy=found.policy) as handle, torch.no_grad():
        logits = loaded.model(held.ids).logits
        depths = [row[-1] for row in handle.trace.depths]
    assert depths == [4.0 if int(row[0]) >= HALF else 3.75 for row in held.ids]
    place = publish_healed(found, tmp_path / "widths", anyway=True)
    assert isinstance(place, Path)
    policy = str(place / "shoal" / "policy.json")
    with running(loaded.model, load_plan(place), load_weights(place), policy=policy), torch.no_grad():
        assert torch.equal(loaded.model(held.ids).logits, logits)
