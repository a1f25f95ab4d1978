"""Oracles and replaced prompts: naive references, planted answers, null settings, refusals."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch

from shoal.errors import ShoalError
from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.scoring import logits_of, token_nll
from shoal.live import running
from shoal.measures.depth_oracle import depth_oracle
from shoal.measures.prompt_replaced import prompt_replaced
from shoal.measures.residual_oracle import residual_oracle
from shoal.models.stacks import find_stack

from .families import DEPTH, tiny
from .planted import NULL, PLANTED, answers, data_of, outputs_of, own_text, planted, random_data
from .test_measures import ragged

DATA = random_data(4, 12)
EVEN = ["0", "0,3", "0,2,3", "0-3"]
FIRST = ["0", "0-1", "0-2", "0-3"]


def refused(code: str, words: str, call: Any) -> None:
    with pytest.raises(ShoalError, match=words) as raised:
        call()
    assert raised.value.code == code


def judged(model: Any, plan: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with running(model, plan), torch.no_grad():
        logits = logits_of(model, ids, None)
    return token_nll(logits, ids), logits[:, :-1].argmax(-1)


def layers_of(plan: str) -> list[int]:
    ends = [[int(n) for n in piece.split("-")] for piece in plan.split(",")]
    return [layer for first, *last in ends for layer in range(first, (last or [first])[0] + 1)]


@pytest.mark.parametrize("judge", ["loss", "choice"])
@pytest.mark.parametrize(("menu", "plans"), [("even", EVEN), ("first", FIRST)])
@pytest.mark.parametrize("by", ["sequence", "token"])
def test_the_oracle_takes_the_shortest_plan_that_is_good_enough(menu: Any, plans: Any, by: Any, judge: Any) -> None:
    model, within = tiny("qwen3"), 0.7 if judge == "choice" else 0.02
    scores = depth_oracle(model, DATA, menu=menu, by=by, judge=judge, within=within, batch=3)
    dense = judged(model, "0-3", DATA.ids)
    found = [judged(model, plan, DATA.ids) for plan in plans]
    rises = [nll - dense[0] if judge == "loss" else (choice != dense[1]).double() for nll, choice in found]
    units = [(row, t) for row in range(4) for t in range(11)] if by == "token" else [(row, None) for row in range(4)]
    chosen, needs = [], [0] * DEPTH
    for row, t in units:
        own = [float(d[row].mean() if t is None else d[row, t]) for d in rises]
        chosen.append(next(place for place, d in enumerate(own) if d <= within))
        for layer in layers_of(plans[chosen[-1]]):
            needs[layer] += 1
    assert scores.values == pytest.approx([n / len(units) for n in needs])
    assert scores.detail["layers"][0] == pytest.approx(sum(n + 1 for n in chosen) / len(units))
    assert len(set(chosen)) > 1, "the units differ, or the test shows nothing"
    assert [row[0] for row in scores.detail["curve"]] == [1, 2, 3]
    assert [row[1] for row in scores.detail["curve"]] == pytest.approx([float(d.mean()) for d in rises[:3]], abs=1e-6)
    assert scores.detail["fixed"] == 1 + next(n for n, d in enumerate(rises) if d.mean() <= within)
    assert not scores.removal


def test_the_greedy_oracle_never_needs_a_layer_that_does_nothing() -> None:
    for family in ("llama", "gpt2"):
        scores = depth_oracle(planted(family), own_text(family).only([0, 1, 2]), menu="greedy")
        assert scores.values[PLANTED[family]] == 0 and scores.detail["change"] <= 0
        assert PLANTED[family] not in scores.detail["fixed_layers"]
        assert scores.detail["layers"][0] <= DEPTH - 1


def for_some(family: str, layer: int) -> Any:
    """A copy of the tiny model in which one layer acts on texts that begin with an even token, and on no others."""
    model, some = copy.deepcopy(tiny(family)), torch.ones(1, dtype=torch.bool)

    def begins(_: Any, args: Any, out: torch.Tensor) -> None:
        nonlocal some
        some = args[0][:, 0] % 2 == 0

    def only(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        made = out[0] if isinstance(out, tuple) else out
        made = torch.where(some[:, None, None], x + 4 * (made - x), x)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    model.get_input_embeddings().register_forward_hook(begins)
    find_stack(model).layer(layer).register_forward_hook(only, with_kwargs=True)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_oracle_leaves_a_layer_out_for_the_sequences_that_do_not_need_it(family: str) -> None:
    data = random_data(8, 16, seed=2)
    even = data.ids[:, 0] % 2 == 0
    scores = depth_oracle(for_some(family, 1), data, menu="greedy", judge="choice")
    assert 0 < int(even.sum()) < 8
    assert [own > 0 for own in scores.samples[1]] == even.tolist()
    assert scores.detail["change"] == 0
    # no plan without the layer is good enough for the text as a whole
    assert 1 in scores.detail["fixed_layers"]


def test_the_whole_model_is_always_good_enough_and_padding_does_not_count() -> None:
    model, data = tiny("llama"), ragged()
    rows = [data_of(ids[real.bool()][None]) for ids, real in zip(data.ids, data.mask, strict=True)]
    for by in ("sequence", "token"):
        own: dict[str, Any] = {"by": by, "judge": "choice"}
        scores, alone = depth_oracle(model, data, batch=2, **own), [depth_oracle(model, row, **own) for row in rows]
        for layer in range(DEPTH):
            assert scores.samples[layer] == tuple(one.samples[layer][0] for one in alone)
    everything = depth_oracle(model, DATA, judge="loss", within=1e9)
    assert everything.values == (1, 0, 0, 0) and everything.detail["fixed"] == 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"menu": "greedy", "by": "token"}, "U691", "ask for by=sequence"),
        ({"within": -0.1}, "U692", "use 0 or more"),
        ({"within": math.nan}, "U692", "use 0 or more"),
        ({"judge": "choice", "within": 1.0}, "U692", "less than 1"),
    ],
)
def test_an_oracle_that_cannot_be_asked_is_refused(options: Any, code: str, words: str) -> None:
    refused(code, words, lambda: depth_oracle(tiny("llama"), DATA, **options))
    with running(tiny("llama"), "0-2"):
        refused("U507", "a plan is running", lambda: depth_oracle(tiny("llama"), DATA))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_the_residual_oracle_skips_what_changes_little(family: str) -> None:
    """By hand: a hook on each layer puts the input back where it was changed by less than the threshold."""
    model, data = tiny(family), ragged(side="right")
    whole = residual_oracle(model, data, batch=3, threshold=0.0)
    ratios = sorted(residual_oracle(model, data, threshold=one).values for one in (0.0, 0.3, 1e9))
    assert whole.values == (1.0,) * DEPTH and ratios[0] == (0.0,) * DEPTH
    assert whole.detail["curve"] == [[0.0, DEPTH, 0.0, 0.0, 0.0, 1.0]], "bit for bit"
    threshold = 0.75
    scores = residual_oracle(model, data, batch=3, threshold=threshold, curve=(0.0, 0.25))
    dense = logits_of(model, data.ids, data.mask)
    ran: list[torch.Tensor] = []

    def skips(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        x, y = (args[0] if args else kwargs["hidden_states"]), out[0] if isinstance(out, tuple) else out
        ran.append((y - x).norm(dim=-1) / y.norm(dim=-1) >= threshold)
        made = torch.where(ran[-1][..., None], y, x)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    stack = find_stack(model)
    handles = [stack.layer(i).register_forward_hook(skips, with_kwargs=True) for i in range(DEPTH)]
    skipped = logits_of(model, data.ids, data.mask)
    for handle in handles:
        handle.remove()
    keep = data.mask[:, 1:].bool()
    shares = [float(own[:, :-1][keep].double().mean()) for own in ran]
    assert scores.values == pytest.approx(shares) and min(shares) < max(shares) and 0 < sum(shares) < DEPTH
    rise = (token_nll(skipped, data.ids) - token_nll(dense, data.ids))[keep].mean()
    curve = scores.detail["curve"]
    assert [row[0] for row in curve] == [0.0, 0.25, threshold]
    assert curve[-1][1] == pytest.approx(sum(shares)) and curve[-1][3] == pytest.approx(float(rise), rel=1e-4)
    assert curve[-1][5] == pytest.approx(float((skipped.argmax(-1) == dense.argmax(-1))[:, :-1][keep].double().mean()))
    assert curve[0][1] >= curve[1][1] >= curve[2][1], "a higher threshold skips no less"


def test_the_residual_oracle_runs_a_layer_for_the_sequences_that_it_changes() -> None:
    data = random_data(8, 16, seed=2)
    scores = residual_oracle(for_some("llama", 1), data, threshold=1e-6)
    even = (data.ids[:, 0] % 2 == 0).tolist()
    assert scores.samples[1] == tuple(15.0 if own else 0.0 for own in even)
    assert scores.detail["curve"][0][3:] == [0.0, 0.0, 1.0], "what is skipped adds nothing"
    assert residual_oracle(answers("llama"), DATA).values[NULL] == 0


def test_a_threshold_that_is_no_share_is_refused() -> None:
    odd: list[dict[str, Any]] = [{"threshold": -0.1}, {"curve": (0.1, math.nan)}, {"threshold": math.inf}]
    for own in odd:
        refused("U693", "no share of the state", partial(residual_oracle, tiny("llama"), DATA, **own))
    refused("M316", "no hidden state for each token", lambda: residual_oracle(tiny("gemma3n_text"), DATA))
    with running(tiny("llama"), "0-2"):
        refused("U507", "a plan is running", lambda: residual_oracle(tiny("llama"), DATA))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_the_prompt_is_replaced_behind_one_layer_and_goes_on_from_there(family: str) -> None:
    """By hand: one pass in which a hook on the layer replaces the first eight states."""
    model, prompt, stack = tiny(family), 8, find_stack(tiny(family))
    own, foreign = (outputs_of(model, ids) for ids in (DATA.ids, DATA.ids.roll(-1, 0)[:, :prompt]))
    dense = logits_of(model, DATA.ids, None)[:, prompt:]
    for by in ("random", "shuffled", "foreign"):
        scores = prompt_replaced(model, DATA, by=by, keep_first=2, tail=4, batch=3, seed=5)  # type: ignore[arg-type]
        assert scores.values[-1] == 0 and scores.detail["top1"][-1] == 1, "nothing reads above the last layer"
        for layer in range(DEPTH):
            x = own[layer][:, :prompt]
            noise = torch.stack(
                [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(5 + n)) for n in range(4)]
            )
            other = {
                "random": noise * (x.norm(dim=-1) / noise.norm(dim=-1))[..., None],
                "shuffled": x.gather(-1, noise.argsort(-1)),
                "foreign": foreign[layer],
            }[by]

            def put(_: Any, args: Any, out: Any, other: torch.Tensor = other) -> Any:
                made = (out[0] if isinstance(out, tuple) else out).clone()
                made[:, 2:prompt] = other[:, 2:]
                return (made, *out[1:]) if isinstance(out, tuple) else made

            handle = stack.layer(layer).register_forward_hook(put)
            changed = logits_of(model, DATA.ids, None)[:, prompt:]
            handle.remove()
            divergence, same = compare_logits(dense, changed)
            expected = divergence[:, :-1].mean().item()
            assert scores.values[layer] == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert scores.detail["top1"][layer] == pytest.approx(same[:, :-1].double().mean().item(), abs=0.1)


@pytest.mark.parametrize("by", ["random", "shuffled", "foreign"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_layer_reads_the_prompt_where_attention_is_silent_or_all_of_it_is_kept(family: str, by: Any) -> None:
    model = copy.deepcopy(tiny(family))
    for layer in (2, 3):
        for name, parameter in find_stack(model).layer(layer).named_parameters():
            if "attn" in name and any(piece in ("o_proj", "c_proj") for piece in name.split(".")):
                parameter.data.zero_()
    scores = prompt_replaced(model, DATA, by=by, tail=4)
    assert scores.values[0] > 0 and scores.values[1:] == (0.0,) * 3
    assert prompt_replaced(tiny(family), DATA, by=by, tail=4, keep_first=8).values == (0.0,) * DEPTH
    null = prompt_replaced(answers(family), DATA, by=by, tail=4)
    if by == "random":
        # what was drawn behind the layer below goes through the layer that does nothing as it is
        assert null.values[NULL] == pytest.approx(null.values[NULL - 1], rel=1e-6) != 0


def test_a_prompt_that_cannot_be_replaced_is_refused() -> None:
    model = tiny("llama")
    refused("U694", "give two or more", lambda: prompt_replaced(model, DATA.only([0]), by="foreign"))
    refused("U694", "use 0 to 8", lambda: prompt_replaced(model, DATA, tail=4, keep_first=9))
    refused("U538", "leaves no prompt", lambda: prompt_replaced(model, DATA, tail=12))
    refused("U538", "without padding", lambda: prompt_replaced(model, ragged()))
    refused("M316", "no hidden state for each token", lambda: prompt_replaced(tiny("gemma3n_text"), DATA))
    with running(model, "0-2"):
        refused("U507", "a plan is running", lambda: prompt_replaced(model, DATA))
