"""A process that loads planned checkpoints as users do, with `import shoal.auto` and the Auto class of transformers.

`python planned_child.py SOURCE` imports Shoal from the folder SOURCE; then each line of its input is a request, the
JSON {"folder", "batch", "answer", "attention", "ends"}, and each line of its output the answer. It has never seen the
model that a folder was written from, so all that it knows comes from the folder.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints


@torch.no_grad()
def uncached(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary] of one pass."""
    found: torch.Tensor = model(**batch, use_cache=False).logits
    return found


@torch.no_grad()
def cached(model: Any, batch: dict[str, torch.Tensor], ends: list[int]) -> torch.Tensor:
    """The same of passes over a `DynamicCache`, which end behind so many tokens."""
    name = "cache_params" if model.config.model_type.startswith("mamba") else "past_key_values"
    past, start, out = DynamicCache(config=model.config), 0, []
    for end in ends:
        part = {"input_ids": batch["input_ids"][:, start:end], "attention_mask": batch["attention_mask"][:, :end]}
        out.append(model(**part, use_cache=True, **{name: past}).logits)
        start = end
    return torch.cat(out, 1)


def in_memory(model: Any) -> int:
    """How many numbers the parameters hold, each storage once."""
    return sum({(p.data_ptr(), p.numel()): p.numel() for p in model.parameters()}.values())


def on_disk(folder: Path, buffers: set[str]) -> int:
    """How many numbers the safetensors files of a folder hold, without those of buffers."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dictionary
                count += 0 if name in buffers else torch.Size(stored.get_slice(name).get_shape()).numel()
    return count


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a loaded checkpoint computes, in the file `answer` of the request, and how much it holds."""
    folder, batch = Path(request["folder"]), load_file(request["batch"])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=request["attention"])
    found = {"uncached": uncached(model, batch), "cached": cached(model, batch, request["ends"])}
    save_file({name: logits.contiguous() for name, logits in found.items()}, request["answer"])
    buffers = {name for name, _ in model.named_buffers()}
    return {"memory": in_memory(model), "disk": on_disk(folder, buffers), "class": type(model).__name__}


def main() -> None:
    """Answer every line; a folder that cannot be loaded gets {"error": ...}."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        for line in sys.stdin:
            try:
                said = answer(json.loads(line))
            except Exception as error:
                said = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
