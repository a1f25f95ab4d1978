"""Policies as people use them: generate, heads of their own, one choice per prompt, and everything that is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import shoal
from shoal.deciding.decisions import Decision
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_exits, with_gates
from shoal.deciding.policy import Policy
from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Exit, Plan, parse_plan
from shoal.registry import entries

from .families import tiny
from .kinds import kind
from .planted import outputs_of
from .policy_cells import LENGTH, PREFILL, Written, batch_of, stepped, whole


def identity(family: str) -> Plan:
    return Plan.identity(inspect(tiny(family)))


@torch.no_grad()
def written(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return model.generate(**batch, max_new_tokens=9, do_sample=False, **options)


@pytest.mark.parametrize(
    "policy", ["exit:confidence=0.05,first=0", "exit:confidence=0.05,first=0,fill=defer", "unified"]
)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_writes_what_a_loop_without_a_cache_writes(policy: str, cache: str | None) -> None:
    model, batch = tiny("llama"), batch_of(2)
    with running(model, "0-3", policy=policy) as handle:
        ids = written(model, batch, **({} if cache is None else {"cache_implementation": cache}))
        depths, tokens = handle.trace.depths, handle.trace.tokens
        handle.prompt = LENGTH
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
        logits = whole(model, {"input_ids": ids, "attention_mask": mask})
        assert handle.trace.depths == [row + handle.trace.depths[n][-1:] for n, row in enumerate(depths)]
    assert torch.equal(logits[:, LENGTH - 1 : -1].argmax(-1), ids[:, LENGTH:])
    assert tokens == ids[:, :-1].tolist(), "the last token was written and never read"
    assert depths[1][:3] == [0, 0, 0], "padding has no depth"
    assert any(depth < 4 for depth in depths[0][LENGTH:])


def test_the_trace_is_plain_data_and_the_hooks_go() -> None:
    import json

    model = copy.deepcopy(tiny("llama"))
    with running(model, "0-3", policy="exit:confidence=0.05,first=0") as handle:
        written(model, batch_of(1))
        said = json.loads(json.dumps(handle.trace.to_dict()))
        assert set(said) == {"layers", "tokens", "depths", "counts"}
        assert said["layers"] == 4
        assert said["counts"]["tokens"] == len(said["tokens"][0]) == len(said["depths"][0]) == LENGTH + 8
        assert said["counts"]["asked"] == sum(said["depths"][0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_per_prompt_chooses_row_by_row_from_the_prompt_alone() -> None:
    """A row of a batch does what it does alone; a row alone does what the listed layers say."""
    model, batch = tiny("llama"), batch_of(2)
    with running(model, "0-3", policy="per-prompt:skip=1,keep_last=0") as handle:
        both = stepped(model, batch, "dynamic")
        assert handle.deciding is not None
        chosen = {layer: rows.tolist() for layer, rows in handle.deciding.memory["chosen"].items()}
    assert all(sum(rows[n] for rows in chosen.values()) == 1 for n in (0, 1))
    for n in (0, 1):
        one = {name: value[n : n + 1] for name, value in batch.items()}
        seen = one["attention_mask"].bool()
        layer = next(layer for layer, rows in chosen.items() if rows[n])
        with running(model, "0-3", policy=f"skip:listed={layer},phase=decode"):
            alone = stepped(model, one, "dynamic")
        assert (both[n : n + 1] - alone)[seen].abs().max() <= 1e-4


def test_a_lens_stands_before_the_shared_head_and_an_own_head_behind_the_norm() -> None:
    model, policy = tiny("llama"), "exit:after=1,prefill=true,head=fitted"
    batch = batch_of(2)
    seen = batch["attention_mask"].bool()
    generator = torch.Generator().manual_seed(4)
    lens, bias = torch.randn(32, 32, generator=generator) / 6, torch.linspace(-1, 1, 32)
    own = torch.randn(64, 32, generator=generator)
    outputs = outputs_of(model, batch["input_ids"], **{k: v for k, v in batch.items() if k != "input_ids"})
    with torch.no_grad():
        through_lens = model.lm_head(model.model.norm(torch.nn.functional.linear(outputs[1], lens, bias)))
        through_own = model.model.norm(outputs[1]) @ own.T
    with running(model, "0-3", {"fitted-1.lens": lens, "fitted-1.lens_bias": bias}, policy=policy):
        assert (whole(model, batch) - through_lens)[seen].abs().max() <= 1e-4
    with running(model, "0-3", {"fitted-1.weight": own}, policy=policy):
        assert (stepped(model, batch, "dynamic") - through_own)[seen].abs().max() <= 1e-4
        assert torch.equal(written(model, batch)[:, LENGTH], through_own[:, -1].argmax(-1))
    assert not model.lm_head._forward_hooks


def test_a_head_answers_for_those_who_left_there_and_decides_for_them() -> None:
    """Confidence at an exit with a head of its own is that head's."""
    model, batch = tiny("llama"), batch_of(1)
    sure = torch.zeros(64, 32)
    sure[5] = 1e3 * torch.ones(32)
    sure[6] = -sure[5]
    with running(model, "0-3", {"own-2.weight": sure}, policy="exit:confidence=0.99,layers=2,head=own") as handle:
        handle.prompt = PREFILL
        logits = whole(model, batch)
        assert handle.trace.depths == [[4] * PREFILL + [3] * (LENGTH - PREFILL)]
    assert set(logits[0, PREFILL:].argmax(-1).tolist()) <= {5, 6}
    assert not set(logits[0, :PREFILL].argmax(-1).tolist()) <= {5, 6}


