"""What a run takes from another layer it does not make: no matrix for it is called, kept or counted, no row is stored.

Keys and values, one of the two alone, and attention maps.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints
from shoal.compressing.job import cache_job
from shoal.errors import PlanError
from shoal.live import running
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import check, cost
from shoal.writing.planned_folder import write_planned

from .families import VOCAB, tiny
from .matrix import kv_pair
from .references import CLOSE, shared_kv
from .shares import pairs

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
SHORT = IDS[:, :4]
"""No more than any window."""
FAMILIES = [
    "llama", "qwen3", "gemma3_text", "opt", "mixtral", "olmo2", "cohere2", "stablelm", "starcoder2", "phi", "granite",
    "gpt_oss",
]  # fmt: skip
GONE = {"@": ("k_proj", "v_proj"), "@k": ("k_proj",), "@v": ("v_proj",), "@a": ("q_proj", "k_proj")}
STORED = {"@": 0, "@k": 1, "@v": 1, "@a": 1}
"""Of keys and values, how many of the two the run stores."""


def own(family: str, attention: str = "eager") -> PreTrainedModel:
    return copy.deepcopy(tiny(family, attention))


@torch.no_grad()
def logits(model: Any, **batch: Any) -> torch.Tensor:
    return model(**({"input_ids": IDS, "use_cache": False} | batch)).logits


def text_of(mark: str) -> str:
    return f"0-1,2,3{mark}1"


def of(model: PreTrainedModel, layer: int, names: tuple[str, ...]) -> dict[str, Any]:
    inside = find_stack(model).layer(layer).named_modules()
    return {name: module for name, module in inside if name.endswith(names)}


@pytest.mark.parametrize(("family", "mark"), pairs(4, FAMILIES, GONE))
def test_what_is_taken_is_neither_called_nor_stored_nor_counted(family: str, mark: str, tmp_path: Path) -> None:
    model = own(family)
    spec = open_model(model).spec
    source, taker = kv_pair(spec)
    plan = ",".join(f"{i}{mark}{source}" if i == taker else str(i) for i in range(4))
    gone = of(model, taker, GONE[mark])
    assert len(gone) == len(GONE[mark])
    called: list[str] = []
    for name, module in of(model, taker, ("q_proj", "k_proj", "v_proj")).items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    with running(model, plan):
        cache = DynamicCache(config=model.config)
        want = logits(model, input_ids=SHORT, past_key_values=cache, use_cache=True)
    assert not set(called) & gone.keys() and len(called) == 3 - len(gone)
    held = sum(row.keys.numel() + row.values.numel() for row in cache.layers if row.keys is not None)
    assert held == cost(plan, spec).kv_per_token * SHORT.numel()
    kv = spec.stack().layers[taker].kv
    assert cost("0-3", spec).kv_per_token - cost(plan, spec).kv_per_token == kv.per_token * (2 - STORED[mark]) // 2
    parameters = sum(p.numel() for module in gone.values() for p in module.parameters())
    assert cost("0-3", spec).params - cost(plan, spec).params == parameters > 0
    written = write_planned(model, plan, tmp_path / "m", prove=False)
    assert written.params == cost(plan, spec).params
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    torch.testing.assert_close(logits(loaded, input_ids=SHORT, use_cache=True), want, **CLOSE)


@pytest.mark.parametrize("plan", ["0-2,3@k0@v1", "0,1@k0,2@v0,3@v0@a0", "0,1@v0,2@k1,3@v0", "0,1@a0,2@v1,3@1"])
def test_halves_compose_and_every_cache_gives_the_same(plan: str) -> None:
    model = own("llama")
    if plan.endswith("3@1"):
        with pytest.raises(PlanError, match="layer 3 reads the KV of layer 1, which does not run with KV") as caught:
            running(model, plan).__enter__()
        assert caught.value.code == "P107"
        return
    with running(model, plan):
        want = logits(model)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
            pieces = [
                logits(model, input_ids=IDS[:, a:b], past_key_values=cache, use_cache=True)
                for a, b in ((0, 4), (4, 6), (6, 7), (7, 8), (8, 9))
            ]
            torch.testing.assert_close(torch.cat(pieces, 1), want, **CLOSE)


def test_keys_of_one_and_values_of_another() -> None:
    model = own("llama")
    with running(model, "0-2,3@k1@v1"):
        found = logits(model)
    with running(model, "0-2,3@1"):
        assert torch.equal(found, logits(model))
    for mark, half in (("@k", "k"), ("@v", "v")):
        with running(model, f"0-2,3{mark}1"):
            assert torch.equal(logits(model), shared_kv(model, {"input_ids": IDS}, 1, 3, half))


@pytest.mark.parametrize("mark", [*GONE])
def test_beams_and_cropped_caches(mark: str) -> None:
    model = own("llama")
    asked: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with running(model, text_of(mark)):
        beams = model.generate(IDS, num_beams=3, **asked)
        assert torch.equal(beams, model.generate(IDS, num_beams=3, use_cache=False, **asked))
        cache = DynamicCache(config=model.config)
        logits(model, past_key_values=cache, use_cache=True)
        cache.crop(-3)
        again = logits(model, input_ids=IDS[:, 6:], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(again, logits(model)[:, 6:], **CLOSE)


@pytest.mark.parametrize("mark", ["@", "@k", "@v"])
def test_gradients_under_checkpointing_are_those_without(mark: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = own("llama").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with running(model, text_of(mark)):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert not any(name.rpartition(".")[0].endswith(GONE[mark]) and "layers.3." in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **CLOSE)


def test_an_adapter_that_is_put_on_later_is_left_out_too() -> None:
    model = own("llama")
    with running(model, text_of("@")):
        before = logits(model)
        config = LoraConfig(target_modules=["k_proj"], layers_to_transform=[3], init_lora_weights=False)
        adapted = get_peft_model(model, config)
        assert torch.equal(logits(adapted), before)


def test_own_tensors_of_what_is_not_called_change_nothing() -> None:
    model = own("llama")
    layer = find_stack(model).layer(3).self_attn
    new = {"x.self_attn.k_proj.weight": torch.randn_like(layer.k_proj.weight)}
    with running(model, "0-2,3@1"):
        want = logits(model)
    with running(model, "0-2,3@1:x", new):
        assert torch.equal(logits(model), want)


def test_a_layer_without_positions_reads_no_keys_that_turn() -> None:
    spec = open_model(own("smollm3")).spec
    assert [layer.kv.rotated for layer in spec.stack().layers] == [True, True, False, True]
    for plan in ("0-1,2@1,3", "0-2,3@k2", "0-2,3@a2"):
        assert [(p.code, "turn" in p.message) for p in check(plan, spec)] == [("P108", True)]
    assert check("0-2,3@v2", spec) == [] and check("0-2,3@1", spec) == []


def test_a_latent_state_is_shared_whole_or_not_at_all() -> None:
    spec = open_model(own("deepseek_v3")).spec
    assert check("0-2,3@1", spec) == []
    for mark in ("@k", "@v", "@a"):
        (problem,) = check(f"0-2,3{mark}1", spec)
        assert problem.code == "P109" and "one latent state" in problem.message


@pytest.mark.parametrize("mark", ["@k", "@v", "@a"])
def test_a_compressing_cache_is_refused_beside_half_rows(mark: str) -> None:
    model = own("llama")
    with running(model, text_of(mark)), pytest.raises(PlanError, match=r"layer 3 stores its \w+ alone") as no:
        cache_job(model)
    assert no.value.code == "P161"
