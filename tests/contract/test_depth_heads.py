"""Heads that read several depths: sums of states in front of norm and head, and weights of each depth's scores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import shoal.auto  # noqa: F401
from shoal.deciding.policy import Policy
from shoal.errors import PlanError, ShoalError, WriteError
from shoal.executing.bind import bind
from shoal.fitting.result import Job
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.models.stacks import find_stack
from shoal.plan import Plan, check, cost, parse_plan, require, shapes_of
from shoal.transforms.depth_head import depth_head
from shoal.writing.planned_folder import write_planned
from shoal.writing.surgery import rewrite

from .families import FAMILIES, VOCAB, tiny
from .healing import batch_of, gradients, learner_of
from .kinds import equal, inputs_of, kind, plan_of, returned
from .planted import random_data
from .references import CLOSE
from .shares import every

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
HIDDEN = 32
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PLAIN = tuple(
    name
    for name in FAMILIES
    if name not in ("gemma2", "granite", "cohere2", "mamba2", "nemotron_h", "gemma3n_text", "llama4_text", "jamba")
)
"""Families that make logits by a norm and a head alone, and hand on one hidden state."""


def made_of(family: str) -> Any:
    return tiny(family, "eager" if family == "gpt_neo" else "sdpa")


def drawn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


@torch.no_grad()
def logits(model: Any, **more: Any) -> torch.Tensor:
    return model(**({"input_ids": IDS} | more)).logits


@torch.no_grad()
def states(model: Any) -> list[torch.Tensor]:
    """Behind each layer, by hooks on the model alone; first what comes in."""
    found: list[torch.Tensor] = []
    layers = find_stack(model).layers
    handles = [layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))]
    handles += [
        layer.register_forward_hook(
            lambda _, __, out: found.append((out[0] if isinstance(out, tuple) else out).clone())
        )
        for layer in layers
    ]
    try:
        model(input_ids=IDS, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def norm_of(model: Any) -> Any:
    base = model.base_model
    return next(m for n, m in base.named_children() if "norm" in n.lower() or n == "ln_f")


@torch.no_grad()
def said(model: Any, state: torch.Tensor) -> torch.Tensor:
    return model.get_output_embeddings()(norm_of(model)(state))


ONE = {"h.keeps": torch.ones(1), "h.reads.1": torch.zeros(HIDDEN), "h.reads.-1": torch.zeros(1)}
LAST = {"h.logits.1": torch.zeros(VOCAB), "h.logits.3": torch.ones(VOCAB)}
PLAN = "0-3,!end=h"


@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_one_depth_alone_is_the_model(family: str) -> None:
    """The null setting: the last state kept whole is the model, bit for bit; the last depth's scores alone are its
    log-probabilities. Families that scale or cap logits refuse the latter by name."""
    model = copy.deepcopy(made_of(family))
    before = logits(model)
    with running(model, PLAN, ONE):
        assert torch.equal(logits(model), before)
    if family in PLAIN:
        with running(model, PLAN, LAST):
            assert torch.equal(logits(model), before.log_softmax(-1))
    elif family in ("gemma2", "granite", "cohere2"):
        with pytest.raises(PlanError, match="does more with its last state") as caught:
            apply(model, PLAN, LAST)
        assert caught.value.code == "P166"
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_a_sum_of_states(family: str) -> None:
    """keeps x + sum of reads.N h_N, a number, a vector or a matrix each, against sums of what hooks heard."""
    model = copy.deepcopy(tiny(family))
    heard = states(model)
    matrix = drawn(HIDDEN, HIDDEN)
    weights = {"h.keeps": torch.tensor([0.5]), "h.reads.-1": torch.tensor([0.25]), "h.reads.1": drawn(HIDDEN, seed=4)}
    weights["h.reads.2"] = matrix
    x = 0.5 * heard[4] + 0.25 * heard[0] + weights["h.reads.1"] * heard[2] + heard[3] @ matrix.T
    with running(model, PLAN, weights):
        torch.testing.assert_close(logits(model), said(model, x), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_weights_of_scores(family: str) -> None:
    """sum of logits.N log p_N with the final norm in front of the head, the exit's own depth after its own sum."""
    model = copy.deepcopy(tiny(family))
    heard = states(model)
    weights = {f"h.logits.{n}": drawn(VOCAB, seed=n + 5) for n in (-1, 0, 2, 3)} | {"h.reads.0": torch.tensor([0.5])}
    own = heard[4] + 0.5 * heard[1]
    want = sum(
        weights[f"h.logits.{n}"] * said(model, own if n == 3 else heard[n + 1]).log_softmax(-1) for n in (-1, 0, 2, 3)
    )
    with running(model, PLAN, weights):
        torch.testing.assert_close(logits(model), want, **CLOSE)
        torch.testing.assert_close(logits(model, logits_to_keep=2), want[:, -2:], **CLOSE)


