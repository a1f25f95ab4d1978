"""What the model writes, greedily: the damage that perplexity and multiple choice do not show (loops, early ends)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shoal.decoding.arguments import GREEDY_ALONE
from shoal.decoding.blame import naming_the_config
from shoal.decoding.decoder import Decoder
from shoal.errors import UsageError
from shoal.evaluation.scoring import Progress, require_context
from shoal.evaluation.stats import ratio
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "List five things one should pack for a weekend in the mountains.",
    "What is the difference between a city and a village?",
    "A train leaves at 9:40 and arrives at 12:15. How long does the journey take? Explain each step.",
    "Write a polite email that asks a colleague to move a meeting from Monday to Wednesday.",
    "Describe how bread is made, from flour to loaf.",
    "Write a Python function that returns the largest number in a list, and say how it works.",
)
NGRAM = 4


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to one prompt; the EOS token that ended it is not counted."""

    prompt: str
    text: str
    tokens: int
    repeated: int
    """How many of its 4-grams occurred before in it."""
    distinct: int
    """How many different tokens it has."""
    ended: bool


@dataclass(frozen=True, slots=True)
class GenerationCheck:
    """Greedy answers and what they have in common."""

    repetition: float
    """Share of the new 4-grams that occurred before in the same answer, over all answers; 0 if there are none."""
    repetition_error: float | None
    """Standard error with the prompt as the unit of sampling; None for a single prompt."""
    distinct: float
    """Mean over the answers of the share of different tokens; an empty answer counts 0."""
    ended: float
    """Share of answers that ended with EOS."""
    mean_new_tokens: float
    new_tokens: int
    """The most that were allowed."""
    chat: bool
    """Whether the prompts went through the tokenizer's chat template."""
    generations: tuple[Generation, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generation_check(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    new_tokens: int = 64,
    chat: bool | None = None,
    progress: Progress | None = None,
) -> GenerationCheck:
    """Let the model answer each prompt greedily, one at a time, whatever its generation config says.

    `chat` None uses the tokenizer's chat template if it has one. Raises `UsageError`: U510 context too short, U512 no
    prompts or no tokens, U513 no chat template; `ModelError` M379 for a generation config that cannot be used.
    """
    if not prompts or new_tokens < 1:
        message = f"{len(prompts)} prompts and {new_tokens} new tokens generate nothing; use 1 or more of each"
        raise UsageError(message, code="U512")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise UsageError("this tokenizer has no chat template; leave chat off", code="U513")
    use_chat = has_template if chat is None else chat
    generations = []
    with evaluating(model), naming_the_config(model):
        for number, prompt in enumerate(prompts, start=1):
            generations.append(_answer(model, tokenizer, prompt, new_tokens, use_chat))
            if progress is not None:
                progress(number, len(prompts), "generation")
    return _summary(tuple(generations), new_tokens, use_chat)


def repeated_ngrams(tokens: Sequence[int], n: int = NGRAM) -> int:
    """How many n-grams of `tokens` occurred before in it."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(grams) - len(set(grams))


def _answer(model: Any, tokenizer: Any, prompt: str, new_tokens: int, chat: bool) -> Generation:
    ids = _prompt_ids(tokenizer, prompt, chat).to(device_of(model))
    require_context(model, ids.shape[1] + new_tokens)
    ends = _eos_ids(model, tokenizer)
    extra = {"eos_token_id": ends, "pad_token_id": ends[0]} if ends else {"eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    asked = GREEDY_ALONE | extra | {"max_new_tokens": new_tokens}
    output = Decoder(model).generate(input_ids=ids, attention_mask=mask, **asked)
    tokens = output[0, ids.shape[1] :].tolist()
    ended = bool(tokens) and tokens[-1] in ends
    if ended:
        tokens.pop()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Generation(prompt, text, len(tokens), repeated_ngrams(tokens), len(set(tokens)), ended)


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template writes its own special tokens.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64)


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else [int(end) for end in (ends if isinstance(ends, list | tuple) else [ends])]


def _summary(generations: tuple[Generation, ...], new_tokens: int, chat: bool) -> GenerationCheck:
    grams = [max(0, g.tokens - NGRAM + 1) for g in generations]
    repetition, error = ratio([g.repeated for g in generations], grams) if any(grams) else (0.0, None)
    number = len(generations)
    return GenerationCheck(
        repetition=repetition,
        repetition_error=error,
        distinct=sum(g.distinct / g.tokens for g in generations if g.tokens) / number,
        ended=sum(g.ended for g in generations) / number,
        mean_new_tokens=sum(g.tokens for g in generations) / number,
        new_tokens=new_tokens,
        chat=chat,
        generations=generations,
    )
