"""Write tiny planned checkpoints with Shoal, and beside each what transformers computes from it under the plan.

Runs in Shoal's environment: python make_folders.py OUT [FAMILY,...] [PLAN,...]. The tests read OUT in vLLM's.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import shoal
from shoal.models.opened import open_model
from shoal.plan import Plan, Shape, cost, parse_plan, shapes_of
from shoal.writing.planned_folder import write_planned

SLIDING = {"layer_types": ["sliding_attention", *["full_attention"] * 3], "sliding_window": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": SLIDING | {"query_pre_attn_scalar": 32},
    "gemma3_text": SLIDING | {"query_pre_attn_scalar": 32},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [0, 1, 1, 1]},
    "phi": {},
    "phi3": {},
    "granite": {"residual_multiplier": 0.7},
    "cohere2": SLIDING,
    "starcoder2": {},
    "stablelm": {},
    "glm4": {},
    "exaone4": {"layer_types": ["full_attention"] * 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS | {"mlp_only_layers": [1], "decoder_sparse_step": 1},
    "gpt_neox": {},
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 128},
}
PLANS = {
    "identity": "0-3",
    "dropped": "0,2-3",
    "parts": "0,1a,2,3m",
    "loop": "0,[1-2]x2,3",
    "tied": "0-1,2=1,3=0",
    "shared-kv": "0-1,2@1,3@1",
    "map": "0,~1-2:m,3,~3:n",
    "reordered": "0,2,1,3",
    "relaxed": "0-1,2=1:x,3",
    "everything": "0,1a,2,2,3m,3@2,~1-2:m,1m",
}
SERVED = "0-9,10a,11m,[12-14]x2,15-27,28=27,29"
"""The plan of the real model (SmolLM2) that is served behind `vllm serve`: parts, a loop, a tied layer."""
TEXTS = ["The tide comes in", "Once upon a time there was a small boat that", "Water boils at"]
HIDDEN, RANK, NEW_TOKENS = 128, 4, 24
PROMPTS = [[(7 * i + 3 * j * j + 11) % 300 + 10 for j in range(9 + 7 * i)] for i in range(3)]


def tiny(family: str):
    """A random model of 4 layers whose heads are wide enough for vLLM's kernels on the CPU."""
    small = {
        "vocab_size": 320, "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 32,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**small, **FAMILIES[family]})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def new_tensors(model) -> dict[str, torch.Tensor]:
    """For all plans: m is a linear map with a limit that some tokens pass, n a small net, x a change of low rank."""
    torch.manual_seed(1)
    layer = next(one for one in model.modules() if type(one).__name__.endswith(("Layer", "Block")))
    linear = [(n, m) for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.dim() == 2]
    made = {
        "m.weight": torch.eye(HIDDEN) + 0.05 * torch.randn(HIDDEN, HIDDEN),
        "m.bias": 0.1 * torch.randn(HIDDEN),
        "m.limit": torch.tensor([12.0]),
        "n.up": 0.1 * torch.randn(HIDDEN, 16),
        "n.down": 0.1 * torch.randn(16, HIDDEN),
        "n.gate": 0.1 * torch.randn(16, HIDDEN),
    }
    for name, one in linear[:2] + linear[-1:]:
        made[f"x.{name}.up"] = 0.1 * torch.randn(one.out_features, RANK)
        made[f"x.{name}.down"] = 0.1 * torch.randn(RANK, one.in_features)
    return made


def real(folder: Path) -> None:
    """SmolLM2 under SERVED, with its tokenizer, and what transformers writes behind TEXTS."""
    loaded = shoal.load("smollm2", dtype="float32")
    plan = parse_plan(SERVED, Plan.identity(loaded.opened.spec))
    shutil.rmtree(folder, ignore_errors=True)
    write_planned(loaded, plan, folder, prove=False)
    prompts = [loaded.tokenizer(text).input_ids for text in TEXTS]
    with shoal.running(loaded.model, plan):
        tokens, _ = greedy(loaded.model, prompts)
    said = {"texts": TEXTS, "prompts": prompts, "tokens": tokens}
    folder.with_suffix(".json").write_text(json.dumps(said))


def greedy(model, prompts=PROMPTS) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Of each prompt 24 likeliest tokens, and the log-probabilities [24, vocabulary] in front of each."""
    tokens, scores = [], {}
    for number, prompt in enumerate(prompts):
        out = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            output_logits=True, return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        scores[str(number)] = torch.stack([torch.log_softmax(one[0].float(), -1) for one in out.logits])
    return tokens, scores


def main() -> None:
    """Write OUT/FAMILY/PLAN and OUT/FAMILY/plain with reference.json and reference.safetensors beside each."""
    out = Path(sys.argv[1])
    families = sys.argv[2].split(",") if len(sys.argv) > 2 else list(FAMILIES)
    plans = sys.argv[3].split(",") if len(sys.argv) > 3 else list(PLANS)
    warnings.simplefilter("ignore")
    for family in families:
        model = tiny(family)
        shutil.rmtree(out / family, ignore_errors=True)
        (out / family).mkdir(parents=True)
        model.save_pretrained(out / family / "plain")
        tokens, scores = greedy(model)
        keep(out / family / "plain", tokens, scores, {"parameters": model.num_parameters(), "rows": 4})
        opened = open_model(model)
        for name in plans:
            try:
                plan = parse_plan(PLANS[name], Plan.identity(opened.spec))
                tensors = new_tensors(model)
                wanted = {one: t for one, t in tensors.items() if f":{one.split('.')[0]}" in PLANS[name]}
                written = write_planned(model, plan, out / family / name, weights=wanted, prove=False)
                with shoal.running(model, plan, wanted):
                    tokens, scores = greedy(model)
            except shoal.ShoalError as error:
                print(family, name, "refused by Shoal:", error, flush=True)
                continue
            priced = cost(plan, opened.spec, Shape(context=8), shapes_of(wanted))  # shorter than a window
            whole = cost(Plan.identity(opened.spec), opened.spec, Shape(context=8))
            said = {"parameters": priced.params, "rows": 4 * priced.kv_elements // whole.kv_elements}
            if written.params != priced.params:
                raise SystemExit(
                    f"{family} {name}: {written.params} parameters on disk, {priced.params} in the plan's cost"
                )
            keep(out / family / name, tokens, scores, said)
        print(family, "written", flush=True)
    if len(sys.argv) < 3:
        real(out / "smollm2")
        print("smollm2 written", flush=True)


def keep(folder: Path, tokens, scores, said) -> None:
    """Beside a folder what is to come out of it."""
    said |= {"prompts": PROMPTS, "tokens": tokens}
    folder.with_suffix(".json").write_text(json.dumps(said))
    save_file(scores, folder.with_suffix(".scores"))


if __name__ == "__main__":
    main()
