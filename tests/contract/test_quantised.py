"""Models whose weights a quantiser packed: run live, and refused by the sentence that says so where they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaConfig

from shoal.api.measuring import measure
from shoal.api.prune import prune
from shoal.errors import ModelError, UsageError, WriteError
from shoal.evaluation import memory
from shoal.models.load import Loaded
from shoal.models.packed import is_plain, is_subclass, unpacked
from shoal.models.streamed import refuse_packed
from shoal.writing.folder import write
from shoal.writing.stream import stream

from .live_models import own
from .planted import random_data

DATA = random_data(4, 16)


@pytest.fixture
def packed() -> Any:
    """A model whose matrices are of a class that packs two tensors into one, as torchao's do."""
    model = own("llama")
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                half = module.weight.detach() / 2
                module.weight = nn.Parameter(TwoTensor(half, half.clone()), requires_grad=False)
    return model


def test_what_is_packed_is_known(packed: Any) -> None:
    weight = packed.model.layers[0].mlp.up_proj.weight
    assert is_subclass(weight) and not is_plain(weight) and len(list(unpacked(weight))) == 2
    norm = packed.model.norm.weight
    assert is_plain(norm) and list(unpacked(norm)) == [norm]
    assert not is_plain(torch.zeros(2, dtype=torch.int8)) and not is_plain(torch.empty(2, device="meta"))


def test_memory_counts_what_is_packed(packed: Any) -> None:
    plain = own("llama")
    matrices = sum(m.weight.nbytes for m in plain.model.layers.modules() if isinstance(m, nn.Linear))
    one, two = (memory(model, prompt=4, batch=1).weight_bytes for model in (plain, packed))
    assert two == one + matrices


def test_nothing_is_fitted_into_packed_weights(packed: Any) -> None:
    loaded = Loaded(packed, None, "packed")
    how: dict[str, Any] = {"plan": "0-1,3", "assess": False, "data": DATA, "writable": False}
    found = prune(loaded, then=["refit"], **how)
    assert str(found.plan) == "0-1,3" and "cannot be rewritten" in str(found.then[0]["notes"])
    for transform in ("slerp", "streamline:kind=layer,epochs=1"):
        with pytest.raises(UsageError, match=r"U556.*not quantised"):
            prune(loaded, then=[transform], **how)
    with pytest.raises(UsageError, match=r"U534.*quantised"):
        measure(loaded, "magnitude", data=DATA)


def test_what_is_written_of_a_quantised_model_is_one_sentence(tmp_path: Path) -> None:
    model = own("llama")
    model.hf_quantizer = object()
    for plan in ("0-1,3", "0-3"):
        with pytest.raises(WriteError, match=r"W212: the model is quantised"):
            write(Loaded(model, None, "quantised"), plan, tmp_path / "out")
    with pytest.raises(WriteError, match=r"W212"):
        prune(Loaded(model, None, "quantised"), plan="0-1,3", assess=False, writable=True)
    config = LlamaConfig(quantization_config={"quant_method": "torchao", "bits": 8})
    with pytest.raises(ModelError, match=r"M391: it is quantised \(torchao, 8 bits\).*--stream"):
        refuse_packed("it", config)
    own("llama").save_pretrained(tmp_path / "base")
    assert stream(tmp_path / "base", "0-1,3", tmp_path / "sound").proof.passed
