"""Every cell of the table of what a step can do: a right one is run and compared, a refused one raises its code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import accelerate
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel, StaticCache

from gguf_files import raw_file
from shoal.deciding.policy import Policy
from shoal.decoding.fast import FastDecoder
from shoal.errors import ShoalError
from shoal.evaluation.layer_major_loss import LayerMajorLoss
from shoal.evaluation.plan_loss import PlanLoss
from shoal.live import running
from shoal.models.gguf_source import open_source
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, parse_plan
from shoal.plan.answers import WAYS, Otherwise, Refused, Right, Way
from shoal.plan.capabilities import Trait, answer, traits
from shoal.speculating.speculator import Speculator
from shoal.writing.gguf_out.copied import slots_of
from shoal.writing.gguf_out.write import copy_file, plan_for
from shoal.writing.surgery import rewrite

from .drafting import weak
from .families import VOCAB, tiny
from .gguf_contents import tensors
from .kinds import kind
from .paged import paged_logits
from .planted import random_data
from .processes import one_process
from .references import CLOSE, by_hand, later_kv, shared_kv, silenced, tied, with_map_of

PLANS: dict[Trait, str] = {
    "layer": "0-1,3",
    "part": "0,1m,2a,3",
    "new tensors": "0,1:x,2-3",
    "tie": "0-1,2=1,3",
    "KV source": "0-1,2@1,3",
    "half KV source": "0-1,2@v1,3",
    "attention map": "0-1,2@a1,3",
    "later source": "0,1@3,2-3",
    "map": "0,~1-2,3",
    "parallel group": "0,(1|2),3",
    "gate": "0-1,2?g/project,3",
    "exit": "0-1,!e?g,2/project,3/project",
    "own head": "0-3,!e=h",
    "repeat": "0,1x2,2-3",
    "other part": "0,1a,1m,2-3",
    "reorder": "0,2,1,3",
}
GATED: dict[Trait, tuple[str, str]] = {
    "layer": ("0-1,2?g/project,3", "0-1,3"),
    "part": ("0,1a?g/project,2-3", "0,2-3"),
    "new tensors": ("0,1:x?g/project,2-3", "0,2-3"),
    "tie": ("0-1,2=1?g/project,3", "0-1,3"),
    "KV source": ("0-1,2@1?g,3", "0-1,3"),
    "half KV source": ("0-1,2@v1?g,3", ""),
    "attention map": ("0-1,2@a1?g,3", ""),
    "later source": ("0,1@3,2?g/project,3", ""),
    "map": ("0,~1-2?g,3", ""),
    "parallel group": ("0,(1?g|2),3", ""),
    "gate": ("0-1,2?g/project,3", "0-1,3"),
    "exit": ("0-1,!e?g,2/project,3/project", "0-1"),
    "own head": ("0-1,2?g/project,3,!e=h", "0-1,3,!e=h"),
    "repeat": ("0,1,1?g/project,2-3", "0-3"),
    "other part": ("0,1a,1m?g,2-3", "0,1a,2-3"),
    "reorder": ("0,2,1?g/project,3", "0,2-3"),
}
"""With a gate at the step, and without the step."""

CELLS = [(trait, way) for trait in get_args(Trait) for way in get_args(Way)]
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
PADDED = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
PADDED["input_ids"][1, :3], PADDED["attention_mask"][1, :3] = 0, 0


class Always(Policy):
    """Runs every gated step, or none; leaves at no exit, or at the first."""

    def __init__(self, plan: Plan, runs: bool) -> None:
        super().__init__(plan)
        self.answer = runs

    def should_run(self, run: Any, forward: Any, hidden: Any) -> bool:
        return self.answer

    def should_exit(self, step: Any, forward: Any, view: Any) -> bool:
        return not self.answer


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    old = find_stack(model).layer(1).mlp.up_proj.weight
    size = old.shape[1]
    return {
        "x.mlp.up_proj.weight": torch.randn(old.shape, generator=generator) * 0.1,
        "map-1-2.weight": torch.eye(size) + 0.1 * torch.randn(size, size, generator=generator),
        "h.keeps": torch.tensor([0.5]),
        "h.reads.1": torch.randn(size, generator=generator) * 0.5,
        "h.logits.0": torch.randn(VOCAB, generator=generator) * 0.3,
        "h.logits.3": torch.randn(VOCAB, generator=generator),
    }


def plan_of(model: PreTrainedModel, text: str) -> Plan:
    return parse_plan(text, Plan.identity(inspect(model)))


@contextmanager
def at_work(model: PreTrainedModel, trait: Trait, text: str | None = None, runs: bool = True) -> Iterator[None]:
    """The plan of a trait runs, with a policy that decides nothing away where one is needed."""
    plan = plan_of(model, text or PLANS[trait])
    decided = "?" in str(plan)
    with running(model, plan, weights_of(model), policy=Always(plan, runs) if decided else None):
        yield


def own() -> PreTrainedModel:
    return copy.deepcopy(tiny("llama", "sdpa"))


@torch.no_grad()
def logits(model: PreTrainedModel, **batch: Any) -> torch.Tensor:
    return model(**({"input_ids": IDS, "use_cache": False} | batch)).logits


def live(trait: Trait, _: Path) -> None:
    model = own()
    with running(model, PLANS[trait], weights_of(model)):
        assert logits(model).isfinite().all()


def with_head(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    weights, heard = weights_of(model), list[torch.Tensor]()

    def noted(call: Any, h: torch.Tensor) -> torch.Tensor:
        for layer in range(4):
            h = call(layer, h)
            heard.append(h)
        return 0.5 * h + weights["h.reads.1"] * heard[1]

    last = by_hand(model, batch, noted).log_softmax(-1)
    first = by_hand(model, batch, lambda call, h: call(0, h)).log_softmax(-1)
    return weights["h.logits.0"] * first + weights["h.logits.3"] * last


def reference(model: PreTrainedModel, trait: Trait) -> torch.Tensor:
    """The logits by stock layers called by hand."""
    weights = weights_of(model)

    def order(*names: Any) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        def chain(call: Any, h: torch.Tensor) -> torch.Tensor:
            for name in names:
                layer = int(str(name)[0])
                silent = {"a": "mlp", "m": "attention"}.get(str(name)[-1])
                with silenced(model, layer, silent) if silent else nullcontext():
                    h = call(layer, h)
            return h

        return chain

    def mapped(call: Any, h: torch.Tensor) -> torch.Tensor:
        return call(3, call(0, h) @ weights["map-1-2.weight"].T)

    def side_by_side(call: Any, h: torch.Tensor) -> torch.Tensor:
        h = call(0, h)
        return call(3, call(1, h) + call(2, h) - h)

    batch = {"input_ids": IDS}
    eager = copy.deepcopy(tiny("llama", "eager"))
    references: dict[str, Callable[[], torch.Tensor]] = {
        "own head": lambda: with_head(model, batch),
        "KV source": lambda: shared_kv(model, batch, 1, 2),
        "half KV source": lambda: shared_kv(model, batch, 1, 2, "v"),
        "attention map": lambda: with_map_of(eager, batch, 1, 2),
        "later source": lambda: later_kv(eager, batch, 3, 1),
    }
    if trait in references:
        return references[trait]()
    if trait == "tie":
        with tied(model, 2, 1):
            return logits(model)
    if trait == "new tensors":
        name = f"{find_stack(model).path}.1.mlp.up_proj.weight"
        with torch.no_grad():
            return functional_call(
                model, {name: weights["x.mlp.up_proj.weight"]}, (), batch | {"use_cache": False}
            ).logits
    orders: dict[str, tuple[Any, ...]] = {
        "layer": (0, 1, 3), "part": (0, "1m", "2a", 3), "gate": (0, 1, 2, 3), "exit": (0, 1, 2, 3),
        "repeat": (0, 1, 1, 2, 3), "other part": (0, "1a", "1m", 2, 3), "reorder": (0, 2, 1, 3),
    }  # fmt: skip
    chains = {"map": mapped, "parallel group": side_by_side}
    return by_hand(model, batch, order(*orders[trait]) if trait in orders else chains[trait])


def uncached(trait: Trait, _: Path) -> None:
    model = own()
    want = reference(model, trait)
    with at_work(model, trait):
        torch.testing.assert_close(logits(model), want, **CLOSE)


def over(trait: Trait, make: Callable[[Any], Any]) -> None:
    model = own()
    with at_work(model, trait):
        want, cache, pieces = logits(model), make(model.config), []
        for start, end in ((0, 4), *((i, i + 1) for i in range(4, 9))):
            pieces.append(logits(model, input_ids=IDS[:, start:end], past_key_values=cache, use_cache=True))
        torch.testing.assert_close(torch.cat(pieces, 1), want, **CLOSE)


def cached(trait: Trait, _: Path) -> None:
    over(trait, lambda config: DynamicCache(config=config))


def static_cache(trait: Trait, _: Path) -> None:
    over(trait, lambda config: StaticCache(config=config, max_cache_len=12))


def padded(trait: Trait, _: Path) -> None:
    model = own()
    with at_work(model, trait):
        both, alone = logits(model, **PADDED), logits(model, input_ids=IDS[1:, 3:])
    torch.testing.assert_close(both[1, 3:], alone[0], **CLOSE)


def checkpointed(trait: Trait, _: Path) -> None:
    model = own().train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with at_work(model, trait):
        plain = gradients()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        again = gradients()
    assert plain.keys() == again.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


def offloaded(trait: Trait, _: Path) -> None:
    base, model = own(), own()
    weights = weights_of(base)
    model = accelerate.cpu_offload(model, torch.device("cpu"))
    plan = plan_of(base, PLANS[trait])
    decided = "?" in str(plan)
    with running(model, plan, weights, policy=Always(plan, True) if decided else None):
        found = logits(model)
    with at_work(base, trait):
        assert torch.equal(found, logits(base))


def sharded(trait: Trait, _: Path) -> None:
    base, model = own(), own()
    with one_process() as mesh:
        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=mesh)
        with at_work(model, trait), at_work(base, trait):
            assert torch.equal(logits(model), logits(base))


def beside_encoder(trait: Trait, _: Path) -> None:
    model = copy.deepcopy(kind("bart"))
    weights: dict[str, torch.Tensor] = {}
    if trait in ("new tensors", "map"):
        old = find_stack(model, "decoder").layer(1).fc1.weight
        weights = {"x.fc1.weight": old.detach() * 0.5, "map-1-2.weight": torch.eye(old.shape[1]) * 0.9}
    elif trait == "own head":
        weights = {"h.keeps": torch.tensor([0.5]), "h.reads.1": torch.full((model.config.d_model,), 0.5)}
    plan = plan_of(model, "decoder: " + PLANS[trait])
    policy = Always(plan, True) if "?" in PLANS[trait] else None
    text = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}
    with running(model, plan, weights, policy=policy), torch.no_grad():
        want = model(**text, use_cache=False).logits
        first = model(input_ids=IDS, decoder_input_ids=IDS[:, :3], use_cache=True)
        rest = {"encoder_outputs": (first.encoder_last_hidden_state,), "past_key_values": first.past_key_values}
        second = model(decoder_input_ids=IDS[:, 3:6], use_cache=True, **rest)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), want, **CLOSE)


def paged(trait: Trait, _: Path) -> None:
    model = own()
    with at_work(model, trait):
        found = paged_logits(model, PADDED, [5, 7, 9])
        seen = PADDED["attention_mask"].bool()
        torch.testing.assert_close(found[seen], logits(model, **PADDED)[seen], **CLOSE)


def gated(trait: Trait, _: Path) -> None:
    model, (text, without) = own(), GATED[trait]
    with at_work(model, trait, text):
        ran = logits(model)
    with at_work(model, trait, text, runs=False):
        skipped = logits(model)
    bare = text.replace("?g", "").replace("/project", "").replace("!e,", "")
    with at_work(model, trait, bare):
        torch.testing.assert_close(ran, logits(model), atol=1e-6, rtol=1e-6)
    with at_work(model, trait, without):
        torch.testing.assert_close(skipped, logits(model), atol=1e-6, rtol=1e-6)


def drafted(trait: Trait, _: Path) -> None:
    model, ids = weak("llama"), IDS[:1]
    greedy: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    made = Speculator(model, f"skip:{PLANS[trait]}", length=3, confidence=None)
    assert torch.equal(made.generate(ids, **greedy), model.generate(ids, **greedy))
    assert made.stats.drafted > 0


def fast(trait: Trait, _: Path) -> None:
    model = own()
    greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with at_work(model, trait):
        want = model.generate(IDS, **greedy)
        found = FastDecoder(model, mode="off").generate(IDS, **greedy)
    assert torch.equal(found, want)


def takes(trait: Trait, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the loss is computed layer by layer; where it is, it was compared with the running plan."""
    monkeypatch.setattr("shoal.evaluation.layer_major_loss.is_streamed", lambda _: True)
    model = own()
    loss = LayerMajorLoss(PlanLoss(model, random_data(3, 12), batch=2))
    return loss.takes([plan_of(model, PLANS[trait])])


