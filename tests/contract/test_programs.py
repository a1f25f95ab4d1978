"""Programs whose order or modules are chosen while the model runs, by policies of one's own: what IOT and
Mixture-of-Modules compute. Who chooses is trained there; here it is written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from shoal.deciding.policy import Policy
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, parse_plan

from .families import VOCAB, tiny
from .references import CLOSE
from .shares import every

IDS = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(8))
FAMILIES = ["llama", "gpt2", "qwen2", "olmo2", "gemma3_text", "gpt_neox"]


def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


class Chosen(Policy):
    """A step runs for the tokens whose number, [batch, tokens], is that at the end of its gate's name."""

    def __init__(self, plan: Plan, numbers: torch.Tensor) -> None:
        super().__init__(plan)
        self.numbers = numbers

    def should_run(self, run: Any, forward: Any, hidden: Any) -> torch.Tensor:
        now = self.numbers[:, forward.past : forward.past + forward.tokens]
        return now == int(run.gate[-1])


def decided(model: Any, text: str, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of one forward, and token by token over a cache."""
    plan = parse_plan(text, Plan.identity(inspect(model)))
    with running(model, plan, policy=Chosen(plan, numbers)):
        whole = logits(model, IDS)
        cache = DynamicCache(config=model.config)
        steps = [logits(model, IDS[:, n : n + 1], past_key_values=cache) for n in range(IDS.shape[1])]
    return whole, torch.cat(steps, 1)


@pytest.mark.parametrize("family", every(2, FAMILIES))
def test_each_sentence_has_an_order_of_its_own(family: str) -> None:
    """IOT (arXiv 2103.03457): in layers 1 and 2 the mlp runs before the attention for one sentence, behind it for the
    other."""
    model = tiny(family)
    numbers = torch.tensor([[0], [1]]).expand_as(IDS)
    program = "0,1m?order-0,1a,1m?order-1,2m?order-0,2a,2m?order-1,3"
    whole, steps = decided(model, program, numbers)
    for row, order in enumerate(("0,1m,1a,2m,2a,3", "0-3")):
        with running(model, order):
            torch.testing.assert_close(whole[row : row + 1], logits(model, IDS[row : row + 1]), **CLOSE)
    torch.testing.assert_close(steps, whole, **CLOSE)


@pytest.mark.parametrize("family", every(2, FAMILIES))
def test_each_token_has_modules_of_its_own(family: str) -> None:
    """Mixture-of-Modules (arXiv 2407.06677) for mlps: behind the attention of layer 1 each token takes the mlp of
    layer 1, 2 or 3, as two tokens that alone stand for one choice show; attentions are assembled in another order."""
    model = tiny(family)
    numbers = torch.tensor([[1, 2, 3, 1, 2, 3, 3, 1], [3, 3, 2, 2, 1, 1, 2, 3]])
    program = "0,2a,1m?mlp-1,2m?mlp-2,3m?mlp-3,1a,3"
    whole, steps = decided(model, program, numbers)
    torch.testing.assert_close(steps, whole, **CLOSE)
    for number in (1, 2, 3):
        alike, _ = decided(model, program, torch.full_like(numbers, number))
        with running(model, f"0,2a,{number}m,1a,3"):
            torch.testing.assert_close(alike, logits(model, IDS), **CLOSE)
    first = numbers[:, 0]
    for row in range(len(IDS)):
        with running(model, f"0,2a,{int(first[row])}m,1a,3"):
            torch.testing.assert_close(whole[row, 0], logits(model, IDS[row : row + 1])[0, 0], **CLOSE)
