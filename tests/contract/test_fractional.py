"""The policy `fractional`: skipped, in a few bits, or whole, against models whose weights are rounded by hand."""

from __future__ import annotations

import copy
from functools import cache as remembered
from typing import Any

import pytest
import torch

from shoal.api.heal import heal
from shoal.deciding.fewer_bits import quantised
from shoal.deciding.learning import Learning
from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.live import running
from shoal.models.linear import is_transposed
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan

from .families import DEPTH, FAMILIES, VOCAB, tiny
from .planted import data_of
from .policy_cells import LENGTH, PREFILL, batch_of, stepped, whole
from .shares import only
from .test_policies import FEW, NO_STATIC, attention_of

EXACT = {"atol": 1e-5, "rtol": 1e-5}
BITS = (0, 4, 8, 16)


def spec_of(model: Any) -> Any:
    return open_model(model).spec


def drawn(model: Any, asked: str, seed: int = 11) -> dict[str, torch.Tensor]:
    """Gates that take every choice now and then."""
    spec = spec_of(model)
    draw = torch.Generator().manual_seed(seed)
    started = make_policy(asked, Plan.identity(spec), spec).start(spec)
    return {name: torch.randn(one.shape, generator=draw) for name, one in started.items()}


def rounded(model: Any, bits: dict[int, int]) -> Any:
    """A copy whose matrices in these layers have so many bits, by a formula of its own."""
    made = copy.deepcopy(model)
    for layer, count in bits.items():
        for module in find_stack(made).layer(layer).modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.dim() != 2 or count >= 16:
                continue
            rows = weight.data.T if is_transposed(module) else weight.data
            for row in rows:
                step = row.abs().max() / (2 ** (count - 1) - 1)
                row.copy_(torch.round(row / step) * step)
    return made


def test_the_quantiser_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    for bits in (2, 4, 8):
        for dim in (0, 1):
            codes, scale = quantised(weight, bits, dim)
            assert codes.dtype == torch.int8 and int(codes.abs().max()) == 2 ** (bits - 1) - 1
            assert ((weight - codes * scale).abs() <= scale / 2 * (1 + 1e-5)).all()
            assert torch.equal((codes * scale)[2], torch.zeros(9))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_each_choice_is_the_model_with_these_weights_bit_for_bit(family: str) -> None:
    """All bits are the dense model, none the plan without the layers; the cost is the sum of the bits."""
    model, batch = tiny(family), batch_of(2)
    dense = whole(model, batch)
    for bits in (4, 8):
        right = whole(rounded(model, {1: bits, 2: bits}), batch)
        with running(model, "0-3", policy=f"fractional:layers=1-2,always={bits}") as handle:
            assert torch.equal(whole(model, batch), right)
            counts = handle.trace.counts
        assert not torch.equal(right, dense)
        assert counts.asked == counts.tokens * (2 + 2 * bits / 16)
        assert counts.to_dict()["simulated"] == counts.tokens * 2 * (1 - bits / 16), "nothing is spared"
    with running(model, "0-3", policy="fractional:bits=16"):
        assert torch.equal(whole(model, batch), dense)
    with running(model, "0,3"):
        without = whole(model, batch)
    with running(model, "0-3", policy="fractional:layers=1-2,bits=0"):
        assert torch.equal(whole(model, batch), without)
    assert torch.equal(whole(model, batch), dense)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_sequences_of_a_batch_have_bits_of_their_own(family: str) -> None:
    """And tokens: each matrix answers each as if it were alone with its weights; the bits of all are added."""
    model, spec = tiny(family), spec_of(tiny(family))
    policy = make_policy("fractional:layers=1-2", Plan.identity(spec), spec)
    policy.check_tensors = lambda *_: None  # type: ignore[method-assign]
    chosen = {1: (0, 3), 2: (1, 2)}

    def given(run: Any, forward: Any, hidden: Any) -> torch.Tensor:
        one = torch.nn.functional.one_hot(torch.tensor(chosen[run.layer]), len(BITS)).float()
        return one[: forward.rows, None].expand(-1, forward.tokens, -1)

    policy._scores = given  # type: ignore[attr-defined]
    batch = batch_of(2)
    seen = batch["attention_mask"].bool()
    with running(model, policy.plan, policy=policy) as handle:
        found, depths = whole(model, batch), handle.trace.depths
    for row, plan in ((0, "0,2-3"), (1, "0-3")):
        own = rounded(model, {2: BITS[chosen[2][row]]})
        with running(own, plan):
            right = whole(own, batch)
        torch.testing.assert_close(found[row][seen[row]], right[row][seen[row]], **EXACT)
        assert depths[row][-1] == 2 + sum(BITS[chosen[layer][row]] for layer in (1, 2)) / 16