def written(trait: Trait, _: Path) -> None:
    model = own()
    plan = plan_of(model, PLANS[trait])
    made = rewrite(model, plan, weights=weights_of(model), zero_parts=trait == "other part")
    with at_work(model, trait):
        torch.testing.assert_close(logits(made), logits(model), **CLOSE)


def gguf(trait: Trait, folder: Path) -> None:
    text = PLANS[trait]
    slots_of(plan_of(own(), text))
    base, out = raw_file(folder / "base.gguf"), folder / "out.gguf"
    copy_file(open_source(base), plan_for(open_source(base), text, str(base))[0], out)
    before, after = tensors(base), tensors(out)
    for slot, layer in enumerate(parse_plan(text, plan_of(own(), "0")).layers()):
        assert after[f"blk.{slot}.attn_q.weight"] == before[f"blk.{layer}.attn_q.weight"]


RUNNERS: dict[str, Callable[[Trait, Path], None]] = {
    "live": live, "uncached": uncached, "cached": cached, "static_cache": static_cache, "padded": padded,
    "checkpointed": checkpointed, "offloaded": offloaded, "sharded": sharded, "beside_encoder": beside_encoder,
    "paged": paged, "gated": gated, "drafted": drafted, "fast": fast, "written": written, "gguf": gguf,
}  # fmt: skip


