"""A written GGUF file read by transformers' own loader, and its logits beside those of the live plan."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GgufConfig, PreTrainedModel

from shoal.errors import WriteError
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.gguf import no_bars_in_logs
from shoal.models.load import Loaded
from shoal.models.stacks import unwrap
from shoal.plan import Plan
from shoal.writing.checks import Check, limit_for
from shoal.writing.gguf_out.container import TYPES, decoded, encoded, kind_for
from shoal.writing.reference import quiet
from shoal.writing.surgery import blueprint, rewrite

TOKENS = 24


def forward_check(file: Path, loaded: Loaded, plan: Plan, *, outtype: str | None, exact: bool) -> Check:
    """Logits of the tensors of `file`, dequantised and renamed by transformers, in the stock model of `plan`, against
    those of the live plan, for two sequences of random tokens. transformers reads few of a file's keys, so the config
    is the plan's own: what this proves is every tensor. Not `exact`: the matrices were rounded to `outtype` on the
    way, so the plan's stock model with its matrices rounded must agree, and how far the live plan is is said.

    Raises `WriteError` W269 where transformers does not read GGUF files of the model's family.
    """
    inner = unwrap(loaded.model)
    config = blueprint(inner, plan, zero_parts=True).config
    vocab = int(inner.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, vocab, (2, TOKENS), generator=torch.Generator().manual_seed(0)).to(inner.device)
    with quiet(), evaluating(inner), running(inner, plan):
        live = inner(input_ids=ids).logits.float().cpu()
    try:
        with quiet(), no_bars_in_logs():
            again = type(inner).from_pretrained(
                file.parent,
                config=config,
                gguf_file=file.name,
                dtype=inner.dtype,
                quantization_config=GgufConfig(dequantize=True),
                attn_implementation=inner.config._attn_implementation,
            )
    except NotImplementedError:
        raise WriteError(
            f"transformers reads no GGUF files of {inner.config.model_type} models; leave --forward out", code="W269"
        ) from None
    with torch.no_grad():
        found = again.eval().to(inner.device)(input_ids=ids).logits.float().cpu()
    limit = limit_for(str(inner.dtype).removeprefix("torch."), float(live.abs().max()))
    how = "largest difference of a logit, the file's tensors read by transformers"
    if not exact and outtype is not None:
        moved = float((found - live).abs().max())
        how += f"; rounding to {outtype} moves one by {moved:.3g} from the live plan"
        with torch.no_grad():
            live = _rounded(inner, plan, outtype)(input_ids=ids).logits.float().cpu()
    different = float((found - live).abs().max())
    return Check("logits", different <= limit, different, limit, how)


def _rounded(model: PreTrainedModel, plan: Plan, outtype: str) -> PreTrainedModel:
    """The stock model of `plan` with each matrix as a file of `outtype` holds it; `model` keeps its own."""
    with quiet():
        made = rewrite(model, plan, zero_parts=True)
    for module in made.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = kind_for(outtype, parameter.shape)
            values = decoded(encoded(parameter.detach().float().cpu().numpy(), kind), kind)
            rounded = torch.from_numpy(values.copy()).reshape(parameter.shape).to(parameter)
            setattr(module, name, torch.nn.Parameter(rounded, requires_grad=False))
    return made.eval()


def is_exact(outtype: str | None, kinds: set[str]) -> bool:
    """Does `outtype` hold every value of matrices stored as `kinds` (names of types)?"""
    if outtype is None or outtype == "f32":
        return True
    return kinds <= {TYPES[outtype][0].name}
