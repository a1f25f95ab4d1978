"""A measure in a file of your own: how much of the stack's weight lies in each layer.

    shoal measure MODEL --measure examples/weight_share.py --set exponent=1

The function has the file's name. It is called with the model and the text, and answers with one number for each layer,
the lowest of which is the one to remove first. Keyword parameters with a default are options of the command line.
"""

from __future__ import annotations

from typing import Any

from shoal.models.opened import open_model
from shoal.scores import Scores, Traits

TRAITS = Traits(null="none", least=False, text=False, errors=False)  # it looks at no text, so none is read for it


def weight_share(
    model: Any, data: Any, *, exponent: float = 2.0, stack: str | None = None, batch: int = 1, progress: Any = None
) -> Scores:
    """The share of each layer in sum |w|^exponent over all weights of the stack."""
    found = open_model(model).stack(stack)
    sums = [
        sum(float(p.detach().abs().double().pow(exponent).sum()) for p in found.layer(index).parameters())
        for index in range(len(found.layers))
    ]
    values = tuple(own / sum(sums) for own in sums)
    unit, errors = f"share of |w|^{exponent:g}", (None,) * len(values)
    return Scores("weight-share", found.name, unit, values, errors, sequences=0, tokens=0, data="no text")
