"""generate with a draft: the text is the base model's own, written by self-speculation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shoal.api.assess import tokenizer_of
from shoal.api.prompts import encoded
from shoal.api.speculate import tune_draft
from shoal.decoding.arguments import sampling, stopping
from shoal.decoding.decoder import Decoder
from shoal.decoding.streaming import TextPieces
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_causal
from shoal.models.load import Loaded
from shoal.speculating.lengths import Confidence
from shoal.speculating.speculator import Speculator


@dataclass(frozen=True)
class DraftedAnswer:
    """What was written, and what drafting did for it."""

    prompt: str
    text: str
    tokens: int
    draft: str | None
    """The draft; None when `auto` found that plain decoding is faster here."""
    advice: str | None
    """What the tuner said, when `auto` asked it."""
    stats: dict[str, Any] | None
    """See `shoal.speculating.stats.Stats`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generate_drafted(
    loaded: Loaded,
    prompt: str,
    draft: str,
    *,
    length: int = 4,
    confidence: Confidence = "auto",
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float = 1.0,
    chat: bool | None = None,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    on_advice: Callable[[str], None] | None = None,
) -> DraftedAnswer:
    """Generate from `prompt` with the draft `draft`; "auto" first tries a few on 24 tokens of this prompt, and drafts
    nothing when plain decoding is faster.

    `on_text` is called with each finished piece of text, `on_advice` with what the tuner said. Raises what `Speculator`
    raises, D440 without a tokenizer.
    """
    require_causal(loaded.model, "generate")
    tokenizer, advice = tokenizer_of(loaded), None
    chosen: str | None = draft
    if draft == "auto":
        found = tune_draft(loaded, [prompt], new=24, finalists=1, pairs=2, chat=chat, few=True)
        chosen, advice = found.draft, found.verdict
        if found.draft is not None:
            length, confidence = found.length, found.confidence
        if on_advice is not None:
            on_advice(advice)
    inputs = encoded(loaded, prompt, chat)
    torch.manual_seed(seed)
    speculator = None if chosen is None else Speculator(loaded.model, chosen, length=length, confidence=confidence)
    with evaluating(loaded.model):
        ids = (Decoder(loaded.model) if speculator is None else speculator).generate(
            **inputs,
            **sampling(temperature if sample else 0.0),
            **stopping(loaded.model, tokenizer),
            max_new_tokens=max_new_tokens,
            streamer=None if on_text is None else TextPieces(tokenizer, on_text),
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    stats = None if speculator is None else speculator.stats.to_dict()
    return DraftedAnswer(prompt, text, len(new), chosen, advice, stats)
