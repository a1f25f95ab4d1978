"""Families x kinds of plans: under vLLM the tokens and log-probabilities of transformers."""

from __future__ import annotations

import pytest

from .conftest import FOLDERS, Case, families

WRONG = ("opt", "gpt_neox")
"""Families whose plain model vLLM's Transformers backend already computes wrong, in 0.32 (a test below holds it)."""
KINDS = sorted({one.stem for name in families() for one in (FOLDERS / name).glob("*.json")} - {"plain"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [one for one in families() if one not in WRONG])
def test_tokens_and_scores_are_those_of_transformers(family: str, kind: str) -> None:
    if not (FOLDERS / family / kind).is_dir():
        pytest.skip("Shoal refuses this plan for the family")
    case = Case(f"{family}/{kind}")
    found = case.run()
    assert case.same(found)
    assert case.furthest(found) < 1e-3
    assert found["parameters"] == case.said["parameters"]
    assert found["rows"] == case.said["rows"]


@pytest.mark.parametrize("family", [one for one in families() if one in WRONG])
def test_a_family_that_is_wrong_without_a_plan_is_wrong_by_itself(family: str) -> None:
    plain, planned = Case(f"{family}/plain"), Case(f"{family}/identity")
    assert not plain.same(plain.run(model_impl="transformers"))
    assert not planned.same(planned.run())


CHUNKS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 8}


@pytest.mark.parametrize("kind", ["loop", "shared-kv", "parts", "everything"])
@pytest.mark.parametrize("options", [{"enable_prefix_caching": True}, CHUNKS, CHUNKS | {"enable_prefix_caching": True}])
def test_prefix_caching_and_chunked_prefill_change_nothing(kind: str, options: dict[str, object]) -> None:
    case = Case(f"llama/{kind}")
    case.said["prompts"] = [*case.said["prompts"], *case.said["prompts"]]  # the second three find their prefix
    case.said["tokens"] = [*case.said["tokens"], *case.said["tokens"]]
    case.scores |= {str(int(n) + 3): one for n, one in list(case.scores.items())}
    found = case.run(max_num_seqs=3, **options)
    assert case.same(found) and case.furthest(found) < 1e-3
