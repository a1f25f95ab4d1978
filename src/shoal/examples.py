"""What a registered function is tried with, said beside it: the contract tests read it through the registry.

An entry's file may hold `EXAMPLES`, one of the classes below; policies, drafts, transforms and formats must. Texts are
as a person types them and fit a model of four layers. A new file is tested by existing, and no list in the tests names
it.
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
    """A policy on a plan of four runs."""

    deciding: tuple[str, ...] = ()
    """Each skips something of a generated text, and decides the same in one pass as token by token."""
    never: tuple[str, ...] = ()
    """Each skips nothing, so that the logits are the whole model's, bit for bit."""
    always: Mapping[str, str] = field(default_factory=dict)
    """Each decides the same for every token: the plan, as layers, that computes the same."""
    refused: tuple[Refusal, ...] = ()
    plan: str = "0-3"
    """What all but the refused texts are tried on."""


@dataclass(frozen=True, slots=True)
class DraftExamples:
    """A draft of self-speculation."""

    texts: tuple[str, ...]
    """Each must write what plain decoding writes; the first is the usual one."""


@dataclass(frozen=True, slots=True)
class CacheExamples:
    """A cache that compresses rows, on four layers."""

    texts: tuple[str, ...]
    """Each holds fewer values than the plain cache of 24 tokens, or as many."""
    null: tuple[str, ...]
    """Each restores what was stored, bit for bit."""
    refused: tuple[Refusal, ...] = ()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodExamples:
    """A method, on models of four or five layers of which one adds nothing to the hidden state. A method that says
    nothing removes whole layers, as many as `drop` says, and first the one that adds nothing."""

    needed: Mapping[str, Any] = field(default_factory=dict)
    """Options without which it does not run. {task} in a text is the name of a task file of two items or more."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Options with which it takes little time, where it does not matter how good the plan is."""
    sequences: int = 3
    """How many calibration sequences it needs."""
    chooses_by: Literal["states", "loss", "place"] = "states"
    """What decides which layer goes first. states: the one that adds nothing, on any text. loss: the same on a text of
    the model's own; on a few random tokens another may do harm. place: which one need not show in the layers."""
    counts: Literal["layers", "parts", "steps", "budget"] = "layers"
    """What `drop` counts: layers, attentions and mlps, or steps that are saved while every layer runs; budget: it takes
    no number, only a budget."""
    exact: bool = True
    """Whether it removes no more than it must."""
    nested: bool = True
    """Whether what goes for a smaller number goes for a larger one too."""
    most: int = 3
    """How many of four layers may go."""
    budget: str | None = "params=0.8"
    """A budget that it meets; None for a method that refuses every budget."""
    writable: bool = True
    """Whether its plans can be written as stock checkpoints."""
    best_first: bool = False
    """Whether its trace begins with the best plan; otherwise it ends with the one that was taken."""
    without_data: str | None = None
    """The plan of four layers of which two go, for a method that looks neither at the text nor at the model."""
    new_tensors: Mapping[str, Any] = field(default_factory=dict)
    """Options with which its plan names new tensors, where its own are those of a layer of the base."""


@dataclass(frozen=True, slots=True)
class TermExamples:
    """A term, on random tokens and a model of six layers; `gates` have random tensors and so does LoRA."""

    text: str
    """It with options by which it has something to say there."""
    plan: str = "0,1,4,5"
    policy: str = ""
    learn: tuple[str, ...] = ("lora:rank=4",)


@dataclass(frozen=True, slots=True)
class RecipeExamples:
    """A recipe, on a model of five layers."""

    plan: str = "0-1,3-4"
    """What it heals; the tensors that `:own` names are those of layer 3, and lenses of exits are fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatExamples:
    """A format of another tool."""

    says: Literal["everything", "layers in any order", "removed parts", "removed layers"]
    """Which plans come back from it as they were."""
    whole: bool = True
    """Whether it can say that every layer runs."""
