"""However a model is called, and however many models and caches one policy decides for: the answer is the same."""

from __future__ import annotations

import copy
from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from shoal.deciding import policy
from shoal.deciding.decidable import require_decidable
from shoal.deciding.decisions import Decision
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import fill_for
from shoal.deciding.policy import Policy, Schedule
from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.executing.exit_heads import Heads
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Exit, Plan, Run, parse_plan

from .families import VOCAB, tiny
from .policy_cells import LENGTH, PREFILL, batch_of, stepped, whole
from .references import by_hand, silenced


def identity(model: Any) -> Plan:
    return Plan.identity(inspect(model))


def called(model: Any, way: str) -> Any:
    given = dict(batch_of(2))
    ids = given["input_ids"]
    if way == "embeddings":
        given = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": given["attention_mask"]}
    names = list(signature(model.forward).parameters)
    last = {"keywords": "", "ids by position": "input_ids"}.get(way, "attention_mask")
    placed = names[: names.index(last) + 1] if last else []
    options: dict[str, Any] = {"use_cache": False} | ({"return_dict": False} if "tuple" in way else {})
    if way == "a tuple with a loss":
        options["labels"] = ids
    rest = {name: value for name, value in given.items() if name not in placed}
    return model(*(given.get(name) for name in placed), **rest, **options)


WAYS = ("keywords", "ids by position", "both by position", "a tuple", "a tuple with a loss", "embeddings")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_padding_is_no_text_however_the_mask_is_given(family: str, way: str) -> None:
    """By position (GPT-2's mask stands behind its cache), by keyword, with embeddings in place of ids, and whatever the
    model is asked to return."""
    model = tiny(family)
    with running(model, "0-3", policy="menu:plans=0-3+0,3") as handle:
        called(model, way)
        trace = handle.trace
    assert trace.depths == [[4.0] * LENGTH, [0.0] * 3 + [4.0] * (LENGTH - 3)]
    assert trace.tokens == (batch_of(2)["input_ids"].tolist() if way != "embeddings" else [[-1] * LENGTH] * 2)


@torch.no_grad()
def test_an_mlp_that_is_called_by_keyword_is_counted() -> None:
    model = copy.deepcopy(tiny("llama"))
    for layer in find_stack(model).layers:
        layer.mlp.register_forward_pre_hook(lambda _, args, kwargs: ((), {"x": args[0]} | kwargs), with_kwargs=True)
    with running(model, "0-3", policy="exit:confidence=1,first=0") as handle:
        whole(model, batch_of(1))
        assert handle.trace.counts.mlps == dict.fromkeys(range(4), LENGTH)


def two_texts() -> torch.Tensor:
    """[2, 1, LENGTH]; per-prompt leaves layer 3 out of the first and layer 2 out of the second."""
    return torch.randint(3, VOCAB, (6, LENGTH), generator=torch.Generator().manual_seed(2))[:2, None]


STATEFUL = ("menu:plans=0-3+0,2-3+0,3,confidence=0.01", "per-prompt:skip=1,keep_first=0,keep_last=0")


@torch.no_grad()
@pytest.mark.parametrize("text", STATEFUL)
def test_one_policy_decides_for_two_models_at_once(text: str) -> None:
    """What it remembers belongs to the sequences: two models, by turns, write what each writes alone."""
    one, other = copy.deepcopy(tiny("llama")), copy.deepcopy(tiny("llama"))
    policy = make_policy(text, identity(one), inspect(one))
    texts = two_texts()
    alone = [_by_turns([one], [ids], policy)[0] for ids in texts]
    assert not torch.equal(alone[0], alone[1])
    assert _by_turns([one, other], list(texts), policy) == alone


@torch.no_grad()
@pytest.mark.parametrize("text", STATEFUL)
def test_one_policy_decides_for_two_caches_of_one_model(text: str) -> None:
    """Two conversations by turns, each with a cache of its own, under one running plan."""
    model = copy.deepcopy(tiny("llama"))
    policy = make_policy(text, identity(model), inspect(model))
    texts = two_texts()
    alone = [_by_turns([model], [ids], policy)[0] for ids in texts]
    assert _by_turns([model, model], list(texts), policy) == alone


