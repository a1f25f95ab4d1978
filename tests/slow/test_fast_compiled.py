"""What the compiler really makes of a layer gives the tokens of generate; compiling takes seconds for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.decoding.fast import FastDecoder
from shoal.live import running
from tests.contract.families import tiny


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when the compiler is imported
@pytest.mark.parametrize("mode", ["layers", "step"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt"])
def test_compiled_steps_give_the_tokens_of_generate(family: str, mode: Any) -> None:
    model, plan = tiny(family), "0,2-3"
    ids = torch.randint(3, 64, (1, 5), generator=torch.Generator().manual_seed(7))
    fast = FastDecoder(model, {"all": "0-3", "few": plan}, mode=mode)
    for name, chosen in (("all", "0-3"), ("few", plan), ("all", "0-3")):
        with running(model, chosen):
            want = model.generate(ids, max_new_tokens=16, do_sample=False)
        assert torch.equal(fast.generate(ids, plan=name, max_new_tokens=16, do_sample=False), want), name
    assert all(one.difference < 1e-5 for one in fast.compiled.values())
