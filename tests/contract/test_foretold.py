"""Neurons that are foretold to be nothing (after LCCL): identities, counts, planted matrices, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import shoal
from shoal.errors import ShoalError
from shoal.models.opened import open_model
from shoal.reuse.foretell import fit_foretold
from shoal.reuse.foretold import Foretold, leaving_out
from shoal.reuse.neurons import neuron_mlps, silencers

from .families import tiny, tiny_of
from .planted import random_data
from .shares import every

DATA = random_data(4, 16)
FULL = 32
"""The rank of a matrix [64, 32]."""


def logits(model: PreTrainedModel, foretold: Foretold | None = None, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = random_data(2, 9, seed=3).ids if ids is None else ids
    with torch.no_grad():
        if foretold is None:
            return model(input_ids=ids, use_cache=False).logits
        with leaving_out(model, foretold):
            return model(input_ids=ids, use_cache=False).logits


def relu(layers: int = 4) -> PreTrainedModel:
    """OPT has ReLU between two matrices with biases, without a module around them."""
    model = copy.deepcopy(tiny_of("opt", layers))
    for name, parameter in model.named_parameters():
        if name.endswith(("fc1.bias", "fc2.bias")):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("family", every(2, ["llama", "gpt2", "opt", "qwen2", "gemma3_text", "phi"]))
def test_a_threshold_that_keeps_all_is_the_dense_model_bit_for_bit(family: str) -> None:
    model = tiny(family)
    foretold = fit_foretold(model, DATA, rank=4, threshold=-math.inf)
    wanted = logits(model)
    state = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with torch.no_grad(), leaving_out(model, foretold) as trace:
        found = model(input_ids=random_data(2, 9, seed=3).ids, use_cache=False).logits
    assert torch.equal(found, wanted)
    assert trace.kept == trace.computed == trace.total == 18 * 4 * 64
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == state


def test_with_relu_and_all_of_the_matrix_nothing_is_lost_and_the_zeros_are_what_is_left_out() -> None:
    model = relu()
    foretold = fit_foretold(model, DATA, rank=FULL)
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, args: Any) -> None:
        seen.append(args[0])

    hooks = [layer.fc2.register_forward_pre_hook(note) for layer in model.model.decoder.layers]
    wanted = logits(model)
    zeros = sum(int((neurons == 0).sum()) for neurons in seen)
    seen.clear()
    with torch.no_grad(), leaving_out(model, foretold) as trace:
        found = model(input_ids=random_data(2, 9, seed=3).ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert torch.allclose(found, wanted, atol=1e-5)
    assert 0.2 * trace.total < zeros == trace.total - trace.kept
    assert trace.computed == sum(neurons.numel() for neurons in seen) < trace.total


def test_one_token_at_a_time_computes_what_it_keeps_and_answers_the_same() -> None:
    model = relu()
    foretold = fit_foretold(model, DATA, rank=FULL)
    ids, given = random_data(1, 8, seed=4).ids, []
    hook = model.model.decoder.layers[1].fc1.register_forward_hook(lambda _, __, out: given.append(out.shape[-1]))
    whole = logits(model, foretold, ids)
    given.clear()
    cache, one_by_one = None, []
    with torch.no_grad(), leaving_out(model, foretold) as trace:
        for column in range(ids.shape[1]):
            out = model(input_ids=ids[:, column : column + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            one_by_one.append(out.logits)
    hook.remove()
    assert torch.allclose(torch.cat(one_by_one, 1), whole, atol=1e-4)
    assert trace.computed == trace.kept < 0.8 * trace.total
    assert all(width < 64 for width in given) and len(given) == 8


def test_neighbours_do_not_change_an_answer() -> None:
    """With a rank that foretells badly, alone and in a batch."""
    for family in ("llama", "opt", "gpt2"):
        model = tiny(family)
        foretold = fit_foretold(model, DATA, rank=2)
        ids = random_data(3, 9, seed=3).ids
        assert torch.allclose(logits(model, foretold, ids)[:1], logits(model, foretold, ids[:1]), atol=1e-5)
        assert not torch.allclose(logits(model, foretold, ids), logits(model, None, ids), atol=1e-4)


def test_a_planted_matrix_of_low_rank_is_foretold_by_as_few_numbers() -> None:
    model, draw = relu(2), torch.Generator().manual_seed(0)
    for layer in model.model.decoder.layers:
        layer.fc1.weight.data = torch.randn(64, 3, generator=draw) @ torch.randn(3, 32, generator=draw) / 3
    wanted = logits(model)
    errors = {}
    for rank in (1, 3):
        foretold = fit_foretold(model, DATA, rank=rank)
        errors[rank] = float((logits(model, foretold) - wanted).abs().max())
    assert errors[3] < 1e-4 and errors[1] > 1e-2


def test_a_higher_threshold_leaves_out_more() -> None:
    model, kept = tiny("llama"), []
    for threshold in (-math.inf, -0.1, 0.0, 0.1, math.inf):
        foretold = fit_foretold(model, DATA, rank=8, threshold=threshold)
        with torch.no_grad(), leaving_out(model, foretold) as trace:
            out = model(input_ids=DATA.ids, use_cache=False).logits
        kept.append(trace.kept)
        assert torch.isfinite(out).all()
    assert kept == sorted(kept, reverse=True) and kept[0] == trace.total and kept[-1] == 0
    plan = ",".join(f"{i}a" for i in range(4))  # no neuron of any mlp
    with torch.no_grad(), shoal.running(model, plan):
        assert torch.allclose(model(input_ids=DATA.ids, use_cache=False).logits, out, atol=1e-6)


def test_it_goes_with_a_plan_and_names_the_matrix_in_front_of_the_activation() -> None:
    model = tiny("llama")
    opened = open_model(model)
    found = silencers(opened, neuron_mlps(opened, [0, 2]))
    assert found == [model.model.layers[i].mlp.gate_proj for i in (0, 2)]
    foretold = fit_foretold(model, DATA, rank=4, layers=(1, 2))
    with torch.no_grad(), shoal.running(model, "0,2-3"), leaving_out(model, foretold) as trace:
        model(input_ids=DATA.ids, use_cache=False)
    assert trace.total == DATA.ids.numel() * 64
    with shoal.running(model, "0,2-3"), pytest.raises(ShoalError, match="U507"):
        fit_foretold(model, DATA, rank=4)


def test_what_was_saved_decides_the_same(tmp_path: Path) -> None:
    model = tiny("llama")
    foretold = fit_foretold(model, DATA, rank=4, layers=(1, 3), threshold=-0.05)
    foretold.save(tmp_path / "foretold.safetensors")
    read = Foretold.load(tmp_path / "foretold.safetensors")
    assert sorted(read.tensors) == [1, 3]
    assert torch.equal(logits(model, read), logits(model, foretold))


@pytest.mark.parametrize("damage", ["missing", "text", "without threshold", "without left", "odd name", "empty"])
def test_a_file_that_is_none_is_refused(damage: str, tmp_path: Path) -> None:
    place = tmp_path / "foretold.safetensors"
    fit_foretold(tiny("llama"), DATA, rank=4, layers=(1,)).save(place)
    held = load_file(place)
    if damage == "missing":
        place.unlink()
    elif damage == "text":
        place.write_text("no tensors")
    else:
        gone = {"without threshold": ["threshold"], "without left": ["1.left"], "empty": [n for n in held if "." in n]}
        rest = {name: one for name, one in held.items() if name not in gone.get(damage, [])}
        save_file(rest | ({"one.left": held["1.left"] + 1} if damage == "odd name" else {}), place)
    with pytest.raises(ShoalError, match=r"W286: .* holds no foretold neurons"):
        Foretold.load(place)


def test_what_cannot_be_foretold_is_refused() -> None:
    curved = copy.deepcopy(tiny("llama"))
    for layer in curved.model.layers:
        layer.mlp.act_fn = nn.Tanh()  # nothing but 0 makes 0
    refused: list[tuple[PreTrainedModel, dict[str, Any], str, str]] = [
        (curved, {"rank": 4}, "P160", "no matrix that makes its neurons can silence them"),
        (tiny("mixtral"), {"rank": 4}, "P160", "no mlp has known ones"),
        (tiny("mixtral"), {"rank": 4, "layers": (1,)}, "P160", "layer 1 .* neurons are not known"),
        (tiny("llama"), {"rank": 4, "layers": (7,)}, "P160", "layer 7 .* layers are 0 to 3"),
        (tiny("llama"), {"rank": 0}, "U555", "use 1 to 32"),
        (tiny("llama"), {"rank": 33}, "U555", "use 1 to 32"),
    ]
    for model, options, code, words in refused:
        with pytest.raises(ShoalError, match=words) as caught:
            fit_foretold(model, DATA, **options)
        assert caught.value.code == code


def test_tensors_of_another_model_are_refused() -> None:
    model = tiny("llama")
    own = dict(fit_foretold(model, DATA, rank=4, layers=(1,)).tensors[1])
    for name, tensor in own.items():
        other = Foretold({1: own | {name: torch.cat([tensor, tensor])}})
        with pytest.raises(ShoalError, match="P160: what foretells the neurons of layer 1 does not fit"):
            logits(model, other)
