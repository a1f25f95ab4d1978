"""Draft by looking the last tokens up in the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.plan import Spec
from shoal.speculating.chooser import Finder

EXAMPLES = DraftExamples(("lookup:1",))


def lookup(*, spec: Spec, ngram: int = 2) -> Finder:
    """Draft what followed the last time that the last tokens stood in the text: no layer runs for it.

    `ngram`: the longest run of tokens that is looked up; shorter ones follow when it is not found. Good where the text
    repeats its prompt (summaries, edits of code). In lookup+exit:8 the layers draft where nothing is found.

    Source: prompt lookup decoding (Saxena 2023), found by transformers' own generator.
    """
    if ngram < 1:
        raise UsageError(f"a lookup of {ngram} tokens finds nothing; use ngram=1 or more", code="U610")
    return _Lookup(ngram)


@dataclass(frozen=True)
class _Lookup:
    ngram: int

    def find(self, ids: torch.Tensor, most: int) -> list[int]:
        """Called by the loop."""
        length = ids.shape[1]
        finder = PromptLookupCandidateGenerator(
            num_output_tokens=most, max_matching_ngram_size=self.ngram, max_length=length + most + 1
        )
        return finder.get_candidates(ids)[0][0, length:].tolist()
