"""Runs that read the KV of an earlier layer as a stock class with a field for it: Gemma 3n and 4."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.api.outlook import outlook_of
from shoal.errors import WriteError
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.models.stacks import find_stack
from shoal.plan import Plan, parse_plan
from shoal.writing.folder import verify, write
from shoal.writing.surgery import blueprint, rewrite

from .families import FAMILIES, VOCAB, tiny
from .shares import every
from .stream_folders import config_of, content, streamed, written

KINDS = ["sliding_attention", "full_attention"] * 3
SIZES: dict[str, dict[str, Any]] = {
    "gemma3n_text": FAMILIES["gemma3n_text"]
    | {"intermediate_size": [64] * 6, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": {
        "head_dim": 8, "global_head_dim": 8, "sliding_window": 6, "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
    },
}  # fmt: skip
PLANS = {"0-3,4@2,5@3": 2, "0-4,5@3": 1, "0-2,3@1,4@2,5@1": 3, "0-1,3,4@0,5@3": 2, "0-3,5@3,4@2,5@3": 3}
"""By plan, how many of its last layers read."""
IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones_like(IDS)
LEFT[1, :4] = 0


@cache
def model_of(family: str, shared: int = 0, **more: Any) -> Any:
    """Six layers, of two kinds in turn; the last `shared` read already."""
    small = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "layer_types": KINDS,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **(small | SIZES[family] | {"num_kv_shared_layers": shared, "layer_types": KINDS} | more)
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def plan_of(model: Any, text: str) -> Plan:
    return parse_plan(text, Plan.identity(inspect(model)))


@torch.no_grad()
def logits(model: Any) -> list[torch.Tensor]:
    """Of one sequence, of a batch that is padded on the left, and what is written past the window."""
    one = model(input_ids=IDS[:1]).logits
    two = model(input_ids=IDS, attention_mask=LEFT).logits[LEFT.bool()]
    return [one, two, model.generate(IDS[:1], max_new_tokens=8, do_sample=False).float()]


@pytest.mark.parametrize("family", SIZES)
def test_what_is_written_computes_what_runs_live(family: str) -> None:
    model = model_of(family)
    before = logits(model)
    for text, readers in PLANS.items():
        plan = plan_of(model, text)
        with running(model, plan):
            live = logits(model)
        made = rewrite(model, plan)
        assert made.config.num_kv_shared_layers == readers
        for found, wanted in zip(logits(made), live, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert not torch.allclose(live[0], before[0], atol=1e-3)
        stack = find_stack(made)
        keys = ["self_attn.k_proj.weight" in stack.layer(slot).state_dict() for slot in range(stack.depth)]
        assert keys == [True] * (stack.depth - readers) + [False] * readers
        seen = outlook_of(model, inspect(model), plan).to_dict()
        if stack.depth == 6:  # a plan's cost does not know that embeddings of each layer go with it
            assert seen["after"]["parameters"] == sum(p.numel() for p in made.parameters())
        assert seen["changed"]["num_kv_shared_layers"] == [0, readers]


@pytest.mark.parametrize("family", every(2, reversed(SIZES)))
def test_it_is_proved(family: str, tmp_path: Path) -> None:
    """Parameters, KV per token and the rows of the cache too; from file to file the same bytes."""
    model = model_of(family)
    model.save_pretrained(tmp_path / "base")
    text = "0-2,3@1,4@2,5@1"
    write(Loaded(model, None, str(tmp_path / "base")), plan_of(model, text), tmp_path / "out", prove=False)
    proof = verify(tmp_path / "out", greedy=(1, 4))
    values = {check.name: check.value for check in proof.checks}
    assert proof.passed and proof.against == "the live plan"
    assert all(values[name] <= 1e-5 for name in ("logits uncached", "logits cached", "logits padded"))
    assert values["KV rows"] == "same" and values["KV per token"] == 3 * 2 * 2 * 8 * 4
    assert streamed(tmp_path / "base", text, tmp_path / "streamed").proof.passed
    written(tmp_path / "base", text, tmp_path / "again")
    assert content(tmp_path / "streamed") == content(tmp_path / "again")
    assert config_of(tmp_path / "streamed") == config_of(tmp_path / "again")


def test_an_adapter_has_nothing_for_what_is_gone(tmp_path: Path) -> None:
    model = model_of("gemma3n_text")
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings)
    adapted.save_pretrained(tmp_path / "lora")
    with running(adapted, plan_of(adapted, "0-4,5@3")), torch.no_grad():
        live = adapted.eval()(input_ids=IDS[:1]).logits
    loaded = Loaded(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), None, str(tmp_path / "base"))
    plan = plan_of(loaded.model, "0-4,5@3")
    out = write(loaded, plan, tmp_path / "out", prove=False, adapter=tmp_path / "lora").folder
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), str(out / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS[:1]).logits, live, atol=1e-5, rtol=0)
    names = load_file(out / "adapter" / "adapter_model.safetensors")
    assert any("4.self_attn.k_proj" in name for name in names)
    assert not any("5.self_attn.k_proj" in name for name in names)


@pytest.mark.parametrize("family", SIZES)
def test_a_base_whose_last_layer_reads_already(family: str) -> None:
    model = model_of(family, shared=1)
    assert blueprint(model, plan_of(model, "0-5")).readers == (), "what the base does is none of the plan's"
    plan = plan_of(model, "0-3,4@2,5")
    made = rewrite(model, plan)
    assert made.config.num_kv_shared_layers == 2
    with running(model, plan):
        live = logits(model)
    for found, wanted in zip(logits(made), live, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "text",
    ["0-1,2@0,3-5", "0-4,5@1", "0-3,4@0,5@3", "0-2,3@1,4-5", "0-3,4@2,5"],
    ids=["not the last", "not the last owner", "one of another", "behind it one of its own", "one before an own"],
)
def test_what_the_field_cannot_say_is_refused(text: str) -> None:
    model = model_of("gemma3n_text")
    with pytest.raises(WriteError, match=r"W203: .*a stock layer uses its own keys and values"):
        blueprint(model, plan_of(model, text))


def test_other_families_and_other_sizes_are_refused() -> None:
    model: Any = tiny("llama")
    with pytest.raises(WriteError, match="W203"):
        blueprint(model, plan_of(model, "0-2,3@2"))
    wide = model_of("gemma4_text", use_double_wide_mlp=True)
    with pytest.raises(WriteError, match="W207: layer 5 in place 5"):
        blueprint(wide, plan_of(wide, "0-4,5@3"))
