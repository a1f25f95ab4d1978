"""What is wrong with the tensors outside the layers: missing, left over, of another shape, tied or not."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from shoal.models.diagnosis.configs import Fields, text_of
from shoal.models.diagnosis.finding import Finding
from shoal.models.diagnosis.layers import Layers
from shoal.models.matching_tensors import unprovided
from shoal.models.names import renamed, state_shapes
from shoal.models.stacks import Stack

TIE = "tie_word_embeddings"


def compare_outside(
    model: PreTrainedModel, stack: Stack, layers: Layers, findings: list[Finding]
) -> tuple[set[str], list[str], tuple[tuple[str, str], ...]]:
    """(files' tensors that belong nowhere, the model's tensors that are missing, pairs that are tied and both there);
    what is wrong is added to `findings`, missing tensors apart, which a tie may explain."""
    state = state_shapes(model)
    found = renamed(model, layers.outside, state)
    left_over = {file for file, one in found.items() if one.name is None and not one.ignored}
    inside = f"{stack.path}."
    strange = {file for file, one in found.items() if one.name is not None and one.name.startswith(inside)}
    left_out = ("there", "no part of the model", "it is left out")
    findings += [Finding(f"the tensor {file}", *left_out) for file in sorted(strange)]
    # transformers says so and loads the model all the same, as with the head of another class
    findings += [Finding(f"the tensor {file}", *left_out, breaks=False) for file in sorted(left_over)]
    strange |= left_over
    for file, one in found.items():
        shape = layers.outside[file]
        if one.name is not None and not one.converted and shape is not None and shape != state[one.name]:
            findings.append(Finding(f"the tensor {file}", f"{list(shape)}", f"{list(state[one.name])}", None))
    held = {one.name: file for file, one in found.items() if one.name is not None}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {}) or {}
    layers_too = set(held) | {name for name in state if name.startswith(inside)}
    missing = unprovided(model, state, layers_too)
    pairs = tuple((held[a], held[b]) for a, b in tied.items() if a in held and b in held)
    for target, origin in pairs:
        findings.append(
            Finding(
                f"the tensor {target}",
                f"there beside {origin}, though {TIE} says that they are one",
                "left out when it is equal, or not tied",
                "its bytes decide: left out when they are equal, else the config says that it is not tied",
                breaks=False,
            )
        )
    return strange, missing, pairs


def report_missing(missing: list[str], findings: list[Finding]) -> None:
    """A finding for each tensor that no file holds."""
    findings += [Finding(f"the tensor {name}", "missing", "in a file", None) for name in missing]


def tied_raw(raw: Fields, tie: bool) -> Fields:
    """`raw` with its embeddings tied, or not."""
    new = copy.deepcopy(raw)
    places = [part for part in (new, text_of(new)) if TIE in part] or [new]
    for part in places:
        part[TIE] = tie
    return new