def test_a_contrast_of_depths() -> None:
    """Late minus early log-probabilities, of tokens that are plausible for the last depth: DoLa with a fixed layer."""
    model = copy.deepcopy(tiny("llama"))
    heard = states(model)
    late, early = (said(model, heard[n]).log_softmax(-1) for n in (4, 2))
    want = torch.where(late.exp() < 0.1 * late.exp().amax(-1, keepdim=True), -torch.inf, late - early)
    ones = torch.ones(VOCAB)
    with running(model, PLAN, {"h.logits.3": ones, "h.logits.1": -ones, "h.plausible": torch.tensor([0.1])}):
        found = logits(model)
    assert (want == -torch.inf).any()
    torch.testing.assert_close(found, want, **CLOSE)


def everything(family: str) -> dict[str, torch.Tensor]:
    model = made_of(family)
    size = model.config.hidden_size
    own = {"h.keeps": torch.tensor([0.7]), "h.reads.0": drawn(size, seed=6), "h.lens": torch.eye(size) * 0.9}
    if family in PLAIN:
        own |= {f"h.logits.{n}": drawn(VOCAB, seed=n) for n in (0, 3)}
    return own


@pytest.mark.parametrize("family", every(3, [n for n in FAMILIES if n not in ("mamba2", "jamba", "nemotron_h")]))
def test_cached_is_uncached_and_generate_works(family: str) -> None:
    model, weights = copy.deepcopy(made_of(family)), everything(family)
    with running(model, "0-1,2,3,!end=h", weights), torch.no_grad():
        whole = logits(model, use_cache=False)
        cache = DynamicCache(config=model.config)
        first = model(input_ids=IDS[:, :4], past_key_values=cache).logits
        rest = [model(input_ids=IDS[:, n : n + 1], past_key_values=cache).logits for n in range(4, 9)]
        torch.testing.assert_close(torch.cat([first, *rest], 1), whole, **CLOSE)
        tokens = model.generate(IDS, **GREEDY)
        assert torch.equal(tokens, model.generate(IDS, use_cache=False, **GREEDY))
        beams = model.generate(IDS, num_beams=2, **GREEDY)
    assert beams.shape == tokens.shape
    assert not torch.allclose(whole, logits(model, use_cache=False), atol=1e-3)


def test_under_a_policy_as_without() -> None:
    """A gate that always runs changes nothing; a policy that never leaves an exit in the middle neither."""
    model, weights = copy.deepcopy(tiny("llama")), everything("llama")
    with running(model, PLAN, weights):
        want = logits(model)
    plan = plan_of(model, "0-1,2?g/project,3,!end=h")
    with running(model, plan, weights, policy=Policy(plan)):
        torch.testing.assert_close(logits(model), want, **CLOSE)


def test_an_exit_in_the_middle_reads_depths_too() -> None:
    """At an exit with a gate the same tensors make what the policy sees, and what a token says that leaves there."""
    model, weights = copy.deepcopy(tiny("llama")), {"h.reads.0": torch.tensor([0.5])}
    weights |= {"h.logits.0": drawn(VOCAB), "h.logits.2": torch.ones(VOCAB)}
    with running(model, "0-2,!end=h", weights):
        want = logits(model, use_cache=False)
    with running(model, "0-2,!end=h?exit,3/project", weights, policy="exit:confidence=0,prefill=true"):
        torch.testing.assert_close(logits(model, use_cache=False), want, **CLOSE)
    with running(model, "0-2,!end=h?exit,3/project", weights, policy="exit:confidence=1,prefill=true"):
        torch.testing.assert_close(logits(model, use_cache=False), logits_of_base(), **CLOSE)


def logits_of_base() -> torch.Tensor:
    return logits(tiny("llama"))


