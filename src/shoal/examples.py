"""What a registered function is tried with, said beside it: the contract tests read it through the registry.

A policy's, a draft's or a transform's file holds `EXAMPLES`, one of the classes below. Texts are as a person types them
and fit a model of four layers. So a new file is tested by existing, and no list in the tests names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Refusal:
    """A text that must be refused."""

    title: str
    """What is wrong with it, in a few words: the name of the test's case."""
    text: str
    code: str
    words: str
    """A pattern that the message holds."""
    plan: str = "0-3"
    family: str = "llama"


@dataclass(frozen=True, slots=True)
class PolicyExamples:
    """A policy on the layers 0-3."""

    deciding: tuple[str, ...] = ()
    """Each skips something of a generated text, and decides the same in one pass as token by token."""
    never: tuple[str, ...] = ()
    """Each skips nothing, so that the logits are the whole model's, bit for bit."""
    always: Mapping[str, str] = field(default_factory=dict)
    """Each decides the same for every token: the plan, as layers, that computes the same."""
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class DraftExamples:
    """A draft of self-speculation."""

    texts: tuple[str, ...]
    """Each must write what plain decoding writes; the first is the usual one."""


@dataclass(frozen=True, slots=True)
class TransformExamples:
    """A transform."""

    role: Literal["fitted", "corrected", "trained", "merge", "other"] = "other"
    """fitted: fits a stand-in that is never worse than dropping on its text. corrected, trained: needs nothing in the
    place of a layer that does nothing. merge: of two equal layers makes either."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Options that suit a model of hidden size 32, or take little time."""
    null: Mapping[str, Any] | None = None
    """Options of a merge with which it is dropping, bit for bit."""
    refused: tuple[tuple[tuple[int, ...], Mapping[str, Any], str], ...] = ()
    """(removed layers, options, code) that must be refused."""
