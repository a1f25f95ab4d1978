"""`Speculator(model, draft="exit:8").generate(...)` returns what `model.generate(...)` returns, drafted by itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMode

from shoal.decoding.blame import naming_the_config
from shoal.errors import UsageError
from shoal.models.kinds import require_causal
from shoal.models.stacks import unwrap
from shoal.speculating.draft_runner import DraftRunner
from shoal.speculating.generation_settings import GenerationSettings
from shoal.speculating.lengths import Confidence, Length
from shoal.speculating.loop import Loop, answer
from shoal.speculating.masked_draft import Masked
from shoal.speculating.parse import ParsedDraft, parse_draft
from shoal.speculating.rows import require_dynamic
from shoal.speculating.stats import PhaseProfiler, Stats
from shoal.speculating.tree_masks import require_trees


class Speculator:
    """Self-speculative decoding: some layers of the model draft, all of them verify, and the text is the base's.

    Greedy text is token-identical to `model.generate` but for near ties, which `stats.close_calls` counts: a pass over
    several tokens rounds differently from a pass over one (float32: about 1e-5). Sampled text has the base model's
    distribution. Logits processors act on draft and base model alike; stopping criteria are asked at every token.

    `model`: any causal language model of transformers whose KV cache can be cropped; it is touched during `generate`
    only. `draft`: a kind with its options (exit:8, skip:0-11,14-29, lookup+exit:8, swift+tree; see `shoal ls drafts`).
    `length`: tokens drafted at most. `confidence`: see `Length`. `share`: reuse of the layers that the draft ran as the
    base model would. `count`: layers counted by hooks. Raises U58x and P1xx for what cannot be drafted with, M322 for a
    model that is not causal, U611 for one that keeps a recurrent state, U705 for one that cannot verify a tree, P122
    when a plan is running on it.
    """

    def __init__(
        self,
        model: nn.Module,
        draft: str | ParsedDraft = "exit",
        *,
        length: int = 4,
        confidence: Confidence = "auto",
        share: bool = True,
        count: bool = True,
    ) -> None:
        inner = unwrap(model)
        require_causal(inner, "speculation")
        if getattr(inner, "_is_stateful", False):
            raise UsageError(
                f"{type(inner).__name__} keeps a recurrent state, from which rejected tokens cannot be taken back; "
                "generate without speculation",
                code="U611",
            )
        self.model: PreTrainedModel = inner
        self.runner = DraftRunner(inner, share=share)
        self.recipe = parse_draft(draft, self.runner.spec) if isinstance(draft, str) else draft
        if isinstance(self.recipe.chooser, Masked):
            self.runner.share = False  # its layers have seen masks where the drafted tokens stand
        self.length = Length(length, confidence)
        self.count = count
        self.stats = Stats()
        """Of the last generation."""
        if self.recipe.chooser is not None:
            self.runner.prepare(self.recipe.chooser.begin(self.runner.spec))
        if self.recipe.tree is not None:
            require_trees(self.runner)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As `model.generate` for one sequence [1, length], greedy or sampled; `stats` then tells what it took.

        Raises U615 for beam search and other ways of decoding, for assistants and for outputs that a shared pass does
        not have, U616 for more than one sequence, U612 or U613 for a KV cache that cannot be cropped, `ModelError` M379
        for a generation config by which transformers cannot generate.
        """
        if kwargs.get("assistant_model") is not None:
            raise UsageError("speculation drafts with the model itself; leave out assistant_model", code="U615")
        if kwargs.get("cache_implementation") == "paged":  # generate would go another way and never draft
            raise UsageError(
                "speculation takes rejected tokens back from the KV cache, and a paged one cannot give them back; "
                "leave out cache_implementation",
                code="U612",
            )
        streamer = kwargs.get("streamer")
        decode = partial(self._decode, streamer)
        with naming_the_config(self.model), _stop_strings(self.model, kwargs) as asked:
            return self.model.generate(inputs, **asked, custom_generate=decode)

    def _decode(
        self,
        streamer: Any,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        """Called by `generate` once inputs, cache, processors and criteria are prepared."""
        _refuse(generation_config, input_ids, kwargs)
        self.stats = Stats()
        profiler = PhaseProfiler(self.stats, input_ids.device)
        as_dict = generation_config.return_dict_in_generate
        rules = GenerationSettings(
            logits_processor,
            stopping_criteria,
            bool(generation_config.do_sample),
            int(generation_config.max_length),
            streamer,
            [] if as_dict and generation_config.output_scores else None,
            [] if as_dict and generation_config.output_logits else None,
        )
        length = Length(self.length.most, self.length.confidence)
        with self.runner as runner, model._optimize_model_for_decode():
            loop = Loop(runner, self.recipe.chooser, self.recipe.finder, length, rules, profiler, self.recipe.tree)
            prefill = partial(model._prefill, input_ids, generation_config, kwargs, is_first_iteration=True)
            if self.count:
                with profiler.counting(runner.stack, runner.facts.layers):
                    ids, cache = loop.run(input_ids, prefill, kwargs)
            else:
                ids, cache = loop.run(input_ids, prefill, kwargs)
        loop.text.end()
        self.stats.shared = loop.prepared.shared if loop.prepared is not None else 0
        self.stats.draft = self.recipe.says(loop.prepared.steps if loop.prepared is not None else ())
        profiler.close()
        return answer(ids, cache, rules, as_dict)


def _refuse(config: Any, ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UsageError(
            f"speculation decodes greedily or by sampling, and {mode.value.replace('_', ' ')} is asked for; "
            "leave it out, or generate without speculation",
            code="U615",
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise UsageError(
                f"{name} asks for what a verification shared with its draft does not have; leave it out", code="U615"
            )
    if config.guidance_scale is not None and config.guidance_scale != 1:
        raise UsageError(
            "guidance_scale keeps a KV cache of its own, which cannot follow rejected tokens; leave it out", code="U615"
        )
    if ids.shape[0] != 1 or ids.dim() != 2:
        raise UsageError(
            f"speculation generates one sequence at a time, not {ids.shape[0]}; call it once for each", code="U616"
        )
    if not kwargs.get("use_cache", True) or kwargs.get("past_key_values") is None:
        raise UsageError("speculation needs the KV cache; leave out use_cache=False", code="U612")

    require_dynamic(kwargs["past_key_values"])


@contextmanager
def _stop_strings(model: PreTrainedModel, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`arguments` with a stopping criterion in the place of stop strings: `generate` loses the tokenizer on its way to
    a decoding loop of one's own. Meanwhile the model's own config names none, which `generate` would fill in again."""
    asked, own = dict(arguments), model.generation_config
    tokenizer = asked.pop("tokenizer", None)
    if "stop_strings" in asked and asked["stop_strings"] is None:  # none are wanted, whatever the config says
        yield asked
        return
    given = copy.deepcopy(asked.get("generation_config"))
    strings = asked.pop("stop_strings", None) or getattr(given, "stop_strings", None) or own.stop_strings
    if strings is None or tokenizer is None:
        yield asked if strings is None else asked | {"stop_strings": strings}
        return
    if given is not None:
        given.stop_strings = None
        asked["generation_config"] = given
    criteria = [*(asked.pop("stopping_criteria", None) or []), StopStringCriteria(tokenizer, strings)]
    model.generation_config = copy.deepcopy(own)
    model.generation_config.stop_strings = None
    try:
        yield asked | {"stopping_criteria": StoppingCriteriaList(criteria)}
    finally:
        model.generation_config = own
