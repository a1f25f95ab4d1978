"""A Llama-shaped checkpoint of random bytes in several shards, of any size, written without a model in memory."""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any

MADE = 32 << 20
"""Bytes of noise from which all tensors are cut."""

SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}


def make(folder: Path, size: int, *, shape: str = "1b", finite: bool = False) -> int:
    """Write the checkpoint in shards of about 1 GB (a tenth of it when it is small); returns the number of layers.
    `finite`: small normal numbers in place of any bytes, so that the model can be run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from shoal.models.compat import hide_own_bars

    hide_own_bars()
    facts: dict[str, Any] = {
        "vocab_size": 32_000, **SHAPES[shape], "dtype": "bfloat16",
    }  # fmt: skip
    with torch.device("meta"):
        one, two = ({n: t.shape for n, t in LlamaForCausalLM(LlamaConfig(**facts, num_hidden_layers=d)).state_dict()
                     .items()} for d in (1, 2))  # fmt: skip
    layer = 2 * sum(s.numel() for n, s in two.items() if n not in one)
    depth = max(3, round((size - 2 * sum(s.numel() for s in one.values())) / layer) + 1)
    config = LlamaConfig(**facts, num_hidden_layers=depth)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()}
    write_random(folder, shapes, size // 10 if size < 10**9 else 10**9, _normal() if finite else os.urandom(MADE))
    return depth


def _normal() -> bytes:
    """bfloat16 numbers like those that models begin with."""
    import torch

    drawn = torch.randn(MADE // 2, generator=torch.Generator().manual_seed(0)) * 0.02
    return drawn.bfloat16().view(torch.uint8).numpy().tobytes()


def write_random(folder: Path, shapes: dict[str, tuple[int, ...]], limit: int, noise: bytes) -> None:
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if shards[-1] and held + 2 * prod(shape) > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * prod(shape)
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    turn = 0
    for file, shard in zip(files, shards, strict=True):
        header, place = {}, 0
        for name in shard:
            end = place + 2 * prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [place, end]}
            place = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            while place:  # the same noise from another start each time, so no two tensors are equal
                turn = (turn + 104_730) % (MADE // 2)
                stream.write(noise[turn : turn + min(place, MADE // 2)])
                place -= min(place, MADE // 2)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
