"""model -> Spec, for a live model."""

from __future__ import annotations

from torch import nn

from shoal.models.opened import open_model
from shoal.plan import Spec


def inspect(model: nn.Module) -> Spec:
    """The Spec of a live model (on any device, `meta` included), by one forward of one token for each stack.

    Raises `ModelError` (M30x) when the layers cannot be found or their loop cannot be followed.
    """
    return open_model(model).spec
