"""Mask tokens for a draft that writes several tokens at once."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.healing.stage import Recipe, Settings, Stage


def s3d(*, tokens: int = 4, share: float = 0.3, rate: float = 5e-3) -> Recipe:
    """Masked next tokens are predicted by the plan, and only the embeddings of `tokens` - 1 masks learn.

    The plan is the model without its middle layers; `--speculate s3d:skip=...,tokens=...,masks=FOLDER` drafts with what
    learned (`--save-plan FOLDER`). `share` of the tokens of a window are masked.

    Source: Zhong & Bharadwaj 2024 (S3D, arXiv 2405.20314).

    How we differ: all tensors learn there, and the model that verifies is the one that has learned; here the base
    stands still, so that the text is its own.
    """
    if tokens < 2:
        raise UsageError(f"s3d: tokens={tokens} needs no mask; write tokens=4", code="U502")
    return (
        Stage(
            terms=(f"masked-tokens:share={share}",), learn=(f"masks:count={tokens - 1}",), settings=Settings(rate=rate)
        ),
    )
