"""Draft with the mlps of some layers left out."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.plan import Run, Spec, parse_steps
from shoal.plan.steps import runs
from shoal.speculating.chooser import Chooser, Fixed

EXAMPLES = DraftExamples(("attention:2",))


def attention(*, spec: Spec, layers: str = "") -> Chooser:
    """Draft with the attention alone of the layers `layers` (10-19 in depth notation) and all other layers whole.

    Left out, the middle half of the layers. Their mlps are skipped while drafting: attention writes the KV that later
    tokens read, and an mlp holds most of a layer's weights.

    Source: FFN-SkipLLM (Jaiswal et al., EMNLP 2024, arXiv 2404.03865), which finds that mlps of the middle layers can
    be skipped where attention cannot.

    How we differ: here it drafts, so it is lossless.
    """
    depth = spec.stack("decoder").depth
    named = (
        {run.layer for run in runs(parse_steps(layers))} if layers.strip() else set(range(depth // 4, 3 * depth // 4))
    )
    if not named or max(named) >= depth:
        raise UsageError(
            f"layers {layers or 'none'} cannot give up their mlps: the model has the layers 0 to {depth - 1}; "
            "name some of these, as in attention:10-19",
            code="U610",
        )
    return Fixed(tuple(Run(i, part="attention" if i in named else "layer") for i in range(depth)))
