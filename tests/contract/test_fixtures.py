"""The shared tiny model is the same in every run, and each of its layers matters."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

IDS = torch.arange(3, 19).reshape(2, 8)  # [batch, tokens]


@pytest.mark.parametrize("layer", range(4))
def test_dropping_any_layer_of_tiny_llama_shows(tiny_llama: LlamaForCausalLM, layer: int) -> None:
    shorter = copy.deepcopy(tiny_llama)
    del shorter.model.layers[layer]
    shorter.config.num_hidden_layers = 3
    with torch.no_grad():
        whole, less = (model(IDS, use_cache=False).logits for model in (tiny_llama, shorter))
    assert (whole - less).abs().max() > 0.1


def test_tiny_llama_is_the_same_in_every_run(tiny_llama: LlamaForCausalLM) -> None:
    weight = tiny_llama.model.layers[2].self_attn.q_proj.weight
    assert weight.std().item() == pytest.approx(0.15, rel=0.1)
    assert weight[0, :3].tolist() == pytest.approx([0.149445, 0.239749, 0.001025], abs=1e-5)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="only workers share cores; run without -n 0")
def test_workers_use_one_thread() -> None:
    assert torch.get_num_threads() == 1
