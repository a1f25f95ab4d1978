"""LLM-Streamline: the span of layers that turns the state least goes, and a small net learns to do its work."""

from __future__ import annotations

from typing import Literal

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.measures.cosine_span import cosine_span
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.contiguous import contiguous
from shoal.transforms.streamline import streamline

EXAMPLES = MethodExamples(new_tensors={"kind": "ffn", "epochs": 1, "loss_epochs": 0})


def llm_streamline(
    job: PruningJob,
    *,
    drop: int,
    kind: Literal["layer", "ffn", "swiglu"] = "layer",
    epochs: int = 8,
    loss_epochs: int = 1,
    window: Literal["paper", "released"] = "paper",
) -> Found:
    """Remove the span of neighbouring layers with the highest cosine between its ends and train a net in its place.

    `kind`: the layer before the span, or a net that costs as much as a linear map and runs live only; trained on the
    dense states for `epochs`, then on the language loss for `loss_epochs` (the transform `streamline`).

    window=paper: the span of n = `drop` layers with the highest E_t[cos(x_l, x_l+n)] goes, and a net comes in its
    place. window=released: the span of n + 1 layers with the highest cosine; its first layer is the one that is
    trained, from the state before the span to the one behind it, and the n others go. A net instead of a layer takes
    the place of all n + 1, so that the depth falls by n when the net counts as a layer.

    Source: Chen et al. 2024 (LLM-Streamline, arXiv 2403.19135); "released" is the rule of its published code.

    How we differ: by window=paper the trained layer is the one before the span, which is not counted. Data are the
    calibration sequences, not 100,000. Raises U504 where the released window does not fit.
    """
    released = window == "released"
    depth = job.plan.depth(job.stack)
    if released and not 1 <= drop <= depth - 2:
        raise UsageError(
            f"the released window of llm-streamline for {drop} layers takes {drop + 1} of {depth}, and one must be "
            f"left; remove 1 to {depth - 2}, or use window=paper",
            code="U504",
        )
    span, stay = drop + released, int(released and kind == "layer")
    scores = cosine_span(job.model, job.data, span=span, stack=job.stack, batch=job.batch, progress=job.progress)
    found = contiguous(job.plan, scores=scores, drop=span - stay, stay=stay, legal=job.legal, stack=job.stack)
    return job.then(streamline, found, kind=kind, epochs=epochs, loss_epochs=loss_epochs)
