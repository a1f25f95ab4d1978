"""How the gates of the policy `routed` read, decide and learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shoal.deciding.policy import Grain
from shoal.errors import UsageError

Relax = Literal["straight-through", "gumbel", "soft", "sample", "top-k"]


@dataclass(frozen=True, slots=True)
class GateOptions:
    """How gates read, decide and learn."""

    grain: Grain | Literal["none"]
    net: Literal["linear", "mlp"]
    bias: float | None
    threshold: float
    scale: bool
    relax: Relax
    capacity: float
    temperature: float
    final_temperature: float
    adapter: int = 0
    """Inner width of the adapter that closed gates lead through; 0: none."""
    initial_bias: float = 2.0
    """Score at which a gate begins to learn."""


def require_sound(options: GateOptions, part: str, fill: str) -> None:
    """Raise U711 for an option out of range."""
    wrong = [
        (not 0 < options.threshold < 1, f"threshold={options.threshold:g} is outside (0, 1); write threshold=0.5"),
        (not 0 < options.capacity <= 1, f"capacity={options.capacity:g} is no share of the tokens; write capacity=0.5"),
        (
            not 0 < options.temperature < math.inf,
            f"temperature={options.temperature:g} must be above 0; write temperature=1",
        ),
        (
            not 0 < options.final_temperature < math.inf,
            f"final_temperature={options.final_temperature:g} must be above 0; write final_temperature=0.5",
        ),
        (
            not math.isfinite(options.initial_bias),
            f"initial_bias={options.initial_bias:g} must be a finite score; write initial_bias=2",
        ),
        (
            (options.grain == "row" or part == "mlp") and fill != "auto",
            f"fill={fill} is for tokens that skip an attention; with grain=row or part=mlp no key is missing, "
            "so leave it out",
        ),
        (
            options.adapter < 0 or (options.adapter > 0 and part != "layer"),
            f"adapter={options.adapter} is the inner width of what stands in the place of a whole layer; give 1 or "
            "more, with part=layer",
        ),
        (
            options.grain != "token" and options.relax == "top-k",
            f"relax=top-k ranks tokens, and with grain={options.grain} all have one score; write relax=gumbel",
        ),
    ]
    for is_wrong, what in wrong:
        if is_wrong:
            raise UsageError(f"routed: {what}", code="U711")
