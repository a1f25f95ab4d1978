"""What went into the mlp of a layer that has just been called, for policies that watch mlps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from shoal.executing.calls import Call, with_hidden
from shoal.executing.layer_runner import LayerRunner
from shoal.plan import Run


class MlpInput:
    """For one call of one layer: its attention is not computed again."""

    def __init__(self, runner: LayerRunner, run: Run) -> None:
        self.runner, self.run = runner, run
        self._made: dict[str, Any] = {}

    def noted(self) -> AbstractContextManager[None]:
        """Stands around the call."""
        return self.runner.attention_noted(self.run, self._made)

    def of(self, run: Run, hidden: torch.Tensor, out: torch.Tensor, call: Call) -> torch.Tensor:
        """The state in front of the mlp of `run`, which took `hidden` to `out`, [batch, tokens, hidden]; `out` where no
        mlp ran."""
        if run.part != "layer":
            return out if run.part == "attention" else hidden
        return self.runner.behind_attention(run, with_hidden(call, hidden), made=self._made)