def test_gradients_reach_the_tensors() -> None:
    model = copy.deepcopy(tiny("llama"))
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in everything("llama").items()}
    with running(model, PLAN, weights):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in weights.values())
    handle = apply(model, PLAN, everything("llama"), modules=True)
    try:
        found = logits(model)
        assert {"shoal.tensors.h.reads.0", "shoal.tensors.h.keeps"} <= {name for name, _ in model.named_parameters()}
    finally:
        handle.restore()
    with running(model, PLAN, everything("llama")):
        assert torch.equal(logits(model), found)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_planned_checkpoint_holds_it(family: str, tmp_path: Path) -> None:
    """Bit for bit, counted as its cost says; a stock folder and a GGUF file have no such head."""
    model, weights = copy.deepcopy(tiny(family)), everything(family)
    spec = inspect(model)
    plan = parse_plan("0,2-3,!end=h", Plan.identity(spec))
    written = write_planned(Loaded(model, None, "tiny"), plan, tmp_path / "one", weights=weights)
    assert written.proof.passed
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    with running(model, plan, weights):
        assert torch.equal(logits(made), logits(model))
        assert torch.equal(made.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    assert written.params == cost(plan, spec, weights=shapes_of(weights)).params
    with pytest.raises(WriteError, match="has the base's head alone") as caught:
        rewrite(model, plan, weights=weights)
    assert caught.value.code == "W284"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_sums_in_front_of_other_heads(name: str) -> None:
    """Encoders and decoders beside one sum their states; scores of several depths are refused by name."""
    model, inputs = kind(name), inputs_of(kind(name))
    size = model.config.d_model
    before = returned(model, inputs)
    null = {"h.keeps": torch.ones(1), "h.reads.1": torch.zeros(size)}
    with running(model, plan_of(model, "encoder: 0-5,!e=h; decoder: 0-5,!d=h"), null):
        assert equal(returned(model, inputs), before)
    with running(model, plan_of(model, "decoder: 0-5,!d=h"), {"h.reads.1": torch.tensor([0.5])}):
        assert not equal(returned(model, inputs), before)
    with pytest.raises(PlanError, match="scores of a causal decoder") as caught:
        apply(model, plan_of(model, "decoder: 0-5,!d=h"), {"h.logits.5": torch.ones(model.config.vocab_size)})
    assert caught.value.code == "P166"


REFUSED: tuple[tuple[str, dict[str, tuple[int, ...]], str, str], ...] = (
    ("0-3,!end=h", {"h.reads.4": (1,)}, "P165", "state behind layer 4, which does not run in front of it"),
    ("0,2-3,!end=h", {"h.logits.1": (VOCAB,)}, "P165", "name one of -1, 0, 2, 3"),
    ("0-1,!m=h?g,2/project,3/project", {"h.reads.2": (1,)}, "P165", "layer 2, which does not run in front"),
    ("0-3,!end=h", {"h.reads.1": (2,)}, "P113", r"is \[2\] instead of \[1\] or \[32\] or \[32, 32\]"),
    ("0-3,!end=h", {"h.logits.1": (1,)}, "P113", r"instead of \[64\]"),
    ("0-3,!end=h", {"h.keep": (1,)}, "P113", "no tensor of a head"),
    ("0-3,!end=h", {"h.reads.-2": (1,)}, "P113", "no tensor of a head"),
    ("0-3,!end=h", {"h.plausible": (1,)}, "P113", "leave it out"),
    ("0-3,!end=h", {}, "P112", "should read its head from"),
    ("0-2,!end=h,3", {"h.keeps": (1,)}, "P115", "behind it never runs"),
)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_does_not_fit_is_refused(case: tuple[str, dict[str, tuple[int, ...]], str, str]) -> None:
    text, shapes, code, why = case
    spec = inspect(tiny("llama"))
    found = check(parse_plan(text, Plan.identity(spec)), spec, shapes)
    assert code in [one.code for one in found]
    with pytest.raises(ShoalError, match=why):
        require(parse_plan(text, Plan.identity(spec)), spec, shapes)


def test_a_forward_that_begins_behind_a_depth_says_so() -> None:
    model = copy.deepcopy(tiny("llama"))
    with bind(model, PLAN, {"h.reads.0": torch.ones(1)}).running() as bound:
        executor = bound.executor()
        with executor.between(2, torch.zeros(2, 9, HIDDEN)), pytest.raises(PlanError, match="run the plan whole") as no:
            logits(model)
        assert no.value.code == "P165"


def test_healing_lets_them_learn() -> None:
    """One step by `--learn plan`, whose logits are made in chunks of states: the gradients are those of the whole."""
    model, new = copy.deepcopy(tiny("llama")), everything("llama")
    with learner_of(model, "cross-entropy", learn=["plan"], plan=PLAN, weights=new) as learner:
        batch = batch_of(2)
        found = gradients(learner, batch, 2)
        plan, tensors = learner.finished()
    asked = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in new.items()}
    with running(model, PLAN, asked):
        scores = model(input_ids=batch["ids"]).logits
    labels = batch["labels"]
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
    assert found.keys() == asked.keys()
    for name, parameter in asked.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)
    assert str(plan) == PLAN
    assert tensors.keys() == new.keys()


@pytest.mark.parametrize("how", ["scores", "states", "contrast"])
def test_the_transform(how: str) -> None:
    """Its beginning is the plan it was given; a contrast is late minus early."""
    model = copy.deepcopy(tiny("llama"))
    given = Job(model, random_data(4, 9), parse_plan("0-1,3", Plan.identity(inspect(model))))
    made = depth_head(given, how=how)  # type: ignore[arg-type]
    assert str(made.plan) == "0-1,3,!depths=depths"
    with running(model, "0-1,3"):
        before, early = logits(model), said(model, states(model)[2 if how == "contrast" else 1])
    with running(model, made.plan, made.weights):
        found = logits(model)
    if how == "states":
        assert torch.equal(found, before)
    elif how == "scores":
        assert torch.equal(found, before.log_softmax(-1))
    else:
        seen = found > -torch.inf
        assert seen.any(-1).all() and not seen.all()
        torch.testing.assert_close(found[seen], (before.log_softmax(-1) - early.log_softmax(-1))[seen], **CLOSE)
    with pytest.raises(ShoalError, match="does not end with a layer") as caught:
        depth_head(Job(model, given.data, made.plan, made.weights))
    assert caught.value.code == "U690"
