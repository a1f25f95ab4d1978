"""Ten steps in which a replaced layer, a map and a LoRA learn, by one process or by each of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import shoal
from shoal.live import Running

from .families import VOCAB
from .live_models import own

PLAN, ROWS, STEPS = "0,1:heal,~2-2:y,3", 4, 10


def student() -> tuple[Any, Running]:
    """The model with its adapters, and the plan on it. What runs learns, and nothing of the base."""
    model = own("llama")
    handle = shoal.apply(model, PLAN, {"y.weight": torch.eye(32) * 1.1}, modules=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        beside = ".shoal." in name and ".base_layer." not in name
        parameter.requires_grad_(beside or ("lora_" in name and ".layers.1." not in name and ".layers.2." not in name))
    return adapted, handle


def trained(how: str, rank: int, processes: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    """What learned before and after the steps, and the names of those that are spread over the processes."""
    torch.set_num_threads(1)
    adapted, handle = student()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    called: Any = adapted
    if how == "ddp":
        called = DistributedDataParallel(adapted)
    if how == "fsdp":
        with handle.paused():
            for layer in [*handle.model.model.layers, *handle.layers.values(), handle.model]:
                fully_shard(layer)
    learning = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learning, lr=0.1, momentum=0.5)
    ids = torch.randint(3, VOCAB, (STEPS, ROWS, 9), generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        batch = ids[step].chunk(processes)[rank]
        with handle.paused(), adapted.disable_adapter(), torch.no_grad():
            told = adapted(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        out = called(input_ids=batch, labels=batch, use_cache=False)
        distance = nn.functional.kl_div(out.logits.log_softmax(-1), told, log_target=True, reduction="none")
        (out.loss + distance.sum(-1).mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
    spread = [name for name, p in adapted.named_parameters() if name in before and isinstance(p, DTensor)]
    after = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in adapted.named_parameters() if n in before}
    return before, {name: tensor.detach().clone() for name, tensor in after.items()}, spread


def process(rank: int, processes: int, how: str, folder: str) -> None:
    """One of several: the first writes what it has learned."""
    store = dist.FileStore(f"{folder}/store-{how}", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    try:
        _, after, spread = trained(how, rank, processes)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        save_file(after, f"{folder}/{how}.safetensors")
        Path(f"{folder}/{how}.json").write_text(json.dumps(spread))
