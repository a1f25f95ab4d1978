"""A written GGUF file read by transformers' own loader, and its logits beside those of the live plan."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from shoal.errors import WriteError
from shoal.evaluation.scoring import evaluating
from shoal.models.gguf import no_bars_in_logs
from shoal.models.load import Loaded
from shoal.plan import Plan
from shoal.run.live import running
from shoal.writing.gguf_out.container import TYPES
from shoal.writing.gguf_out.copied import Drawing
from shoal.writing.judge import Check, limit_for
from shoal.writing.reference import quiet

TOKENS = 24
_ROUNDED = {"f16": 0.02, "bf16": 0.1, "q8_0": 0.2}
"""By what share of the largest logit rounding may move one; a tensor in a wrong place moves it by half."""
_ONLY_LLAMA_CPP = ("rope.scaling.type", "attention.sliding_window_pattern")
_ARCHS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
"""Architectures whose every key transformers reads."""


def require_readable(drawing: Drawing) -> None:
    """Raise `WriteError` W269 for what transformers' loader of GGUF files does not read: it would compute something
    else than the file says."""
    names = {item.name for item in drawing.items} | {key.removeprefix(f"{drawing.arch}.") for key in drawing.pairs}
    unread = next((name for name in (*_ONLY_LLAMA_CPP, "rope_freqs.weight") if name in names), None)
    if drawing.arch not in _ARCHS:
        unread = f"the architecture {drawing.arch}"
    if unread is not None:
        raise WriteError(
            f"transformers does not read {unread} of a GGUF file, so its logits say nothing; leave --forward out",
            code="W269",
        )


def forward_check(file: Path, loaded: Loaded, plan: Plan, *, outtype: str | None, exact: bool) -> Check:
    """Logits of `file`, dequantised by transformers, against those of `plan` on the live model, for two sequences of
    random tokens. `exact`: nothing was rounded on the way, so they must agree as a written folder's must."""
    inner = loaded.model
    vocab = int(inner.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, vocab, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    with quiet(), torch.no_grad(), evaluating(inner), running(inner, plan):
        live = inner(input_ids=ids.to(inner.device)).logits.float().cpu()
    with quiet(), no_bars_in_logs():
        again = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=inner.dtype,
            quantization_config=GgufConfig(dequantize=True),
            attn_implementation=inner.config._attn_implementation,
        )
    with torch.no_grad():
        found = again.eval().to(inner.device)(input_ids=ids.to(inner.device)).logits.float().cpu()
    largest = float(live.abs().max())
    limit = limit_for(str(inner.dtype).removeprefix("torch."), largest)
    how = "largest difference of a logit, the file dequantised by transformers"
    if not exact:
        limit = max(limit, _ROUNDED[outtype or "q8_0"] * largest)
        how += f", matrices rounded to {outtype}"
    different = float((found - live).abs().max())
    return Check("logits", different <= limit, different, limit, how)


def is_exact(outtype: str | None, kinds: set[str]) -> bool:
    """Does `outtype` hold every value of matrices stored as `kinds` (names of types)?"""
    if outtype is None or outtype == "f32":
        return True
    return kinds <= {TYPES[outtype][0].name}