@pytest.mark.parametrize("family", ["gemma2", "granite", "falcon"])
def test_confidence_is_that_of_the_logits_whatever_stands_behind_the_head(family: str) -> None:
    """A soft cap, a scale, nothing: what an exit reads behind layer 2 is what a model of that depth says."""
    model = tiny(family, "eager")
    batch, seen = batch_of(1), []

    class Reading(Policy):
        def should_exit(self, step: Exit, forward: ForwardView, view: Any) -> Decision:
            seen.append(view.read("probability"))
            return False

    spec = inspect(model)
    exits = with_exits(Plan.identity(spec), spec, [2], "project")
    with running(model, exits, policy=Reading(exits)):
        whole(model, batch)
    with running(model, "0-2"):
        shallow = whole(model, batch)
    assert torch.allclose(seen[0], shallow.softmax(-1).amax(-1), atol=1e-5)


def test_leaving_behind_the_last_recurrent_layer_is_right() -> None:
    """Jamba's layers 0 and 2 keep a state, so a token may leave behind 2, and only there."""
    model = tiny("jamba")
    for rows in (1, 2):
        batch = batch_of(rows)
        seen = batch["attention_mask"].bool()
        with running(model, "0-3", policy="exit:confidence=0.05,layers=2") as handle:
            handle.prompt = PREFILL
            right, deep = whole(model, batch), handle.trace.depths
            handle.prompt = None
            got = stepped(model, batch, "dynamic", 1)
            assert handle.trace.depths == deep
            assert 3 in deep[0]
        assert (got - right)[seen].abs().max() <= 1e-4


