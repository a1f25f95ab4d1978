"""Prompt replaced: what the layers above still read of a prompt whose states are random or another text's."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.errors import UsageError
from shoal.evaluation.behind_prompt import behind_prompt, prompt_of
from shoal.executing.bind import bind
from shoal.executing.inputs import run_stack
from shoal.executing.recorder import Outputs
from shoal.models.opened import open_model
from shoal.recording.frozen import GoesOn
from shoal.recording.observe import require_token_axis
from shoal.scores import Traits

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(null="none", least=False)
WHAT = "the replaced prompt"
By = Literal["random", "shuffled", "foreign"]


def prompt_replaced(
    model: Any,
    data: Data,
    *,
    by: By = "random",
    keep_first: int = 0,
    tail: int | None = None,
    seed: int = 0,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """KL(model || model whose prompt is replaced behind layer i), in nats per token, over the tokens behind the prompt.

    f_i = E_t[ KL(p_t || q_i,t) ] over the last `tail` tokens of each sequence (a quarter of it by default), which run
    as always; of the tokens before them, the prompt, the output of layer i is replaced, and what was put there goes on
    through the layers above and makes their keys and values. `by="random"`: x' = |x| n / |n|, n [hidden] normal, drawn
    for each sequence and place, the same behind every layer; `"shuffled"`: the channels of x in a random order, drawn
    likewise; `"foreign"`: the states of the next sequence of the data at the same layer and places. The first
    `keep_first` tokens keep theirs. 0 for the last layer, above which nothing reads. The detail holds `top1`, the share
    of tokens whose first choice stays. A diagnostic: where the curve is low, later layers read little of the prompt,
    so that their keys and values could be shared or left out.

    Source: Attend First, Consolidate Later (Ben-Artzy and Schwartz 2024, arXiv 2409.03621): random, shuffled and
    switched states; its freezing experiment is `kv-freeze`.

    How we differ: several tokens behind the prompt are judged by KL, not the answer of a single one; a foreign prompt
    replaces all tokens, where the paper switches those of one word (Italy for France). Its code counts from the input
    of layer k = i + 1. Cost: one cached pass per layer; foreign: one more, and the memory of the prompt's states behind
    all layers of one batch. Raises U694 for foreign prompts of a single sequence and for a `keep_first` beyond the
    prompt, M316 for streams side by side, U538 for a tail that does not fit or padded sequences, U537 for a model
    without a KV cache, M322 for one without next-token scores, U507 while a plan is running.
    """
    prompt = prompt_of(data, tail, WHAT)
    if not 0 <= keep_first <= prompt:
        raise UsageError(
            f"keep_first={keep_first} does not fit a prompt of {prompt} tokens; use 0 to {prompt}", code="U694"
        )
    if by == "foreign" and len(data) < 2:
        raise UsageError(
            "a foreign prompt is that of another sequence, and there is only one; give two or more (--limit 2)",
            code="U694",
        )

    def changes(rows: range) -> Callable[[int], GoesOn]:
        ids = data.ids[[(row + 1) % len(data) for row in rows], :prompt]
        foreign = _states(model, ids, stack) if by == "foreign" else {}

        @cache
        def noise(shape: torch.Size) -> torch.Tensor:
            return torch.stack([_draw(shape, seed + row) for row in rows])

        def other(layer: int, state: torch.Tensor) -> torch.Tensor:
            require_token_axis(state, (len(rows), prompt), layer)
            if by == "foreign":
                return foreign[layer].to(state)
            return _replaced(state, noise(state.shape[1:]).to(state.device), by)

        def behind(layer: int) -> GoesOn:
            def goes_on(at: int, _: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
                if at != layer:
                    return made
                return torch.cat([made[:, :keep_first], other(layer, made)[:, keep_first:]], 1)

            return goes_on

        return behind

    kept = (f"the first {keep_first} tokens of each prompt kept",) if keep_first else ()
    return behind_prompt(
        model, data, changes, measure="prompt-replaced", what=WHAT, tail=tail, notes=kept, stack=stack, batch=batch,
        progress=progress,
    )  # fmt: skip


def _draw(shape: torch.Size, seed: int) -> torch.Tensor:
    """Normal numbers, the same for a sequence whatever its batch."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _replaced(state: torch.Tensor, noise: torch.Tensor, by: str) -> torch.Tensor:
    if by == "shuffled":
        return state.gather(-1, noise.argsort(-1))
    length = state.float().norm(dim=-1, keepdim=True)
    return (noise / noise.norm(dim=-1, keepdim=True) * length).to(state.dtype)


def _states(model: Any, ids: torch.Tensor, stack: str | None) -> dict[int, torch.Tensor]:
    """What each layer makes of `ids`, by layer."""
    opened, outputs, whole = open_model(model), Outputs(), bind(model)
    found = opened.stack(stack)
    with whole.running(), whole.executor(found.name).recording(outputs):
        run_stack(opened.model, found, ids, None)
    return outputs.states
