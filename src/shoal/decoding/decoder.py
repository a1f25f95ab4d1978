"""The one way from a prompt to tokens: `generate` of a live model by the quickest loop that gives the same tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from shoal.decoding.blame import naming_the_config
from shoal.decoding.fast import LEAST_LENGTH, FastDecoder
from shoal.decoding.fast_legal import why_not_thin
from shoal.decoding.fast_loop import thin_loop

LONGEST = 4096
"""Tokens of prompt and text together up to which layers are compiled beforehand."""


class Decoder:
    """Takes what transformers' `generate` takes and returns what it returns, under whatever plan or policy is running.

    Compiled layers write where they were asked for, else the thin loop, else transformers' own loop.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        """`compiled`: compile the layers when they are first needed (`FastDecoder`, and what it raises); `prepare` does
        it before the first text, and longer texts are then written by the thin loop."""
        self.model: Any = model
        self.compiled = FastDecoder(model) if compiled else None
        self.longest: int | None = None
        """Tokens of prompt and text that compiled layers write at most; None for no limit."""
        self.why_not_compiled: str | None = None
        """Why compiled layers did not write the last text; None where they did or were not asked for."""
        self.why_not_thin: str | None = None
        """Why transformers' own loop wrote the last text; None where it did not."""

    def prepare(self, most: int = LONGEST) -> None:
        """Compile for one sequence and every length of cache up to `most` tokens, so that no text waits for it."""
        if self.compiled is None:
            return
        length = LEAST_LENGTH
        self.compiled.prepare(length)
        while length < min(most, LONGEST):
            length *= 2
            self.compiled.prepare(length)
        self.longest = length

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """What `model.generate(inputs, **kwargs)` returns; with compiled layers it raises what they raise. Raises
        `ModelError` M379 for a generation config by which transformers cannot generate."""
        with naming_the_config(self.model):
            return self._generate(inputs, kwargs)

    def _generate(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
        self.why_not_compiled, self.why_not_thin = self._too_long(inputs, kwargs), None
        if self.compiled is not None and self.why_not_compiled is None:
            return self.compiled.generate(inputs, **kwargs)
        self.why_not_thin = why_not_thin(self.model, kwargs)
        if self.why_not_thin is not None:
            return self.model.generate(inputs, **kwargs)
        loop = partial(thin_loop, streamer=kwargs.get("streamer"))
        return self.model.generate(inputs, custom_generate=loop, **kwargs)

    def _too_long(self, inputs: torch.Tensor | None, arguments: dict[str, Any]) -> str | None:
        if self.longest is None:
            return None
        ids, new = arguments.get("input_ids", inputs), arguments.get("max_new_tokens")
        if ids is None or new is None:
            return "the length of the text is not known beforehand"
        tokens = ids.shape[-1] + new
        return f"{tokens} tokens are more than the {self.longest} compiled for" if tokens > self.longest else None
