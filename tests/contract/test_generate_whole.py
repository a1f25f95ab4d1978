"""`generate` under a plan in families with other caches; the model behind the block, whatever left it; its copies."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - what must be refused
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteriaList
from transformers.generation.candidate_generator import EarlyExitCandidateGenerator

from shoal.errors import PlanError, ShoalError, ShoalWarning
from shoal.executing.bind import bind
from shoal.live import apply, running
from shoal.plan.answers import Refused
from shoal.plan.generate_ways import WAYS
from shoal.writing.surgery import rewrite

from .families import tiny
from .generating import ASKS, GREEDY, GREEDY_TEXT, PROMPT, compiled_step, face, plain, same
from .kinds import kind
from .live_models import IDS, logits, own, plan_of

PLANS = {"gpt2": "0,1x2,3", "gemma3_text": "0,1x2,3", "jamba": "2-3"}
STACKED = "encoder: 0,2-5; decoder: 0,1x2,5"
WITH_CACHE = (
    "beams", "prompt lookup", "assistant", "assistant itself", "early exit", "static cache", "own cache, filled",
    "own cache, too short", "no cache", "prompt in pieces", "left padding", "threads",
)  # fmt: skip


def answer(ask: Callable[[Any], Any], model: Any) -> Any:
    """What comes of asking: the result, or the error of transformers."""
    try:
        return ask(model)
    except (ValueError, NotImplementedError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("family", [*PLANS, "bart"])
def test_families_with_other_caches_write_what_their_written_model_writes(family: str) -> None:
    """Or transformers says the same of both, as of a recurrent model that shall take tokens back."""
    live = copy.deepcopy(kind(family)) if family == "bart" else own(family)
    plan = PLANS.get(family, STACKED)
    stock = rewrite(live, plan)
    stock.generation_config = copy.deepcopy(live.generation_config)
    before = face(live)
    for name in WITH_CACHE if family != "bart" else ("beams", "assistant itself", "early exit", "no cache", "threads"):
        found = WAYS[name].plan
        with running(live, plan):
            if isinstance(found, Refused):
                with pytest.raises(ShoalError) as caught:
                    ASKS[name](live)
                assert caught.value.code == found.code, name
            else:
                expected = answer(ASKS[name], stock)
                if not isinstance(expected, str) and name in GREEDY_TEXT:
                    expected = GREEDY_TEXT[name](stock)
                assert same(answer(ASKS[name], live), expected), name
        assert face(live) == before, name


def stopping(error: type[BaseException]) -> StoppingCriteriaList:
    def stop(ids: torch.Tensor, _: Any) -> torch.Tensor:
        if ids.shape[1] >= PROMPT["input_ids"].shape[1] + 3:
            raise error
        return torch.tensor([False])

    return StoppingCriteriaList([stop])


def early_by_hand(model: Any, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> Any:
    """What `assistant_early_exit` does, by a decoding loop of one's own: it leaves the config as it is on an error."""
    generation_config.assistant_early_exit = 2
    made = EarlyExitCandidateGenerator(input_ids, model, generation_config, {})
    return made.get_candidates(input_ids)[0]


def cut_short(model: Any) -> None:
    model.config.num_hidden_layers = 2
    model.config.something = [1]
    model.generation_config.max_length = 7
    raise ZeroDivisionError


LEAVING: dict[str, tuple[type[BaseException], Callable[[Any], Any]]] = {
    "an error": (ZeroDivisionError, lambda m: plain(m, stopping_criteria=stopping(ZeroDivisionError))),
    "ctrl-c": (KeyboardInterrupt, lambda m: plain(m, stopping_criteria=stopping(KeyboardInterrupt))),
    "ctrl-c, assisted": (
        KeyboardInterrupt,
        lambda m: plain(m, assistant_model=m, stopping_criteria=stopping(KeyboardInterrupt)),
    ),
    "ctrl-c, static": (
        KeyboardInterrupt,
        lambda m: plain(m, cache_implementation="static", stopping_criteria=stopping(KeyboardInterrupt)),
    ),
    "a refusal": (PlanError, lambda m: plain(m, assistant_early_exit=2)),
    "an own early exit": (PlanError, lambda m: plain(m, custom_generate=early_by_hand)),
    "a changed config": (ZeroDivisionError, cut_short),
}


