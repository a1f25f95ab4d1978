"""Layers that read a layer that runs later: passes over the new tokens make what token by token makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from shoal.errors import UsageError
from shoal.evaluation.plan_loss import PlanLoss
from shoal.evaluation.scoring import sequence_nll
from shoal.executing import tokens_before
from shoal.executing.bind import bind
from shoal.executing.later import Passes
from shoal.executing.recorder import Recorder, RunRecord
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan
from shoal.plan.later import later_sources
from shoal.plan.moved import moved
from shoal.plan.prefix import prefixes
from shoal.plan.sources import LayerKV
from shoal.transforms.share_kv import share_kv

from .families import VOCAB, tiny
from .live_models import own
from .matrix import kv_pair
from .planted import random_data
from .references import CLOSE, later_kv
from .shares import every

IDS = torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(5))
PADDED = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
PADDED["input_ids"][1, :3], PADDED["attention_mask"][1, :3] = 0, 0
REAL = PADDED["attention_mask"].bool()
CAUSAL = [
    "llama", "qwen3", "gpt2", "opt", "mixtral", "qwen2", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox",
    "gpt_oss", "smollm3", "olmo2", "granite", "cohere2", "stablelm", "phi", "starcoder2", "llama4_text", "deepseek_v3",
    "qwen2_moe", "qwen3_moe",
]  # fmt: skip
EAGER = ("gemma2", "gpt_oss")
LCKV = "0,1-2@3,3"
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def plan_of(model: PreTrainedModel) -> str:
    reader, source = kv_pair(open_model(model).spec)
    return ",".join(f"{i}@{source}" if i == reader else str(i) for i in range(4))


def pieces(model: PreTrainedModel, cache: Any, cuts: Any) -> torch.Tensor:
    """Logits of a padded batch over a cache, up to each cut at a time."""
    found, start = [], 0
    for end in cuts:
        ids, mask = PADDED["input_ids"][:, start:end], PADDED["attention_mask"][:, :end]
        found.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        start = end
    return torch.cat(found, 1)


def dynamic(model: PreTrainedModel) -> Any:
    return DynamicCache(config=model.config)


def static(model: PreTrainedModel) -> Any:
    return StaticCache(config=model.config, max_cache_len=14)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", every(2, CAUSAL))
def test_passes_make_what_token_by_token_makes(family: str) -> None:
    model = own(family, "eager" if family in EAGER else "sdpa")
    with running(model, plan_of(model)) as handle:
        tokens = pieces(model, dynamic(model), range(1, 11))[REAL]
        assert handle.passes == Passes(1, 1, exact=True)
        whole = model(**PADDED, use_cache=False).logits
        assert handle.passes is not None and handle.passes.exact and 1 < handle.passes.ran <= 10
        torch.testing.assert_close(whole[REAL], tokens, **EXACT)
        for make in (dynamic, static):
            torch.testing.assert_close(pieces(model, make(model), (6, 8, 9, 10))[REAL], tokens, **EXACT)
        where = torch.arange(7)[None]
        alone = model(IDS[1:, 3:], position_ids=where + 3, use_cache=False).logits  # learned positions count from 0
        torch.testing.assert_close(whole[1, 3:], alone[0], **EXACT)


@pytest.mark.parametrize("family", every(5, CAUSAL))
def test_greedy_tokens_are_those_of_single_forwards(family: str) -> None:
    model = own(family, "eager" if family in EAGER else "sdpa")
    with running(model, plan_of(model)):
        asked = {"max_new_tokens": 6, "do_sample": False}
        written = model.generate(**PADDED, **asked)
        assert torch.equal(written, model.generate(**PADDED, **asked, cache_implementation="static"))
        cache, ids, mask = dynamic(model), PADDED["input_ids"], PADDED["attention_mask"]
        for at in range(15):
            step = {"attention_mask": mask[:, : at + 1], "past_key_values": cache}
            logits = model(input_ids=ids[:, at : at + 1], use_cache=True, **step).logits
            if at >= 9:
                ids = torch.cat([ids, logits.argmax(-1)], 1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(ids, written)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("plan", ["0@3,1-3", "0,1@2,2-3"])
def test_it_is_what_stock_layers_called_by_hand_make(plan: str, attention: str) -> None:
    model = own("llama", attention)
    ((_, run, source),) = later_sources(parse_plan(plan, Plan.identity(open_model(model).spec)).steps())
    want = later_kv(tiny("llama", "eager"), PADDED, source.layer, run.layer)
    with running(model, plan):
        torch.testing.assert_close(model(**PADDED).logits[REAL], want[REAL], **CLOSE)


def test_the_first_token_gets_nothing_from_attentions_that_read_upwards() -> None:
    model = own("llama")
    added: list[torch.Tensor] = []
    attention: Any = find_stack(model).layer(1).self_attn
    with running(model, LCKV):
        attention.register_forward_hook(lambda _, __, out: added.append(out[0]))
        model(IDS[:, :1])
        model(**PADDED)
    assert not added[0].any()
    assert not added[-1][0, 0].any() and not added[-1][1, :4].any()
    assert added[-1][0, 1:].abs().amin(0).any() and added[-1][1, 4:].any(-1).all()


def test_a_mask_that_shows_the_token_itself_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: without the masked diagonal the second of two tokens sees what its own source made in the pass before,
    which token by token is not there yet."""
    model, before = own("llama"), tokens_before._before

    def planted(mask: Any, query: Any, key: Any, seen: Any) -> Any:
        return before(mask, query, key, tokens_before.Seen(seen.states, seen.begin + 1, seen.new))

    with running(model, LCKV):
        right = pieces(model, dynamic(model), range(1, 11))
        monkeypatch.setattr(tokens_before, "_before", planted)
        wrong = model(**PADDED, use_cache=False).logits
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong[REAL], right[REAL], atol=1e-2, rtol=1e-2)