class _Written(list[torch.Tensor]):
    def __eq__(self, other: object) -> bool:
        assert isinstance(other, list)
        return all(torch.equal(a, b) for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _by_turns(models: list[Any], texts: list[torch.Tensor], policy: Policy) -> _Written:
    """For each text the logits of a prefill and of single tokens; the models take turns, token by token."""
    caches = [DynamicCache(config=model.config) for model in models]
    out: list[list[torch.Tensor]] = [[] for _ in models]
    handles = [running(model, "0-3", policy=policy) for model in dict.fromkeys(models)]
    for handle in handles:
        handle.__enter__()
    try:
        start = 0
        for end in (PREFILL, *range(PREFILL + 1, LENGTH + 1)):
            for at, (model, ids) in enumerate(zip(models, texts, strict=True)):
                out[at].append(model(ids[:, start:end], past_key_values=caches[at], use_cache=True).logits)
            start = end
    finally:
        for handle in handles:
            handle.__exit__(None, None, None)
    return _Written(torch.cat(one, 1) for one in out)


class _Falling(Schedule):
    def skipped(self, column: int, generated: bool) -> frozenset[int]:
        return frozenset({1}) if generated else frozenset()


def test_a_fill_is_found_without_changing_the_policy() -> None:
    policy = _Falling(identity(tiny("llama")))
    before = dict(vars(policy))
    assert fill_for(policy, "auto") is None
    assert {name: value for name, value in vars(policy).items() if name != "consistent"} == before
    assert policy.consistent
    assert _Falling(identity(tiny("llama"))).consistent, "it is proved, whoever asks"


class _HalfLayers(Policy):
    """The mlps of gated runs are left out for some tokens, and some leave at an exit before them."""

    leaves_out = "mlp"

    def __init__(self, plan: Plan, left: torch.Tensor, whole: torch.Tensor) -> None:
        super().__init__(plan)
        self.left, self.whole = left, whole

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        return self.whole[: forward.rows, forward.past : forward.past + forward.tokens]

    def should_exit(self, step: Exit, forward: ForwardView, view: Any) -> Decision:
        return self.left[: forward.rows, forward.past : forward.past + forward.tokens]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("rows", [1, 2])
def test_mlps_behind_an_exit_are_not_run_for_those_who_left(family: str, rows: int) -> None:
    """A token that left keeps its state; the others run attention, and the mlp where the policy says so."""
    model, batch = tiny(family), batch_of(rows)
    seen = batch["attention_mask"].bool()
    generator = torch.Generator().manual_seed(5)
    left, keeps = (torch.rand(2, LENGTH, generator=generator) < 0.5 for _ in range(2))
    left[:, 9], keeps[:, 10] = True, False
    left[:, 10] = False
    plan = parse_plan("0-1,!early?exit,2?half/project,3?half/project", identity(model))

    def chain(call: Any, hidden: torch.Tensor) -> torch.Tensor:
        for layer in range(4):
            after = call(layer, hidden)
            if layer < 2:
                hidden = after
                continue
            with silenced(model, layer, "mlp"):
                without = call(layer, hidden)
            after = torch.where(keeps[:rows, :, None], after, without)
            hidden = torch.where(left[:rows, :, None], hidden, after)
        return hidden

    right = by_hand(model, batch, chain)
    with running(model, plan, policy=_HalfLayers(plan, left, keeps)) as handle:
        got = [whole(model, batch), *(stepped(model, batch, cache) for cache in ("dynamic", "static"))]
        depths = handle.trace.depths
    for logits in got:
        assert (logits - right)[seen].abs().max() <= 1e-4
    expected = 2 + torch.where(left, 0.0, 1.0 + keeps.float())[:rows] * 1.0
    assert depths == (expected * seen).tolist()


def test_mlps_behind_an_exit_must_be_there() -> None:
    model = tiny("llama")
    facts = copy.deepcopy(open_model(model).facts())
    facts.layers[3].parts = None
    plan = parse_plan("0-1,!early?exit,2/project,3?half/project", identity(model))
    nobody = torch.zeros(2, LENGTH, dtype=torch.bool)
    with pytest.raises(ShoalError, match="P105: no mlp is known apart from the rest of layer 3"):
        require_decidable(_HalfLayers(plan, nobody, ~nobody), inspect(model), model, facts)


@pytest.mark.parametrize("bias", [True, False])
def test_an_own_head_follows_the_state_to_its_device(bias: bool) -> None:
    """The head of a model may be on another device than its first layer, whose device the plan's tensors are given."""

    class Headed:
        head = nn.Linear(8, 16, bias=False, device="meta")

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    tensors = {"own.weight": torch.zeros(16, 8)} | ({"own.bias": torch.zeros(16)} if bias else {})
    heads = Heads(Headed(), tensors)
    heads.put()
    heads.now = [(torch.ones(1, 3, dtype=torch.bool), "own")]
    try:
        assert Headed.head(torch.empty(1, 3, 8, device="meta")).device.type == "meta"
    finally:
        heads.remove()


@torch.no_grad()
def test_a_policy_with_the_former_names_decides_as_before() -> None:
    """User files may define `runs`, `leaves`, `saw` and `wrote`, and call those of the class that they extend."""
    model, heard = tiny("llama"), list[str]()
    with pytest.warns(DeprecationWarning, match="is now called") as notes:

        class Former(Policy):
            watches = True
            reads_logits = True

            def runs(self, run: Any, moment: Any, hidden: torch.Tensor) -> Decision:
                heard.append("runs")
                return super().runs(run, moment, hidden) and run.layer != 1  # type: ignore[misc]

            def leaves(self, stop: Any, moment: Any, sight: Any) -> Decision:
                heard.append("leaves")
                return sight.read("margin") >= 0 if moment.past == 0 else False

            def saw(self, run: Any, moment: Any, before: torch.Tensor, after: torch.Tensor) -> None:
                heard.append("saw")

            def wrote(self, logits: torch.Tensor) -> None:
                heard.append("wrote")

    assert [str(note.message) for note in notes] == [
        f"Former.{old} is now called {new}; rename it"
        for old, new in {
            "runs": "should_run", "leaves": "should_exit", "saw": "after_run", "wrote": "after_forward"
        }.items()
    ]  # fmt: skip
    plan = parse_plan("0,1?g/project,2,!e?g,3/project", identity(model))
    with running(model, plan, policy=Former(plan)) as handle:
        whole(model, batch_of(1))
        assert handle.trace.depths == [[2.0] * LENGTH]
    assert heard == ["saw", "runs", "saw", "leaves", "wrote"]


def test_the_former_names_of_what_policies_see_still_import() -> None:
    for old, new in {"Moment": "ForwardView", "Sight": "ExitView", "both": "logical_and"}.items():
        with pytest.warns(DeprecationWarning, match=f"{old} is now shoal.deciding.*{new}"):
            assert getattr(policy, old).__name__ == new
