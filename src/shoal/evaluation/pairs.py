"""Encoder-decoders on a source and a target text: how likely the target is, and what is written instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shoal.decoding.arguments import GREEDY_ALONE
from shoal.decoding.decoder import Decoder
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating

IGNORED = -100
"""The label that stock models leave out, and read as padding in front of the next one."""
Pair = tuple[list[int], list[int]]
"""Ids of the source and of the target."""


def is_paired(model: Any) -> bool:
    """Whether an encoder reads one text and a decoder writes another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def paired_tokens(model: Any, tokenizer: Any, source: str, target: str) -> Pair:
    """The ids of both texts as the tokenizer makes them for such a model, the end of the text included; a source that
    is too long loses its beginning."""
    limit = getattr(model.config, "max_position_embeddings", None)
    ids = list(tokenizer(source)["input_ids"]) or [_padding(model, tokenizer)]
    return ids[-limit:] if isinstance(limit, int) and limit > 0 else ids, target_ids(tokenizer, target)


def target_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that is to be written."""
    return list(tokenizer(text_target=text)["input_ids"])


def paired_scores(model: Any, asked: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
    """For each pair the log-probability of the whole target in nats (float32 log-softmax), and whether greedy decoding
    would write it. The caller turns gradients off."""
    device = device_of(model)
    sources, mask = _padded([source for source, _ in asked], 0, device)
    labels, _ = _padded([target for _, target in asked], IGNORED, device)
    logits = model(input_ids=sources, attention_mask=mask, labels=labels, use_cache=False).logits
    for row, (_, target) in enumerate(asked):
        scores = logits[row, : len(target)].float().log_softmax(-1)
        wanted = labels[row, : len(target)].to(scores.device)
        yield float(scores.gather(-1, wanted[:, None]).sum()), bool((scores.argmax(-1) == wanted).all())


def write_each(
    model: Any, tokenizer: Any, sources: Sequence[str], *, new_tokens: int, batch: int = 8
) -> list[list[int]]:
    """The ids that the model writes greedily for each source, at most `new_tokens`, without those of special tokens.

    A causal model goes on with the source; an encoder-decoder answers it, beginning as its generation config says (a
    forced first token names the language there).
    """
    begun = [list(tokenizer(source)["input_ids"]) or [_padding(model, tokenizer)] for source in sources]
    special, found = set(getattr(tokenizer, "all_special_ids", ())), [list[int]()] * len(begun)
    order = sorted(range(len(begun)), key=lambda n: len(begun[n]))
    with evaluating(model):
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            # an encoder counts positions from the first column, a decoder goes on behind the last one
            left = not is_paired(model)
            ids, mask = _padded([begun[row] for row in rows], _padding(model, tokenizer), device_of(model), left=left)
            written = Decoder(model).generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                pad_token_id=_padding(model, tokenizer),
                **GREEDY_ALONE,
            )
            new = written[:, 1 if is_paired(model) else ids.shape[1] :].tolist()
            ends = _ends(model)
            for row, own in zip(rows, new, strict=True):
                found[row] = [one for one in _until(own, ends) if one not in special]
    return found


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """`ids` up to the first that ends a text."""
    stop = next((n for n, one in enumerate(ids) if one in ends), len(ids))
    return ids[:stop]


def _ends(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    return set() if found is None else set(found) if isinstance(found, list) else {found}


def _padding(model: Any, tokenizer: Any) -> int:
    known = (tokenizer, model.generation_config)
    names = [getattr(one, name, None) for name in ("pad_token_id", "eos_token_id") for one in known]
    return next((one for one in names if isinstance(one, int)), 0)


def _padded(
    rows: Sequence[list[int]], padding: int, device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one tensor and the mask of what is no padding, [rows, longest] each."""
    longest = max(map(len, rows))
    short = [longest - len(row) for row in rows]
    ids = [[padding] * n + row if left else row + [padding] * n for row, n in zip(rows, short, strict=True)]
    mask = [[0] * n + [1] * len(row) if left else [1] * len(row) + [0] * n for row, n in zip(rows, short, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
