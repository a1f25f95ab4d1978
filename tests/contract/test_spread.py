"""Plans on models that several processes share: DDP, FSDP2 and, refused, DataParallel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing, nn
from torch.distributed.fsdp import fully_shard

import shoal
from shoal.errors import PlanError
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack

from .families import tiny
from .live_models import code_of, logits, own, plan_of
from .processes import one_process
from .spread import process, trained

CLOSE = 1e-5
"""Of tensors after ten steps."""


def other(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"x.{n}": t.detach() * 1.3 for n, t in tiny("llama").model.layers[1].named_parameters()}


def shard(model: nn.Module, mesh: object) -> None:
    for layer in [*find_stack(model).layers, model]:
        fully_shard(layer, mesh=mesh)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_a_sharded_model_is_the_model_that_it_was(family: str) -> None:
    base, model = own(family), own(family)
    plan = plan_of(base, "0-1,3")
    with shoal.running(base, plan):
        want = logits(base)
    with one_process() as mesh:
        shard(model, mesh)
        assert inspect(model) == inspect(base)
        with shoal.running(model, plan):
            assert torch.equal(logits(model), want)
        assert inspect(model) == inspect(base), "gathered parameters count as they did"


def test_a_replaced_layer_of_a_sharded_model_is_refused() -> None:
    model = own("llama")
    weights = other(model)
    with one_process() as mesh:
        shard(model, mesh)
        assert code_of(model, "0,1:x,2-3", weights) == "P153"
        with pytest.raises(PlanError) as caught:
            shoal.apply(model, "0,1:x,2-3", weights, modules=True)
        assert caught.value.code == "P153"


@pytest.mark.parametrize("ran", [False, True])
def test_so_is_one_that_is_sharded_while_its_plan_is_there(ran: bool) -> None:
    model = own("llama")
    with one_process() as mesh, shoal.running(model, "0,1:x,2-3", other(model)) as handle:
        if ran:
            logits(model)
        with handle.paused():
            shard(model, mesh)
        with pytest.raises(PlanError) as caught:
            logits(model)
        assert caught.value.code == "P153"


def test_one_process_that_shards_learns_what_one_that_does_not_learns() -> None:
    before, plain, spread = trained("one", 0, 1)
    assert spread == []
    assert all(not torch.equal(before[name], tensor) for name, tensor in plain.items())
    assert {name.split(".")[2] for name in plain} == {"model", "shoal"}
    with one_process():
        _, sharded, spread = trained("fsdp", 0, 1)
    assert sorted(spread) == sorted(plain)
    for name, tensor in plain.items():
        torch.testing.assert_close(sharded[name], tensor, atol=CLOSE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(how: str, tmp_path: Path) -> None:
    before, plain, _ = trained("one", 0, 1)
    multiprocessing.start_processes(process, (2, how, str(tmp_path)), nprocs=2, start_method="spawn")
    found = load_file(tmp_path / f"{how}.safetensors")
    assert sorted(found) == sorted(plain)
    worst = max(float((found[name] - tensor).abs().max()) for name, tensor in plain.items())
    assert worst < CLOSE
    assert all(not torch.equal(before[name], tensor) for name, tensor in found.items())
    assert sorted(json.loads((tmp_path / f"{how}.json").read_text())) == (sorted(plain) if how == "fsdp" else [])


def test_data_parallel_is_refused() -> None:
    """Its threads would all run the layers of the first device."""
    model = own("llama")
    with shoal.running(model, "0-1,3") as handle:
        with pytest.raises(PlanError, match="torchrun") as caught:
            replicas(model)
        assert caught.value.code == "P155"
        with handle.paused():
            replicas(model)
    replicas(model)


def replicas(model: nn.Module) -> list[nn.Module]:
    """What torch's `replicate` makes for each device before it hands out parameters."""
    return [module._replicate_for_data_parallel() for module in model.modules()]
