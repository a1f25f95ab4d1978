"""Healing by one of several processes, for `torch.multiprocessing`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shoal.api.heal import heal
from shoal.healing.processes import Processes
from shoal.models.load import Loaded

from .families import tiny_of
from .planted import random_data

HOW = {"plan": "0-1,3-4", "length": 16, "held": 3, "tokens": 256, "seed": 3}


def healed(recipe: str, **how: Any) -> Any:
    """Eight steps of two windows, however they are divided."""
    torch.set_num_threads(1)
    loaded = Loaded(tiny_of("llama", 6), None, "tiny")
    return heal(loaded, recipe=recipe, data=random_data(19, 16), watch=random_data(2, 16, seed=1), **HOW, **how)


def process(rank: int, count: int, recipe: str, folder: str, stop_at: int) -> None:
    """One of several processes; each writes what it has."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text()
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return rank == 1 and len(asked) == stop_at

    kept, said = f"{folder}/run", list[str]()
    found = healed(recipe, batch=1, folder=kept, resume=True, stop=stop, save_every=0.0, say=said.append)
    save_file({name: tensor.contiguous() for name, tensor in found.weights.items()}, f"{folder}/{rank}.safetensors")
    about = {"stopped": found.stopped, "tokens": found.tokens, "said": len(said), "asked": found.asked,
             "after": [judged.after.nll for judged in found.texts.values()]}  # fmt: skip
    Path(f"{folder}/{rank}.json").write_text(json.dumps(about))
    Processes.leave()


def refused(rank: int, count: int, folder: str) -> None:
    """What the first process alone finds out stops all of them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text()
    try:
        healed("lora", batch=1, folder=f"{folder}/run")
    except Exception as error:
        Path(f"{folder}/{rank}.txt").write_text(f"{type(error).__name__} {error}")
    Processes.leave()