@pytest.mark.parametrize(("trait", "way"), CELLS, ids=[f"{way} {trait}" for trait, way in CELLS])
def test_a_cell_of_the_table_is_what_it_says(
    trait: Trait, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answer(trait, way)
    if way == "streamed":
        assert takes(trait, monkeypatch) == isinstance(found, Right)
        return
    if isinstance(found, Refused):
        with pytest.raises(ShoalError) as caught:
            RUNNERS[way](trait, tmp_path)
        assert caught.value.code == found.code
        constant = [piece.partition("}")[2] for piece in ("}" + found.sentence).split("{")]
        assert [text for text in constant if text not in str(caught.value)] == []
        return
    assert not isinstance(found, Otherwise)
    RUNNERS[way](trait, tmp_path)


def test_the_plans_of_this_test_have_their_trait_and_no_other_refused_one() -> None:
    assert set(PLANS) == set(GATED) == set(get_args(Trait)) and set(WAYS) == set(get_args(Way))
    model = tiny("llama")
    for trait, text in PLANS.items():
        there = {found for found, _, _ in traits(plan_of(model, text).steps())}
        beside = {"layer", "part", "gate"} if trait == "exit" else {"layer", "part"}  # a fill needs an exit before it
        assert there - beside == {trait} - beside, text
