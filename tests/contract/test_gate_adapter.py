"""What tokens get that a gate does not let in, and gates of runs that repeat a layer."""

from __future__ import annotations

import pytest
import torch

from shoal.deciding.policy_text import make_policy
from shoal.errors import UsageError
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.opened import open_model
from shoal.plan import Plan, parse_plan
from shoal.plan.steps import runs
from shoal.transforms.close_gates import close_gates

from .families import tiny
from .healing import batch_of, deep, gradients, learner_of
from .planted import random_data
from .test_gates import ONE, healed, open_at, text
from .test_lens import _states

ASKED = "routed:layers=2,adapter=4"


def _made(bias: float, *, drawn: bool) -> dict[str, torch.Tensor]:
    """Tensors whose gate has one answer; the adapter's way back is zero unless it is drawn."""
    spec = open_model(tiny("llama")).spec
    draw = torch.Generator().manual_seed(4)
    found = make_policy(ASKED, Plan.identity(spec), spec).start(spec)
    assert set(found) == {"route-2.weight", "route-2.bias", "route-2.down", "route-2.up"}
    assert not found["route-2.up"].any() and found["route-2.down"].any()
    if drawn:
        found["route-2.up"] = torch.randn(found["route-2.up"].shape, generator=draw)
    return found | {"route-2.bias": torch.tensor([bias])}


@pytest.mark.parametrize(("bias", "plan"), [(9.0, "0-3"), (-9.0, "0-1,3")])
def test_an_adapter_that_has_not_learned_changes_no_bit(bias: float, plan: str) -> None:
    model, ids = tiny("llama"), random_data(2, 9).ids
    with torch.no_grad(), running(model, "0-3", _made(bias, drawn=False), policy=ASKED):
        got = model(ids).logits
    with torch.no_grad(), running(model, plan):
        assert torch.equal(got, model(ids).logits)


def test_who_is_not_let_in_goes_through_the_adapter() -> None:
    model, ids = tiny("llama"), random_data(2, 9).ids
    own = _made(-9.0, drawn=True)
    before = _states(model, ids)[1]
    unit = before / before.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    between = before + torch.nn.functional.silu(unit @ own["route-2.down"].T) @ own["route-2.up"].T
    with torch.no_grad():
        position = torch.arange(9)[None]
        table = model.model.rotary_emb(between, position)
        out = model.model.layers[3](between, position_embeddings=table, position_ids=position)
        want = model.lm_head(model.model.norm(out))
        with running(model, "0-3", own, policy=ASKED):
            assert torch.allclose(model(ids).logits, want, atol=1e-4)
        with running(model, "0-3", own | {"route-2.bias": torch.tensor([9.0])}, policy=ASKED):
            assert not torch.allclose(model(ids).logits, want, atol=1e-1)


def test_a_gate_that_mixes_gives_the_adapter_the_rest() -> None:
    """Of the layer's share s the adapter has 1 - s: at s = 1/2 the state is the mean of the two."""
    model, ids, asked = tiny("llama"), random_data(2, 9).ids, "routed:layers=3,adapter=4,scale=true,threshold=0.4"
    spec = open_model(model).spec
    own = make_policy(asked, Plan.identity(spec), spec).start(spec)
    own |= {"route-3.bias": torch.tensor([0.0]), "route-3.up": torch.randn(32, 4, generator=torch.Generator())}
    states = {}
    for name, bias in (("both", 0.0), ("layer", 90.0), ("adapter", -90.0)):
        with torch.no_grad(), running(model, "0-3", own | {"route-3.bias": torch.tensor([bias])}, policy=asked):
            states[name] = model.model(ids, use_cache=False, output_hidden_states=False)[0]
    # behind the last layer stands the norm alone, so means are taken in front of it
    norm = model.model.norm.weight
    ends = _states(model, ids)
    unit = ends[2] / ends[2].square().mean(-1, keepdim=True).add(1e-6).sqrt()
    through = ends[2] + torch.nn.functional.silu(unit @ own["route-3.down"].T) @ own["route-3.up"].T
    for name, state in (("both", (through + ends[3]) / 2), ("layer", ends[3]), ("adapter", through)):
        want = state / state.square().mean(-1, keepdim=True).add(model.config.rms_norm_eps).sqrt() * norm
        assert torch.allclose(states[name], want, atol=1e-4), name


def test_gates_and_adapters_learn() -> None:
    with learner_of(
        deep(), "logit-kd", learn=("gates",), plan="0-5", policy="routed:layers=1-3,adapter=4,scale=true"
    ) as learner:
        found = gradients(learner, batch_of(), 4)
    assert {name.rpartition(".")[2] for name, one in found.items() if one.any()} >= {"weight", "bias", "up"}


def test_runs_that_repeat_a_layer_have_gates_of_their_own() -> None:
    """Closed they are the plan without the loop, open the plan with it, bit for bit."""
    model, spec, ids = tiny("llama"), open_model(tiny("llama")).spec, random_data(2, 9).ids
    plan = parse_plan("0,[1-2]x3,3", Plan.identity(spec))
    policy = make_policy("routed:layers=again", plan, spec)
    gates = [run.gate for run in runs(policy.plan.steps())]
    assert gates == [None, None, None, "route-1-2", "route-2-2", "route-1-3", "route-2-3", None]
    start = policy.start(spec)
    for bias, static in ((9.0, "0,[1-2]x3,3"), (-9.0, "0-3")):
        own = {name: torch.tensor([bias]) if name.endswith("bias") else one for name, one in start.items()}
        with torch.no_grad(), running(model, plan, own, policy="routed:layers=again"):
            got = model(ids).logits
        with torch.no_grad(), running(model, static):
            assert torch.equal(got, model(ids).logits)
    named = make_policy("routed:layers=1", plan, spec)
    assert [run.gate for run in runs(named.plan.steps()) if run.gate] == ["route-1", "route-1-2", "route-1-3"]


def test_gates_with_adapters_are_not_closed_for_good() -> None:
    """A static plan has no place for what they give."""
    model, spec = tiny("llama"), open_model(tiny("llama")).spec
    policy = make_policy("routed:grain=none,adapter=4", Plan.identity(spec), spec)
    with pytest.raises(UsageError, match="U712"):
        close_gates(Job(model, random_data(2, 9), policy.plan, policy.start(spec)))


def test_an_adapter_takes_the_place_of_a_layer_that_it_can_imitate() -> None:
    """flexi-depth on the model of test_gates, whose layer does one thing for half of the tokens and nothing for others:
    its gate closes for all, and what is written hardly changes."""
    found = healed("flexi-depth", 6000, **ONE, adapter=4, strength=0.1)
    held = text(64)
    assert not open_at(found, held).any()
    logits = []
    for plan, weights, policy in (
        (found.plan, found.weights, found.policy),
        ("0-3", None, None),
        ("0-1,3", None, None),
    ):
        with torch.no_grad(), running(found.loaded.model, plan, weights, policy=policy):
            logits.append(found.loaded.model(held.ids).logits.log_softmax(-1))
    with_adapter, without = (
        float(torch.nn.functional.kl_div(one, logits[1], log_target=True, reduction="batchmean") / 16)
        for one in (logits[0], logits[2])
    )
    assert with_adapter < 0.2 * without, (with_adapter, without)
