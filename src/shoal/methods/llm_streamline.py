"""LLM-Streamline: the span of layers that turns the state least goes, and a small net learns to do its work."""

from __future__ import annotations

from typing import Literal

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
) -> Found:
    """Remove the span of neighbouring layers with the highest cosine between its ends and train a net in its place.

    `kind`: the layer before the span, or a net that costs as much as a linear map and runs live only; trained on the
    dense states for `epochs`, then on the language loss for `loss_epochs` (the transform `streamline`).

    Source: Chen et al. 2024 (LLM-Streamline, arXiv 2403.19135).

    How we differ: `drop` layers go whatever the net; the released code names one less, as the net takes a layer's
    place. Data are the calibration sequences, not 100,000.
    """
    scores = cosine_span(job.model, job.data, span=drop, stack=job.stack, batch=job.batch, progress=job.progress)
    found = contiguous(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
    return job.then(streamline, found, kind=kind, epochs=epochs, loss_epochs=loss_epochs)
