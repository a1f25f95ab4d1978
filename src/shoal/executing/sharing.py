"""What the runs of one plan take from each other's layers during a forward."""

from __future__ import annotations

from typing import assert_never

from shoal.plan import Run, Step
from shoal.plan.steps import LayerKV, kv_source, sources_read


class Sharing:
    """Which layers make something that later runs take."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.sources = sources_read(steps)
        self.kv: set[int] = set()
        """Layers whose keys and values are kept for later runs."""
        for source in self.sources:
            match source:
                case LayerKV():
                    self.kv.add(source.layer)
                case _:
                    assert_never(source)

    def concerns_kv(self, run: Run) -> bool:
        """Whether the keys and values of this run are kept for others, or are another layer's."""
        return run.part != "mlp" and (run.layer in self.kv or kv_source(run) is not None)
