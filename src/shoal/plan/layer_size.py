"""How large what a run calls of its layer is, and how many scores its attention makes."""

from __future__ import annotations

from shoal.plan.spec import LayerSpec
from shoal.plan.steps import Run, map_source


def score_width(layer: LayerSpec, run: Run) -> int:
    """Half the FLOPs of a query and a key: of their score, and of the value that it weighs."""
    if map_source(run) is None:
        return layer.width
    return layer.width - layer.width * layer.kv.key_dim // max(1, layer.kv.key_dim + layer.kv.value_dim)


def layer_size(layer: LayerSpec, run: Run) -> tuple[dict[str, tuple[int, int]], int]:
    """Parameters by piece (so that 12a and 12m together count a layer once), those in matrices and those in vectors
    apart, and FLOPs for one token."""
    parts = {"attention": layer.attention, "mlp": layer.mlp}
    there = {name: part for name, part in parts.items() if part is not None}
    pieces = {name: (part.params - part.vectors, part.vectors) for name, part in there.items()}
    vectors = layer.vectors - sum(one for _, one in pieces.values())
    matrices = layer.params - layer.vectors - sum(one for one, _ in pieces.values())
    pieces["rest"] = matrices, vectors
    flops = layer.flops
    for name, part in there.items():
        if run.part not in ("layer", name):
            del pieces[name]
            flops -= part.flops
    return pieces, flops


def causal_pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs of a causal pass over `tokens` tokens, each query seeing at most `window` keys."""
    full = tokens * (tokens + 1) // 2
    beyond = tokens - window if window is not None and window < tokens else 0
    return full - beyond * (beyond + 1) // 2