REFUSED: dict[str, tuple[str, str, str, str, str]] = {
    "unknown name": ("llama", "0-3", "exot:after=1", "U501", r"did you mean exit\?"),
    "unknown option": ("llama", "0-3", "exit:confidense=1", "U502", r"did you mean confidence\?"),
    "no value": ("llama", "0-3", "exit:", "U502", "gives no option"),
    "a state": ("mamba2", "0-3", "exit:after=1", "P131", "mamba2"),
    "a state in a hybrid": ("jamba", "0-3", "skip:listed=2", "P131", "layer 2"),
    "keys that others read": ("gemma3n_text", "0-3", "skip:listed=1", "P133", "layer 1"),
    "KV read across layers": ("llama", "0-2,3@1", "exit:after=0", "P133", "layer 3"),
    "layers side by side": ("llama", "0,(1|2),3", "exit:after=0", "P132", "1|2"),
    "a gated map": ("llama", "0-1,~2?g,3", "exit:after=0", "P112", "map-2-2"),
    "late in a window": ("gemma2", "0-3", "exit:after=1,fill=defer", "P135", "outside its window"),
    "late in the middle": ("llama", "0,1?g/defer,2-3", "skip:listed=1", "P135", "in the middle"),
    "a gate without a fill": ("llama", "0,1?g,2-3", "exit:confidence=1", "P134", r"1\?gate/project"),
    "nothing to copy": ("llama", "0-3", "skip:random=1,fill=copy", "P136", "layer 0"),
    "a head that is not given": ("llama", "0-3", "exit:after=1,head=own", "P112", "own-1"),
}
"""What no policy of its own is to blame for; the others' files say what they refuse."""
REFUSED |= {
    one.title: (one.family, one.plan, one.text, one.code, one.words)
    for entry in entries("policies").values()
    for one in entry.examples.refused
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_decided_is_refused_by_name(case: str) -> None:
    family, plan, policy, code, words = REFUSED[case]
    model = tiny(family, "eager" if family in ("gemma2", "mamba2") else "sdpa")
    layers = find_stack(model).layers
    with pytest.raises(ShoalError, match=words) as caught:
        apply(model, plan, policy=policy)
    assert caught.value.code == code
    assert find_stack(model).layers is layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_policy_for_another_model_or_plan_is_refused() -> None:
    made = make_policy("exit:after=1", identity("llama"), inspect(tiny("llama")))
    with pytest.raises(ShoalError, match="P138: this policy was made for the plan 0-3 of llama"):
        apply(tiny("gpt2"), "0-3", policy=made)
    with pytest.raises(ShoalError, match="P138"):
        apply(tiny("llama"), "0-2", policy=made)


def test_beam_search_is_refused_when_it_reorders() -> None:
    with running(tiny("llama"), "0-3", policy="exit:confidence=0.5,first=0"):
        with pytest.raises(ShoalError, match="U580: beam search"):
            written(tiny("llama"), batch_of(1), num_beams=2)
        written(tiny("llama"), batch_of(1))


def test_a_cache_of_another_policy_or_batch_is_refused() -> None:
    model, past = tiny("llama"), DynamicCache(config=tiny("llama").config)
    ids = batch_of(2)["input_ids"]
    with running(model, "0-3", policy="unified"), torch.no_grad():
        model(ids[:1], past_key_values=past, use_cache=True)
    with running(model, "0-3", policy="unified"), torch.no_grad(), pytest.raises(ShoalError, match="P123"):
        model(ids[:1], past_key_values=past, use_cache=True)


def test_a_policy_that_breaks_its_promise_is_stopped() -> None:
    """Who says that no fill is needed and then runs a layer again is told so before anything wrong is attended to."""

    class Liar(Written):
        consistent = True

    model, batch = tiny("llama"), batch_of(1)
    runs = torch.ones(2, LENGTH, dtype=torch.bool)
    runs[:, 8] = False
    spec = inspect(model)
    plan = with_gates(Plan.identity(spec), spec, [1], "written", None)
    with running(model, plan, policy=Liar(plan, {1: runs})):
        with pytest.raises(ShoalError, match="P139: layer 1 would read"):
            stepped(model, batch, "dynamic", 1)
        with pytest.raises(ShoalError, match="P139: layer 1 would read"):
            whole(model, batch)


def test_a_head_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ShoalError, match=r"P113: own-1.weight of exit after-1 is \[9, 32\] instead of \[64, 32\]"):
        apply(tiny("llama"), "0-3", {"own-1.weight": torch.zeros(9, 32)}, policy="exit:after=1,head=own")


def test_without_a_policy_there_is_no_trace_and_no_gate() -> None:
    model = tiny("llama")
    with running(model, "0-3") as handle:
        assert handle.policy is None
        assert handle.prompt is None
        with pytest.raises(ShoalError, match="P125"):
            _ = handle.trace
    with pytest.raises(ShoalError, match="P125: step 1\\?g/project is decided at run time"):
        apply(model, "0,1?g/project,2-3")


def test_a_plan_with_gates_of_its_own_keeps_them() -> None:
    """Who writes gates chooses the places and the fills; the policy only decides."""
    model, batch = tiny("llama"), batch_of(1)
    plan = parse_plan("0-1,!here?mine,2/copy,3/mask", identity("llama"))
    with running(model, plan, policy="exit:confidence=0") as handle:
        stepped(model, batch, "dynamic", 1)
        assert handle.plan == plan
        assert handle.trace.depths == [[4] * PREFILL + [2] * (LENGTH - PREFILL)]


def test_a_policy_needs_a_causal_model() -> None:
    with pytest.raises(ShoalError, match="P130"):
        apply(kind("t5"), "decoder: 0-1", policy="exit:after=0")


def test_shoal_lists_policies_and_runs_a_public_name() -> None:
    assert "exit" in shoal.ls("policies")["policies"]
    with shoal.running(tiny("llama"), "0-3", policy="exit:after=1") as handle:
        assert str(handle.plan) == "0-1,!after-1?exit,2/project,3/project"
