"""generate: what a model writes, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shoal.api.assess import planned, tokenizer_of
from shoal.evaluation.scoring import evaluating
from shoal.models.kinds import require_causal
from shoal.models.load import Loaded
from shoal.plan import Plan
from shoal.run.streaming import TextPieces
from shoal.run.weights import Tensors


@dataclass(frozen=True)
class Answer:
    """What was written."""

    prompt: str
    text: str
    tokens: int
    plan: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    loaded: Loaded,
    prompt: str,
    *,
    plan: Plan | str | None = None,
    weights: Tensors | None = None,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float = 1.0,
    chat: bool | None = None,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Generate from `prompt` with the model's own `generate`, under `plan` (with its `weights`) when one is
    given; `on_text` is called with
    each finished piece of text. Raises D440 without a tokenizer."""
    require_causal(loaded.model, "generate")
    tokenizer = tokenizer_of(loaded)
    use_chat = getattr(tokenizer, "chat_template", None) is not None if chat is None else chat
    if use_chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(loaded.model.device) for name in ("input_ids", "attention_mask")}
    drawn: dict[str, Any] = (
        {"temperature": temperature} if sample else {"temperature": None, "top_p": None, "top_k": None}
    )
    torch.manual_seed(seed)
    with planned(loaded.model, plan, weights)() as model, evaluating(model):
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            streamer=None if on_text is None else TextPieces(tokenizer, on_text),
            **drawn,
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Answer(prompt, text, len(new), None if plan is None else str(plan))