def test_a_weight_that_changed_is_rounded_anew_and_a_plan_s_own_is_what_is_rounded() -> None:
    model, batch = copy.deepcopy(tiny("llama")), batch_of(1)
    own = {f"x.{name}": tensor + 0.1 for name, tensor in find_stack(model).layer(2).named_parameters()}
    with running(model, "0-1,2:x,3", own, policy="fractional:layers=1-2,always=4"):
        before = whole(model, batch)
        with torch.no_grad():
            find_stack(model).layer(1).mlp.up_proj.weight.mul_(-1)
        after = whole(model, batch)
    assert not torch.equal(before, after)
    with torch.no_grad():
        for name, tensor in find_stack(model).layer(2).named_parameters():
            tensor.copy_(own[f"x.{name}"])
    assert torch.equal(after, whole(rounded(model, {1: 4, 2: 4}), batch))


@pytest.mark.parametrize("grain", ["row", "token"])
def test_gates_as_they_begin_are_the_dense_model_bit_for_bit(grain: str) -> None:
    model, asked = tiny("llama"), f"fractional:grain={grain}"
    dense, spec = whole(model, batch_of(2)), spec_of(model)
    tensors = make_policy(asked, Plan.identity(spec), spec).start(spec)
    with running(model, "0-3", tensors, policy=asked) as handle:
        assert torch.equal(whole(model, batch_of(2)), dense)
        with handle.learning(Learning()):
            assert torch.equal(model(**batch_of(2), use_cache=False).logits.detach(), dense)


WAYS = ("layers=1-3", "layers=1-2,grain=token", "layers=1-2,grain=token,fill=mask", "layers=1-3,grain=none")
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"), dict.fromkeys(WAYS, "P169")
    ),
    "mamba2": dict.fromkeys(WAYS, "P131"),
    "gemma3n_text": dict.fromkeys(WAYS, "P133"),
}
"""What is refused, family by family; a refusal that is not in this table is a regression."""


# stock Jamba continues a text otherwise than in one pass
@pytest.mark.parametrize("family", only((*FEW, "opt"), [family for family in FAMILIES if family != "jamba"]))
def test_one_pass_is_a_prefill_and_steps(family: str) -> None:
    model = tiny(family, "eager" if family == "mamba2" else attention_of(family))
    found, spared = dict[str, str](), 0.0
    for way in WAYS:
        asked = f"fractional:{way}"
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
                spared += DEPTH - counts.asked / counts.tokens
                handle.prompt = None
                got = {"dynamic": stepped(model, batch, "dynamic")}
                assert handle.trace.depths == deep
                if family not in NO_STATIC:
                    got["static"] = stepped(model, batch, "static")
            for cache, logits in got.items():
                error = (logits - right)[seen].abs().max().item()
                if not error <= 1e-4:
                    found[way] = f"{rows} rows, {cache}: differs by {error:.1e}"
    assert found == REFUSED.get(family, {})
    assert spared > 0.5 or len(found) == len(WAYS)


@pytest.mark.parametrize("relax", ["straight-through", "gumbel"])
@pytest.mark.parametrize("grain", ["row", "token", "none"])
def test_a_gradient_reaches_every_choice(grain: str, relax: str) -> None:
    """Of skipped layers too; and what is noted for the density is the share of the bits."""
    model, asked = tiny("llama"), f"fractional:layers=1-2,grain={grain},relax={relax}"
    for begin in ("drawn", "closed"):
        tensors = {name: one.requires_grad_() for name, one in drawn(model, asked).items()}
        if begin == "closed":
            tensors["bits-1.bias"] = torch.tensor([3.0, 0, 0, 0]).requires_grad_()
        with running(model, "0-3", tensors, policy=asked) as handle, handle.learning(Learning(seed=3)) as now:
            loss = model(**batch_of(2), use_cache=False).logits.square().mean()
            noted = torch.stack(now.ledger["gates"])
            (loss + noted.mean()).backward()
        assert noted.shape == (2, 2, LENGTH)
        assert {round(float(one), 6) for one in noted.detach().flatten()} <= {0, 0.25, 0.5, 1}
        for name, one in tensors.items():
            assert one.grad is not None and (one.grad.abs() > 0).any(), (begin, name)
    model.zero_grad()


