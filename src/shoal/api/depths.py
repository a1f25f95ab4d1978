"""A streamer that notes how deep each token went while it is written, and the page of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shoal._version import __version__
from shoal.atomic import write_atomically
from shoal.live import Running
from shoal.record import command_line, environment
from shoal.report.depth import render_depth

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class WrittenToken:
    """One token as it was written."""

    id: int
    text: str
    """Empty for a token that is only part of a character, which stands at the token that completes it."""
    layers: float
    """That ran in the pass that wrote it."""
    confidence: float | None
    """Probability of the likeliest token in that pass."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class DepthStreamer:
    """A streamer for `generate` that knows the running policy: it collects every token with its depth, and hands it to
    `on_token`, and its finished text to `on_text`."""

    def __init__(
        self,
        tokenizer: Any,
        handle: Running,
        *,
        on_token: Callable[[WrittenToken], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self.tokenizer, self.handle = tokenizer, handle
        self.on_token, self.on_text = on_token, on_text
        self.written: list[WrittenToken] = []
        self.sure: float | None = None
        """Of the pass that was run last; `watching` sets it."""
        self._prompt = True
        self._ids: list[int] = []
        self._from = self._read = 0

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: the prompt first, then what was written."""
        if self._prompt:
            self._prompt = False
            return
        ids = value.flatten().tolist()
        depths = self.handle.trace.depths[0][-len(ids) :]
        for token, layers in zip(ids, depths, strict=True):
            one = WrittenToken(token, self._text(token), float(layers), self.sure)
            self.written.append(one)
            if self.on_token is not None:
                self.on_token(one)
            if self.on_text is not None and one.text:
                self.on_text(one.text)

    def end(self) -> None:
        """Called by `generate`; a character that was never finished is not shown."""

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[DepthStreamer]:
        """Meanwhile the confidence of each pass is noted."""

        def note(_: torch.nn.Module, __: Any, kwargs: dict[str, Any], out: Any) -> None:
            # the readout may run the model within itself, without a cache
            if kwargs.get("use_cache") is not False:
                self.sure = float(out.logits[0, -1].float().softmax(-1).max())

        hook = model.register_forward_hook(note, with_kwargs=True)
        try:
            yield self
        finally:
            hook.remove()

    def trace(self) -> dict[str, Any]:
        """The trace of the policy as plain data, with what was `written`."""
        return self.handle.trace.to_dict() | {"written": [one.to_dict() for one in self.written]}

    def _text(self, token: int) -> str:
        """What this token adds. Decoded with the tokens before it, because some tokenizers write a space only between
        two words, and because a character may take several tokens."""
        self._ids.append(token)
        before = self._decoded(self._ids[self._from : self._read])
        now = self._decoded(self._ids[self._from :])
        if now.endswith(UNFINISHED) or len(now) < len(before):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def publish_depth(path: str | Path, trace: dict[str, Any], *, prompt: str, policy: str, title: str) -> None:
    """Write the page of a trace whose `written` is there. Raises W229 when that is not possible."""
    counts, machine = trace["counts"], environment()
    facts = {
        "tokens through the model": f"{counts['tokens']}, {counts['mean_depth']:.2f} layers each, prompt included",
        "looks through the head": str(counts["heads"]),
        "simulated": f"{counts['simulated']:g} layer runs that the policy had skipped, but that ran for other tokens",
        "torch": str(machine["torch"]),
        "transformers": str(machine["transformers"]),
    }
    data = {
        "title": title, "policy": policy, "prompt": prompt, "layers": trace["layers"], "written": trace["written"],
        "facts": facts, "command": " ".join(command_line()), "version": __version__,
    }  # fmt: skip
    write_atomically(path, render_depth(data))
