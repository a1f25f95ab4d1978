"""The checks of a proof: what the fresh process answered beside what the live side expects, question by question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shoal.writing.reference import Reference


@dataclass(frozen=True, slots=True)
class Check:
    """One question of a proof, its answer and the limit that the answer had to keep."""

    name: str
    passed: bool
    value: float | str
    limit: float | str
    how: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value} where {self.limit} is needed ({self.how})"


def limit_for(dtype: str, largest: float) -> float:
    """By how much logits may differ: 1e-4, or 4 steps of the dtype at the largest logit where that is more.

    The reloaded model runs the same kernels on the same numbers, so the difference is 0 nearly always. What remains is
    the order of a sum, when a kernel is chosen by the address of a tensor: an error of a few units in the last place.
    float32 has 24 bits, so 1e-4 holds up to logits of 200; with bfloat16 (8 bits) a logit of 20 is itself known to
    0.08 only, and 4 such steps are allowed. Faults smaller than that are found by the check of the weights, bit by bit.
    """
    return max(1e-4, 4 * torch.finfo(getattr(torch, dtype)).eps * largest)


def conclusions(reference: Reference, answer: dict[str, Any]) -> Iterator[Check]:
    """The checks of one folder, from what `proof_child.answer` said of it."""
    if "error" in answer:
        yield Check("loads", False, str(answer["error"])[:500], "no error", f"{reference.auto} in a fresh process")
        return
    expected = reference.expected
    keys = [
        f"{kind.removesuffix('_keys')} {key}"
        for kind, found in answer["keys"].items()
        for key in found
        if kind != "unexpected_keys" or key not in reference.carried
    ]
    loads = f"missing, unexpected and mismatched tensors of {reference.auto} in a fresh process"
    yield Check("loads", not keys, len(keys), 0, f"{loads}: {', '.join(keys[:3])}" if keys else loads)
    if reference.adapter is not None:  # the folder alone has a proof of its own
        yield from _logits(reference, answer)
        if reference.prompts:
            yield _greedy(reference, answer["greedy"])
        return
    yield from _weights(reference, answer["weights"])
    if reference.depths is not None:
        yield from _of_kind(reference, answer)
        return
    yield from _logits(reference, answer)
    if reference.prompts:
        yield _greedy(reference, answer["greedy"])
    for name, value, wanted, how in (
        ("parameters", answer["parameters"], expected.parameters, "by unique storage, against the plan's cost"),
        ("depth", answer["depth"], expected.depth, "num_hidden_layers, against the layers of the plan"),
    ):
        yield Check(name, value == wanted, value, wanted, how)
    if answer["kv"] is not None:
        yield from _kv(reference, answer["kv"])


def _of_kind(reference: Reference, answer: dict[str, Any]) -> Iterator[Check]:
    """What any model but a causal one is asked."""
    expected = reference.expected
    limit = limit_for(reference.dtype, reference.largest or answer["largest"])
    groups = {"outputs": answer["outputs"]} if answer["outputs"] else {}
    if not groups and answer["cached_whole"]:
        groups = {"outputs cached": {f"{name}, cached against whole": v for name, v in answer["cached_whole"].items()}}
    for name, values in groups.items():
        worst = max(values, key=lambda n: (values[n] != values[n], values[n]))
        how = f"largest absolute difference, {reference.dtype}, worst of {len(values)}: {worst}"
        yield Check(name, values[worst] <= limit, values[worst], limit, how)
    if reference.greedy:
        yield _greedy(reference, answer["greedy"])
    found = answer["parameters"]
    how = "by unique storage, against the plan's cost"
    yield Check("parameters", found == expected.parameters, found, expected.parameters, how)
    for stack, depth in (expected.depths or {}).items():
        found = answer["depths"][stack]
        yield Check(f"depth of {stack}", found == depth, found, depth, "config.json, against the layers of the plan")
    if answer["kv"] is not None:
        how = "elements of the decoder's self-attention in its cache, against the plan's cost"
        yield Check("KV held", answer["kv"] == expected.kv_elements, answer["kv"], expected.kv_elements, how)


def _weights(reference: Reference, found: dict[str, int]) -> Iterator[Check]:
    expected = reference.expected
    how = "tensors whose sum of bits is not that of the base's layer"
    if expected.weights is not None:
        wrong = sorted(n for n in expected.weights.keys() | found.keys() if expected.weights.get(n) != found.get(n))
        yield Check("weights", not wrong, len(wrong), 0, f"{how}: {', '.join(wrong[:3])}" if wrong else how)
    elif expected.digest is not None:
        same = digest(found) == expected.digest
        yield Check("weights", same, "same" if same else "changed", "same", "tensors as they were when it was written")


def _logits(reference: Reference, answer: dict[str, Any]) -> Iterator[Check]:
    """Live and reloaded logits by kind; without a live side, cached against uncached ones of the folder itself."""
    limit = limit_for(reference.dtype, reference.largest or answer["largest"])
    groups: dict[str, dict[str, float]] = {}
    for name, value in answer["logits"].items():
        tokens, _, kind = name.partition(".")
        groups.setdefault("logits padded" if tokens == "padded" else f"logits {kind}", {})[name] = value
    if not groups:
        groups = {"logits cached": {f"{n}, cached against uncached": v for n, v in answer["cached_uncached"].items()}}
    for name, values in sorted(groups.items(), reverse=True):
        if values:
            worst = max(values, key=lambda n: (values[n] != values[n], values[n]))
            how = f"largest absolute difference, {reference.dtype}, worst of {len(values)}: {worst}"
            yield Check(name, values[worst] <= limit, values[worst], limit, how)


def _greedy(reference: Reference, found: list[list[int]]) -> Check:
    """Tokens may part where the live model is undecided: two logits that each move by the limit can change places when
    they are less than twice the limit apart. From there on the texts differ rightly, so the rest is not compared."""
    near = 2 * limit_for(reference.dtype, reference.largest)
    parted, wrong = 0, 0
    for (tokens, gaps), other in zip(reference.greedy, found, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), None)
        if place is None:
            wrong += len(tokens) != len(other)
        else:
            parted += gaps[place] <= near
            wrong += gaps[place] > near
    how = f"prompts of {len(found)} whose {reference.tokens} greedy tokens differ from the live plan's"
    ties = f"; {parted} part at a near tie (two best scores within {near:.1e})" if parted else ""
    return Check("greedy tokens", wrong == 0, wrong, 0, how + ties)


def _kv(reference: Reference, kv: dict[str, Any]) -> Iterator[Check]:
    expected = reference.expected
    length = reference.tensors["random.ids"].shape[1]
    for name, value, wanted, how in (
        (
            "KV per token",
            kv["per_token"],
            expected.kv_per_token,
            "bytes, measured in its cache, against the plan's cost",
        ),
        ("KV held", kv["elements"], expected.kv_elements, f"elements in its cache after {length} tokens"),
    ):
        yield Check(name, value == wanted, value, wanted, how)
    if expected.rows is not None:
        same = kv["rows"] == expected.rows
        how = "window and elements of every row of its cache, in order, against the live cache's"
        yield Check("KV rows", same, "same" if same else f"{kv['rows']}"[:200], "same", how)


def digest(sums: dict[str, int]) -> str:
    """One line for the bit sums of all tensors."""
    return "sha256:" + hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
