"""What `generate` cannot be asked while a policy decides, and who else may not run the model meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import torch

from shoal.errors import PlanError, UsageError, tell_unused
from shoal.plan.generate_ways import BEAMS_POLICY, CHUNKED_POLICY, TWO_THREADS, says


def refuse_asked_of_policy(settings: Any) -> None:
    """Raise P145 for a prompt in pieces, U580 for beams over a KV cache. Nothing is compiled: a decision is a jump that
    no compiled step can make."""
    settings.disable_compile = True
    if settings.compile_config is not None:
        tell_unused("compile_config", "a policy decides while the model runs")
    if (pieces := getattr(settings, "prefill_chunk_size", None)) is not None:
        sentence, code = says(CHUNKED_POLICY, asked=f"prefill_chunk_size={pieces}")
        raise PlanError(sentence, code=code)
    if settings.use_cache is not False and (settings.num_beams or 1) > 1:
        sentence, code = says(BEAMS_POLICY)
        raise UsageError(sentence, code=code)


def prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Columns of the prompt that `generate` is called with; 1 where it starts from its own first token."""
    given = (args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    found = next((one for one in given if isinstance(one, torch.Tensor) and one.dim() > 1), None)
    return 1 if found is None else int(found.shape[1])


class OneThread:
    """Sees to it that one thread alone is in a forward of a model."""

    def __init__(self) -> None:
        self._inside: int | None = None

    def enter(self) -> None:
        """A forward begins. Raises P146 when another thread is in one."""
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        if self._inside not in (None, me) and self._inside in (thread.ident for thread in threading.enumerate()):
            sentence, code = says(TWO_THREADS)
            raise PlanError(sentence, code=code)
        self._inside = me

    def leave(self) -> None:
        """A forward of this thread has ended, by an error or not."""
        if not torch.compiler.is_compiling() and self._inside == threading.get_ident():
            self._inside = None
