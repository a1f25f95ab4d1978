"""Draft several tokens at once without the middle layers."""

from __future__ import annotations

from pathlib import Path

import torch

from shoal.errors import PlanError, UsageError
from shoal.examples import DraftExamples
from shoal.executing.mask_tokens import masks_in
from shoal.executing.weights import load_weights
from shoal.plan import Run, Spec, parse_steps
from shoal.plan.steps import runs
from shoal.speculating.chooser import Chooser
from shoal.speculating.masked_draft import Masked, middle

EXAMPLES = DraftExamples(("s3d:skip=1-2,tokens=3", "s3d:tokens=1"))


def s3d(*, spec: Spec, skip: str = "", tokens: int = 4, masks: Path | None = None) -> Chooser:
    """Leave out the layers `skip` (10-19) and draft `tokens` tokens in one pass, by mask tokens behind the text.

    The pass is given the last token and `tokens` - 1 masks; the token's column predicts the next token as always, and
    the column of mask j the token behind its own, logits [tokens, vocabulary]. With tokens=1 it is the draft `skip` of
    the same layers. Left out, `skip` is the middle third. `masks`: a folder or plan.json whose tensors have them
    (`shoal heal --recipe s3d --save-plan FOLDER`); without it every mask is the mean embedding, which was never
    trained, and hardly any token behind the first one stands. The verification runs all layers on all drafted tokens.
    `shoal.speculating.s3d_speed` has the paper's model of speed: the share that is best to skip.

    Source: S3D (Zhong & Bharadwaj, arXiv 2405.20314).

    How we differ: there the whole model is fine-tuned with the masks; here the masks alone learn, so that the text
    stays the base model's. The token that the last token of the text itself predicts is one of `tokens`; there as many
    masks as tokens are appended. `skip` may be any layers, there it is a symmetric span.
    """
    depth = spec.stack("decoder").depth
    named = {run.layer for run in runs(parse_steps(skip))} if skip.strip() else set(middle(depth, depth // 3))
    if tokens < 1 or (named and max(named) >= depth) or len(named) == depth:
        raise UsageError(
            f"s3d cannot draft {tokens} tokens without the layers {skip or 'in the middle'} of {depth}; skip some of "
            f"0 to {depth - 1} and draft 1 token or more, as in s3d:skip=10-19,tokens=4",
            code="U706",
        )
    steps = tuple(Run(layer) for layer in range(depth) if layer not in named)
    return Masked(steps, tokens, None if masks is None else _loaded(masks, tokens, spec.stack("decoder").hidden))


def _loaded(place: Path, tokens: int, hidden: int) -> torch.Tensor:
    found = masks_in(load_weights(place))
    if found is None or found.shape[-1] != hidden:
        what = "no masks" if found is None else f"masks of the size {found.shape[-1]}"
        raise PlanError(
            f"{place} has {what}, and this model needs such of the size {hidden}; train them on it (shoal heal "
            "--recipe s3d)",
            code="P158",
        )
    if len(found) < tokens - 1:
        raise PlanError(
            f"{place} has {len(found)} masks, which draft {len(found) + 1} tokens at once and not {tokens}; draft "
            "fewer, or train more (shoal heal --recipe s3d:tokens=N)",
            code="P159",
        )
    return found
