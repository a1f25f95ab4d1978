"""Draft by the first layers and the model's own head."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.plan import Run, Spec
from shoal.speculating.chooser import Chooser, Fixed

EXAMPLES = DraftExamples(("exit:2",))


def exit(*, spec: Spec, layer: int | None = None) -> Chooser:  # noqa: A001
    """Draft by the layers 0..layer-1 and the model's own final norm and head; the verification runs the others only.

    `layer`: how many layers draft; left out, a third of them. KV rows and hidden states of the drafting layers are
    kept, so every layer sees each token once: with every draft accepted, layer counts equal plain decoding.

    Source: LayerSkip, self-speculative decoding with a KVQ cache (Elhoushi et al., ACL 2024, arXiv 2404.16710).

    How we differ: without its training recipe, so on a model that was not trained to exit early few drafts are
    accepted. `assistant_early_exit` of transformers shares nothing: its draft has a cache of its own and its
    verification runs all layers.
    """
    depth = spec.stack("decoder").depth
    layer = max(1, depth // 3) if layer is None else layer
    if not 1 <= layer <= depth:
        raise UsageError(
            f"a draft that leaves behind {layer} layers is none for a model of {depth}; exit at 1 to {depth}",
            code="U610",
        )
    return Fixed(tuple(Run(i) for i in range(layer)))