def test_fewer_passes_are_an_approximate_prefill_that_says_so() -> None:
    model = own("llama")
    with running(model, LCKV) as handle:
        want = model(**PADDED).logits
        assert handle.passes == Passes(10, 10, exact=True)
    errors = []
    for count in (1, 2, 4, 7, 9, 10, 50):
        with running(model, LCKV, passes=count) as handle:
            assert handle.passes is None
            found = model(**PADDED).logits
            assert handle.passes == Passes(min(count, 10), 10, exact=count >= 10)
            errors.append((found - want)[REAL].abs().max().item())
            # as many tokens are right as passes were made
            torch.testing.assert_close(found[0, :count], want[0, :count], **EXACT)
            cache = dynamic(model)
            assert torch.equal(pieces(model, cache, (10,)), found)
            assert cache.get_seq_length() == 10
    assert errors[0] > 0.1 and errors[-2:] == [0.0, 0.0]
    assert errors[2] < errors[0] and errors[3] < errors[2] and errors[4] < errors[3]


def test_a_pass_that_changes_nothing_is_the_last() -> None:
    """Where the source itself depends on no reader, two passes find out that one was enough."""
    model = own("llama")
    with running(model, "0,2,1@3,3") as handle:
        model(**PADDED)
        assert handle.passes is not None and handle.passes.ran == 10
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        find_stack(model).layer(1).get_submodule(part).weight.data.zero_()
    with running(model, "0,2,1@3,3") as handle:
        model(**PADDED)
    assert handle.passes == Passes(2, 10, exact=True)


def test_two_of_four_rows_are_left() -> None:
    model = own("llama")
    with running(model, LCKV):
        for cache in (dynamic(model), static(model)):
            pieces(model, cache, (6, 10))
            assert [row.keys is not None for row in cache.layers] == [True, True]
        beams = model.generate(**PADDED, max_new_tokens=4, num_beams=2, do_sample=False)
        same = model.generate(**PADDED, max_new_tokens=4, num_beams=2, do_sample=False, use_cache=False)
        assert torch.equal(beams, same)
        cropped = dynamic(model)
        pieces(model, cropped, (10,))
        cropped.crop(-4)
        again = model(IDS[:, 6:], attention_mask=PADDED["attention_mask"], past_key_values=cropped).logits
        torch.testing.assert_close(again[REAL[:, 6:]], model(**PADDED).logits[:, 6:][REAL[:, 6:]], **EXACT)
    spec = open_model(model).spec
    assert cost(LCKV, spec).kv_per_token == 2 * cost("0", spec).kv_per_token
    assert cost(LCKV, spec).params == cost("0,1-2@0,3", spec).params < cost("0-3", spec).params
    assert cost(LCKV, spec).decode_flops == cost("0,1-2@0,3", spec).decode_flops
    assert moved(LCKV, spec).kv == moved("0,1-2@0,3", spec).kv


def test_readers_in_groups_parts_loops_and_two_sources() -> None:
    """Plans that are odd and legal: each is what token by token makes."""
    model = own("llama")
    for plan in (
        "0,(1@3|2),3", "0,1a@3,1m,2-3", "0@1,1,2@3,3", "0,1@3,3,2,3", "0@2,2,1@2,3", "0,1@1,1", "3,0@1,2@3,1",
        "0,1@2,2,3@v2+",
    ):  # fmt: skip
        with running(model, plan):
            tokens = pieces(model, dynamic(model), range(1, 11))
            torch.testing.assert_close(model(**PADDED).logits[REAL], tokens[REAL], **EXACT)
            torch.testing.assert_close(pieces(model, static(model), (5, 10))[REAL], tokens[REAL], **EXACT)


def test_a_source_whose_values_another_layers_are_added_to() -> None:
    """`1@3` alone of `0,1@3,2,3@v0+` may not make what it makes without `@v0+`."""
    model = own("llama")
    with running(model, "0,1@3,2,3"):
        without = model(**PADDED).logits[REAL]
    with running(model, "0,1@3,2,3@v0+"):
        tokens = pieces(model, dynamic(model), range(1, 11))[REAL]
        torch.testing.assert_close(model(**PADDED).logits[REAL], tokens, **EXACT)
        for make in (dynamic, static):
            torch.testing.assert_close(pieces(model, make(model), (5, 10))[REAL], tokens, **EXACT)
    assert (tokens - without).abs().max() > 0.01


