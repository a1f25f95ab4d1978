"""Whether a model can be given a tree of tokens: tried on a small one, whose branches are then run one by one."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from shoal.errors import UsageError
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.speculating.draft_runner import DraftRunner
from shoal.speculating.forward_inputs import FeedsForward, ForwardInputs
from shoal.speculating.token_tree import TokenTree, TreeInputs, mask_is_additive

_WINDOW = re.compile(r"(window(_size)?|chunk_size)$")
"""Fields of a config that bound how far a layer looks back; in GPT-Neo no cache row shows it."""


def require_trees(runner: DraftRunner) -> None:
    """Raise U705 for a model that cannot verify a tree of tokens in one pass. Runs the model on a few tokens, once."""
    if mask_is_additive(runner.model) is None:
        raise _refused(
            f"the attention {runner.model.config._attn_implementation} of {type(runner.model).__name__} takes no mask "
            "of one's own; load the model with sdpa or eager"
        )
    why = runner.opened.remember("token trees", lambda: _why_not(runner))
    if why:
        raise _refused(f"{type(runner.model).__name__} {why}; leave out tree")


def require_plain_rows(cache: Cache) -> None:
    """Raise U705 unless every row of `cache` holds all tokens, each as it was given."""
    found = _other_row(cache)
    if found is not None:
        raise _refused(f"{found}; leave out tree")


def _refused(why: str) -> UsageError:
    return UsageError(f"a tree of tokens cannot be verified in one pass: {why}", code="U705")


def _other_row(cache: Cache) -> str | None:
    for number, row in enumerate(cache.layers):
        if type(row) is not DynamicLayer:
            return f"row {number} of the KV cache ({type(row).__name__}) keeps no token at a place of its own"
    return None


def _window(config: PreTrainedConfig) -> str | None:
    numbers = {name: value for name, value in config.to_dict().items() if type(value) is int and value}
    return next((name for name in numbers if _WINDOW.search(name)), None)


def _why_not(runner: DraftRunner) -> str:
    """Why trees are out of the question, or nothing."""
    model = runner.model
    config = model.config.get_text_config()
    if window := _window(config):
        return f"has layers that look back a few tokens only ({window}), counted without branches"
    # two branches of two tokens behind a text of four, of which the last one is place 0
    tokens = [3 + n % (config.vocab_size - 3) for n in range(8)]
    text = torch.tensor([tokens[:4]], device=device_of(runner.model))
    with evaluating(model):
        cache: Cache = model(text[:, :-1], use_cache=True, return_dict=True).past_key_values
        if found := _other_row(cache):
            return f"keeps another cache: {found}"
        tree = TokenTree()
        left, right = (tree.add(token, None, 0) for token in tokens[4:6])
        tree.add(tokens[6], None, left)
        tree.add(tokens[7], None, right)
        feed = ForwardInputs.of_prompt(model, text[:, :-1], runner.takes)
        whole = torch.tensor([tokens], device=text.device)
        try:
            found_logits = runner.full(TreeInputs(model, feed, tree, 4), whole, 5, cache)[-2:]
        except Exception as error:  # what a forward makes of a mask that it does not know is its own affair
            return f"does not run under a mask of one's own ({type(error).__name__})"
        branches = [[*tokens[:4], tokens[4], tokens[6]], [*tokens[:4], tokens[5], tokens[7]]]
        true = torch.cat([_last(runner, feed, branch, text) for branch in branches])
        line = torch.cat([_last(runner, feed, tokens[: 7 + n], text) for n in range(2)])
    wrong = float((line - true).abs().max())
    share = 0.1 if model.dtype == torch.float32 else 0.4  # shorter types round more
    if float((found_logits - true).abs().max()) > share * wrong + 1e-5 * float(true.abs().max()):
        return "makes other logits of a branch in a tree than of the branch alone"
    return ""


def _last(runner: DraftRunner, feed: FeedsForward, tokens: list[int], text: torch.Tensor) -> torch.Tensor:
    """Logits behind the last of `tokens` in line, [1, vocabulary]."""
    cache: Cache = runner.model(text[:, :-1], use_cache=True, return_dict=True).past_key_values
    ids = torch.tensor([tokens], device=text.device)
    return runner.full(feed, ids, len(tokens) - 3, cache)[-1:]
