"""Draft without the attentions that hardly move this text's states."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.plan import Run, Spec
from shoal.speculating.chooser import Chooser, PeriodicChooser
from shoal.speculating.draft_context import DraftContext

EXAMPLES = DraftExamples(("cosine:0.9",))


def cosine(*, spec: Spec, threshold: float = 0.95, every: int = 32) -> Chooser:
    """Leave out each attention whose output state is nearly its input: cos(x, x + attention(x)) > `threshold`.

    x [hidden] is what enters the layer at the last token. Looked at anew when the text has grown by `every` tokens.
    Layer 0 stays whole; mlps all stay.

    Source: DraftOnTheFly (Metel et al., EMNLP 2024 findings, arXiv 2410.01028).

    How we differ: the states are those of the last token, not of all tokens seen, and its two structural rules, which
    the paper's abstract does not give, are left out.
    """
    if not -1 <= threshold <= 1 or every < 1:
        raise UsageError(
            f"cosine cannot use a threshold of {threshold} every {every} tokens; use -1 to 1, and 1 or more",
            code="U614",
        )
    return _Cosine(spec, threshold, every)


@dataclass
class _Cosine(PeriodicChooser):
    spec: Spec
    threshold: float
    every: int

    def chosen(self, context: DraftContext) -> tuple[Run, ...]:
        """Look at the last token's way through the layers."""
        trial, steps = context.layer_trial(), []
        state = trial.start
        for layer in self.spec.stack("decoder").layers:
            step = Run(layer.index)
            if layer.index and layer.attention is not None and layer.mlp is not None:
                moved = trial.run(Run(layer.index, part="attention"), state)
                if (
                    float(torch.cosine_similarity(state.flatten().float(), moved.flatten().float(), dim=0))
                    > self.threshold
                ):
                    step = Run(layer.index, part="mlp")
            steps.append(step)
            state = trial.run(Run(layer.index), state)
        return tuple(steps)