HALF = VOCAB // 2


@remembered
def graded() -> Any:
    """A model whose layer 2 is needed by all, by the lower half of the vocabulary in four bits and by the upper half in
    more. The first number of a state says which half its token is of, nobody changes it, and a token is followed by one
    of its own half. The neurons that the lower half opens have weights on the grid of four bits; what those of the
    upper half write is less than half a step of it, so that nothing of it is left there."""
    model: Any = copy.deepcopy(tiny("llama"))
    model.tie_weights = lambda *_, **__: None
    draw = torch.Generator().manual_seed(0)
    mark = torch.where(torch.arange(VOCAB) < HALF, -1.0, 1.0)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 4 * mark
        model.lm_head.weight[:, 0] = 6 * mark
        for number, layer in enumerate(find_stack(model).layers):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(name).weight.mul_(0.1)
                layer.get_submodule(name).weight[0] = 0.0
            if number == 2:
                gate, up, down = (getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
                middle = len(gate) // 2
                gate.zero_()
                gate[:middle, 0], gate[middle:, 0] = -20.0, 20.0
                layer.self_attn.o_proj.weight.zero_()
                up.copy_(on_grid(up.shape, draw) * 0.002)
                down[:, :middle] = on_grid(down[:, :middle].shape, draw) * 0.2
                down[:, middle:] = (torch.rand(down[:, middle:].shape, generator=draw) - 0.5) * 0.9 * 0.2
                down[0] = 0.0
    return model


def on_grid(shape: Any, draw: torch.Generator) -> torch.Tensor:
    """Whole numbers from -7 to 7, the largest in every row."""
    found = torch.randint(-7, 8, tuple(shape), generator=draw).float()
    found[:, 0] = 7.0
    return found


def foreseen(count: int, seed: int) -> torch.Tensor:
    """What the model writes, each sequence in one half."""
    begun = torch.randint(3, VOCAB, (count, 1), generator=torch.Generator().manual_seed(seed))
    written: torch.Tensor = graded().generate(begun, max_new_tokens=15, do_sample=False)
    assert ((written >= HALF) == (begun >= HALF)).all()
    return written


def test_planted_each_sequence_gets_the_bits_that_it_needs() -> None:
    """By the recipe: four bits where they are as good as all, and all where they are not; nobody skips."""
    loaded, data, held = Loaded(graded(), None, "planted"), foreseen(400, 9), foreseen(64, 10)
    with torch.no_grad():
        for bits, same in ((0, False), (4, True), (16, True)):
            logits = loaded.model(held).logits
            with running(loaded.model, "0-3", policy=f"fractional:layers=2,always={bits}"):
                found = loaded.model(held).logits
            near = (found - logits).abs().amax((1, 2)) < 1e-3
            assert bool(near[held[:, 0] < HALF].all()) is same
            assert bool(near[held[:, 0] >= HALF].all()) is (bits == 16)
    asked = {"layers": "2", "bits": "0+4+16", "target": 0.90625, "rate": 0.05, "recover": "gates"}
    made = heal(
        loaded, Plan.identity(loaded.opened.spec), "fractional", settings=asked, tokens=12_000, batch=4, held=32,
        data=data_of(data), watch=data_of(data[:4]),
    )  # fmt: skip
    with torch.no_grad(), running(loaded.model, made.plan, made.weights, policy=made.policy) as handle:
        loaded.model(held)
        depths = torch.tensor([row[-1] for row in handle.trace.depths])
    right = torch.where(held[:, 0] < HALF, 3.25, 4.0)
    assert (depths == right).float().mean() > 0.95
    assert abs(float(depths.mean()) / 4 - float(right.mean()) / 4) < 0.02