def test_a_source_that_runs_before_and_behind_is_the_earlier_one() -> None:
    model = own("llama")
    steps = parse_plan("0,3,1@3,3,2@3", Plan.identity(open_model(model).spec)).steps()
    assert list(later_sources(steps)) == []
    ((position, run, source),) = later_sources(steps[2:])
    assert (position, run.layer, source) == (0, 1, LayerKV(3))
    with running(model, "0,3,1@3,3,2@3") as handle:
        model(**PADDED)
        assert handle.passes is None


@pytest.mark.parametrize("family", ["jamba", "nemotron_h"])
def test_recurrent_layers_begin_each_pass_where_the_forward_began(family: str) -> None:
    model = own(family)
    with running(model, plan_of(model)):
        whole = model(IDS, use_cache=False).logits
        cache, found = dynamic(model), []
        for start, end in ((0, 6), *((at, at + 1) for at in range(6, 10))):
            found.append(model(IDS[:, start:end], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, **EXACT)


@torch.enable_grad()
def test_gradients_go_through_all_passes() -> None:
    """Of the keys of the source, by finite differences."""
    model = own("llama").double()
    weight = find_stack(model).layer(3).get_submodule("self_attn.k_proj").weight
    turn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten())

    with running(model, LCKV):
        loss().backward()
        want = (weight.grad * turn).sum()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        weight.data += 1e-3 * turn  # no less: norms compute in float32
        above = loss()
        weight.data -= 2e-3 * turn
        found = (above - loss()) / 2e-3
    assert want.abs() > 1e-2
    torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-8)
    assert find_stack(model).layer(1).get_submodule("self_attn.k_proj").weight.grad is None


def test_a_recorder_hears_the_last_pass_alone() -> None:
    class Heard(Recorder):
        def __init__(self) -> None:
            self.layers: list[int] = []
            self.entered: list[int] = []
            self.last: Any = None

        def enters(self, layer: int, hidden: torch.Tensor) -> None:
            self.entered.append(layer)

        def ran(self, record: RunRecord) -> None:
            self.layers.append(record.run.layer)
            self.last = record.output

        def leaves(self, hidden: torch.Tensor) -> None:
            assert hidden is self.last

    model, heard = own("llama"), Heard()
    with running(model, LCKV) as handle:
        want = pieces(model, dynamic(model), (6, 10))
        with handle.bound.executor().recording(heard):
            assert torch.equal(pieces(model, dynamic(model), (6, 10)), want)
    assert heard.layers == heard.entered == [0, 1, 2, 3] * 2


def test_a_compiled_forward_leaves_the_passes_to_python() -> None:
    """As transformers compiles the decode step over a cache of fixed length on accelerators."""
    model = own("llama")
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    asked = {"max_new_tokens": 5, "do_sample": False}
    with running(model, LCKV):
        want = model.generate(IDS, **asked)
        found = model.generate(IDS, **asked, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, want)


def test_losses_of_plans_with_later_sources_share_no_prefix() -> None:
    model, data = own("llama"), random_data(3, 12)
    base = Plan.identity(open_model(model).spec)
    plans = [parse_plan(text, base) for text in (LCKV, "0,1-2@3,3a", "0-3")]
    assert prefixes(plans[0]) == {} and prefixes(plans[2])
    loss = PlanLoss(model, data)
    for plan in plans:
        with bind(model, plan).running():
            nll = sequence_nll(model, data)
        assert loss(plan) == sum(total for total, _ in nll) / sum(count for _, count in nll)


def test_readers_that_are_filled_from_the_last_layer_are_a_transform() -> None:
    model = own("llama")
    plan = Plan.identity(open_model(model).spec)
    job = Job(model, random_data(3, 12), plan)
    made = share_kv(job, pattern="later", readers=2, how="first")
    assert str(made.plan) == "0,1@3,2@3,3"
    assert str(share_kv(job, pairs="3-1-2", how="first").plan) == str(made.plan)
    mean = share_kv(job, pattern="later", readers=2, how="average")
    for name in ("k_proj", "v_proj"):
        three = [find_stack(model).layer(i).get_submodule(f"self_attn.{name}").weight for i in (1, 2, 3)]
        (found,) = (tensor for key, tensor in mean.weights.items() if key.endswith(f"{name}.weight"))
        torch.testing.assert_close(found, sum(three) / 3)
    with running(model, mean.plan, mean.weights) as handle:
        assert model(IDS).logits.isfinite().all() and handle.passes == Passes(10, 10, exact=True)
    with pytest.raises(UsageError, match="layer 3 runs later than layer 1") as no:
        share_kv(job, pairs="3-1-2")
    assert no.value.code == "U681"