@pytest.mark.parametrize("policy", [None, "exit:confidence=0.05,first=1"])
@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whatever_leaves_the_block_leaves_the_model_whole(family: str, how: str, policy: str | None) -> None:
    model, (error, ask) = own(family), LEAVING[how]
    expected, before = logits(model), face(model)
    with pytest.raises(error), running(model, "0-1,3" if policy is None else "0-3", policy=policy):
        ask(model)
    assert face(model) == before
    assert torch.equal(logits(model), expected)


def test_a_config_that_says_fewer_layers_never_cuts_the_plan() -> None:
    for family in ("llama", "gpt2"):
        model = own(family)
        with running(model, "0-1,3"):
            expected = logits(model)
            model.config.num_hidden_layers = 2
            with pytest.raises(PlanError, match=r"P143: .* said 4 layers .* says 2 now"):
                logits(model)
            model.config.num_hidden_layers = 4
            assert torch.equal(logits(model), expected)


def test_what_follows_the_weights_stays() -> None:
    model = own("llama")
    handle = apply(model, "0-1,3")
    model.resize_token_embeddings(70)
    handle.restore()
    assert model.config.vocab_size == 70 and model(IDS, use_cache=False).logits.shape[-1] == 70


@pytest.mark.slow
def test_compiled_steps_of_one_plan_are_not_those_of_the_next() -> None:
    model = own("llama")
    whole = plain(model)
    for plan in ("0,1x2,3", "0,2-3", "0-3"):
        with running(model, plan):
            assert torch.equal(compiled_step(model), plain(model)), plan
        assert torch.equal(compiled_step(model), whole)


def test_threads_run_parts_and_own_tensors_of_one_layer_at_once() -> None:
    model = own("llama")
    weights = {f"a.{name}": tensor * 1.3 for name, tensor in model.model.layers[1].state_dict().items()}
    before = face(model)
    with running(model, "0,1a,2,1:a,2@a0,3", weights):
        expected = GREEDY_TEXT["threads"](model)
        for _ in range(2):
            assert same(ASKS["threads"](model), expected)
    assert face(model) == before


def test_saving_says_that_the_whole_base_is_saved(tmp_path: Path) -> None:
    model = own("llama")
    handle = apply(model, "0-1,3")
    with pytest.warns(ShoalWarning, match=r"P148: .*shoal\.write"):
        model.save_pretrained(tmp_path / "saved")
    handle.restore()
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.num_hidden_layers == 4


def test_adapters_are_saved_under_a_plan_as_ever(tmp_path: Path) -> None:
    model = peft.get_peft_model(own("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with running(model, "0-1,3"):
        model.save_pretrained(tmp_path / "adapter")
        with pytest.warns(ShoalWarning, match="P148"):
            model.get_base_model().save_pretrained(tmp_path / "base")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_model_under_a_plan_is_not_pickled() -> None:
    for family in ("llama", "bert"):
        model: PreTrainedModel = own(family) if family == "llama" else copy.deepcopy(kind(family))
        with running(model, "0-2"):
            with pytest.raises(PlanError, match="P147"):
                pickle.dumps(model)
            assert pickle.dumps(model.state_dict())
        assert pickle.dumps(model)


@pytest.mark.parametrize("policy", [None, "exit:confidence=0.05,first=1"])
def test_a_copy_of_a_model_under_a_plan_is_asked_for_itself(policy: str | None) -> None:
    model = own("llama")
    with running(model, "0,1x2,3" if policy is None else "0-3", policy=policy):
        expected, made = plain(model), copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(plain(made), expected)
        with pytest.raises(PlanError, match="P142"):
            plain(made, assistant_early_exit=2)
    assert torch.equal(plain(made), expected), "the copy goes on when the first is restored"


def test_a_compiled_model_is_the_model_inside() -> None:
    model = own("llama")
    compiled = torch.compile(model, backend="eager")
    with running(compiled, "0-1,3") as handle:
        assert handle.model is model
        assert torch.equal(compiled.generate(**PROMPT, **GREEDY), plain(model))
        with pytest.raises(PlanError, match="P142"):
            compiled.generate(**PROMPT, **GREEDY, assistant_early_exit=2)


def test_a_plan_bound_while_another_runs_asks_the_model_itself() -> None:
    model = own("llama")
    with running(model, "0-2"):
        later = bind(model, "0,2-3")
    before = face(model)
    with later.running():
        assert torch.equal(plain(model), plain(rewrite(tiny("llama"), plan_of(model, "0,2-3")), **GREEDY))
    assert face(model) == before
