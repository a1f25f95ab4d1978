"""One random damage to a sound model folder, each a function (folder, generator) -> what it did."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path, random.Random], str]


class NoPlaceError(Exception):
    """This folder has no place for the damage."""


def _json(place: Path, names: tuple[str, ...], rng: random.Random) -> tuple[Path, Any]:
    there = [place / name for name in names if (place / name).is_file()]
    if not there:
        raise NoPlaceError
    file = rng.choice(there)
    return file, json.loads(file.read_text())


def _said(file: Path, data: Any, what: str) -> str:
    file.write_text(json.dumps(data))
    return f"{file.name}: {what}"


CONFIGS = ("config.json", "config.json", "config.json", "generation_config.json")
WORTHLESS = (None, True, False, "", "x", -1, 0, 1, 2, 3, 5, 7, 1e9, 0.5, [], [0], [0, 1], {}, "full_attention")


def config_key_gone(place: Path, rng: random.Random) -> str:
    """A key of a config is left out."""
    file, data = _json(place, CONFIGS, rng)
    key = rng.choice(sorted(data))
    del data[key]
    return _said(file, data, f"no {key}")


def config_value(place: Path, rng: random.Random) -> str:
    """A key of a config has another value."""
    file, data = _json(place, CONFIGS, rng)
    key, value = rng.choice(sorted(data)), rng.choice(WORTHLESS)
    data[key] = value
    return _said(file, data, f"{key} = {value!r}")


def config_number(place: Path, rng: random.Random) -> str:
    """A number of a config is another one."""
    file, data = _json(place, CONFIGS, rng)
    numbers = sorted(key for key, value in data.items() if type(value) in (int, float))
    if not numbers:
        raise NoPlaceError
    key = rng.choice(numbers)
    data[key] = rng.choice((data[key] + 1, data[key] - 1, data[key] * 2, -data[key], data[key] // 2))
    return _said(file, data, f"{key} = {data[key]}")


def config_list(place: Path, rng: random.Random) -> str:
    """A list of a config has an entry less, more, or another one; or there is one that counts layers."""
    file, data = _json(place, ("config.json",), rng)
    lists = sorted(key for key, value in data.items() if isinstance(value, list))
    key = rng.choice([*lists, "layer_types", "drop_attn_list", "no_split_layers", "mlp_only_layers", "skip_layers"])
    value = list(data.get(key) or [rng.randrange(4) for _ in range(rng.randrange(1, 5))])
    match rng.randrange(4):
        case 0:
            value.pop(rng.randrange(len(value)))
        case 1:
            value.append(rng.choice([*value, 9, None]))
        case 2:
            value[rng.randrange(len(value))] = rng.choice([*WORTHLESS, *value])
        case _:
            rng.shuffle(value)
    data[key] = value
    return _said(file, data, f"{key} = {value!r}")


def _shard(place: Path, rng: random.Random) -> tuple[Path, dict[str, torch.Tensor]]:
    file = rng.choice(sorted(place.glob("*.safetensors")))
    return file, load_file(file)


def _saved(file: Path, tensors: dict[str, torch.Tensor], what: str) -> str:
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file.name}: {what}"


def tensor_gone(place: Path, rng: random.Random) -> str:
    """A tensor is not there."""
    file, tensors = _shard(place, rng)
    name = rng.choice(sorted(tensors))
    del tensors[name]
    return _saved(file, tensors, f"no {name}")


def tensor_renamed(place: Path, rng: random.Random) -> str:
    """A tensor has another name, often that of another layer."""
    file, tensors = _shard(place, rng)
    name = rng.choice(sorted(tensors))
    new = rng.choice((name + "2", name.replace(".1.", ".7."), name.replace(".0.", ".1."), "model." + name, name[:-1]))
    tensors[new] = tensors.pop(name)
    return _saved(file, tensors, f"{name} is {new}")


def tensor_more(place: Path, rng: random.Random) -> str:
    """There is a tensor more: of a layer too many, of an old version, of another head."""
    file, tensors = _shard(place, rng)
    name = rng.choice(sorted(tensors))
    new = rng.choice((name.replace(".1.", ".4."), name + ".old", "pooler.dense.weight", "visual.patch.weight",
                      name.replace("weight", "scales"), "layers.4.eh_proj.weight"))  # fmt: skip
    tensors[new] = tensors[name].clone()
    return _saved(file, tensors, f"{new} beside {name}")


def tensor_reshaped(place: Path, rng: random.Random) -> str:
    """A tensor has another shape."""
    file, tensors = _shard(place, rng)
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    tensors[name] = rng.choice((old[..., :-1], old.flatten(), old[None], torch.cat([old, old]))).contiguous()
    return _saved(file, tensors, f"{name} {list(old.shape)} is {list(tensors[name].shape)}")


def tensor_values(place: Path, rng: random.Random) -> str:
    """A tensor has another dtype or other values."""
    file, tensors = _shard(place, rng)
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    new = rng.choice(("nan", "zero", "float16", "int8", "float64"))
    made = {"nan": old * float("nan"), "zero": old * 0}
    tensors[name] = made[new] if new in made else old.to(getattr(torch, new))
    return _saved(file, tensors, f"{name} {new}")


def file_damaged(place: Path, rng: random.Random) -> str:
    """A file is gone, cut off, empty, garbage, or a folder."""
    file = rng.choice(sorted(path for path in place.iterdir() if path.is_file()))
    data = file.read_bytes()
    match rng.randrange(5):
        case 0:
            file.unlink()
            return f"{file.name} is gone"
        case 1:
            file.write_bytes(data[: rng.randrange(len(data))])
            return f"{file.name} is cut off"
        case 2:
            file.write_bytes(b"")
            return f"{file.name} is empty"
        case 3:
            at = rng.randrange(min(len(data), 400))
            file.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
            return f"{file.name}: byte {at} is another one"
        case _:
            file.unlink()
            file.mkdir()
            return f"{file.name} is a folder"


def file_more(place: Path, rng: random.Random) -> str:
    """A file of another kind lies beside the model."""
    name, text = rng.choice(
        (
            ("pytorch_model.bin", "no pickle"),
            ("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "x"}'),
            ("model_index.json", "{}"),
            (
                "modules.json",
                '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]',
            ),
            ("preprocessor_config.json", "{}"),
            ("model-00009-of-00009.safetensors", "garbage"),
            ("model.safetensors.index.json", '{"metadata": {}, "weight_map": {}}'),
            ("modeling_own.py", "raise SystemExit"),
            ("generation_config.json", '{"max_length": 3, "num_hidden_layers": 9}'),
            ("tokenizer.json", "{}"),
        )
    )
    (place / name).write_text(text)
    return f"{name} is there"


def index_entry(place: Path, rng: random.Random) -> str:
    """An entry of the index of shards is gone, names another file, or is one too many."""
    file, data = _json(place, ("model.safetensors.index.json",), rng)
    entries = data["weight_map"]
    name = rng.choice(sorted(entries))
    match rng.randrange(3):
        case 0:
            del entries[name]
            return _said(file, data, f"no {name}")
        case 1:
            entries[name] = rng.choice([*entries.values(), "nowhere.safetensors", "../x.safetensors", 7])
            return _said(file, data, f"{name} in {entries[name]}")
        case _:
            entries[name + "2"] = entries[name]
            return _said(file, data, f"{name}2 too")


DAMAGES: tuple[Damage, ...] = (
    config_key_gone, config_value, config_value, config_number, config_list, tensor_gone, tensor_renamed, tensor_more,
    tensor_reshaped, tensor_values, file_damaged, file_more, index_entry,
)  # fmt: skip


def damage(place: Path, rng: random.Random) -> str:
    """One damage that the folder has a place for."""
    while True:
        try:
            return rng.choice(DAMAGES)(place, rng)
        except NoPlaceError:
            continue
