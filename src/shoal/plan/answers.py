"""The columns of the table of what a step can do, its answers, and the sentences of its refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal[
    "live", "uncached", "cached", "static_cache", "padded", "checkpointed", "offloaded", "sharded", "beside_encoder",
    "paged", "gated", "drafted", "fast", "streamed", "written", "gguf",
]  # fmt: skip
"""What can be done with a step; `WAYS` says when it is right there."""

WAYS: dict[Way, str] = {
    "live": "run on a model without a policy; no refusal",
    "uncached": "one pass without a KV cache; the stock layers called by hand",
    "cached": "a prefill and single tokens over a dynamic cache; one pass without a cache",
    "static_cache": "the same over a cache of fixed length; one pass without a cache",
    "padded": "a left-padded batch; each sequence alone",
    "checkpointed": "gradient checkpointing in training; the gradients without it",
    "offloaded": "layers that accelerate brings in for each call; the model in memory",
    "sharded": "layers that FSDP2 spreads over processes (fully_shard); the model in one piece",
    "beside_encoder": "the decoder of an encoder-decoder; one pass without a cache",
    "paged": "continuous batching (generate_batch); generate",
    "gated": "a policy skips the step by a gate of its own; the plan without the step, or with it",
    "drafted": "self-speculation drafts with the step; plain decoding, token by token",
    "fast": "the fast decode loop; generate, token by token",
    "streamed": "a loss layer by layer, each read once for all plans; the running plan, bit for bit",
    "written": "a stock checkpoint; the live plan",
    "gguf": "layers of a GGUF file copied block by block; the base's blocks, bit for bit",
}
"""Each way, and behind the semicolon what the result must equal to be right."""


@dataclass(frozen=True, slots=True)
class Right:
    """The result is what `WAYS` says that it must equal."""

    note: str = ""


@dataclass(frozen=True, slots=True)
class Otherwise:
    """The result is right too, but is come by in another way."""

    note: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal: its code, and its sentence with {step}, {layer}, {source}, {weights}, {span} and {before} to fill."""

    code: str
    sentence: str


Answer = Right | Otherwise | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The answers for one trait."""

    live: Answer
    uncached: Answer
    cached: Answer
    static_cache: Answer
    padded: Answer
    checkpointed: Answer
    offloaded: Answer
    sharded: Answer
    beside_encoder: Answer
    paged: Answer
    gated: Answer
    drafted: Answer
    fast: Answer
    streamed: Answer
    written: Answer
    gguf: Answer


OK = Right()
ONE_BY_ONE = Otherwise("plans one by one")

UNDECIDED = Refused(
    "P125",
    "step {step} is decided at run time by a policy, and none is given; name one (shoal ls policies), or write the "
    "plan without gates and exits",
)
SHARDED_TENSORS = Refused(
    "P153",
    "layer {layer} is spread over processes, and what shards it would put its own tensors back over {weights!r}; make "
    "them modules of the model before it is sharded (shoal.apply with modules=True)",
)
KV_BESIDE_ENCODER = Refused(
    "P109",
    "decoder layer {layer} also attends to the encoder and needs a row of the KV cache for that, so it cannot share "
    "the KV of layer {source}; write it without @",
)
NO_PARTS = Refused(
    "P105",
    "{stack} layer {layer} cannot run its {part} alone: {why}; run the whole layer ({layer}) or drop it",
)
NO_CAUSAL_DECODER = Refused(
    "P130",
    "a policy decides token by token in the decoder of a causal language model, and {model} is none; run a plan "
    "without gates",
)
PAGED_POLICY = Refused(
    "P140",
    "a policy decides token by token, and generate_batch packs the tokens of several requests into one sequence, "
    "whose skipped layers would leave holes in the paged KV cache; call generate, or run the plan without a policy",
)
UNGATED = Refused(
    "P132",
    "{step} cannot stand behind a gate or an exit in this version; put the gate at a layer",
)
GATED_KV = Right("where no token skips the layer that it reads; P133 otherwise")
NO_DRAFT = Refused(
    "P150",
    "a draft keeps layers or parts of layers of the base model, and {step} is neither; write the layers that it "
    "keeps, as in skip:0-11,14-29",
)
UNORDERED_DRAFT = Refused(
    "P150",
    "layer {layer} would come after layer {before} in the draft, and the KV rows of the base model hold each layer "
    "once and in order; write them ascending, each once",
)
DECIDING = Refused(
    "U567",
    "what runs on this model decides token by token, which a fixed step cannot; call model.generate without the fast "
    "path",
)
WRITTEN_PART = Refused(
    "W201",
    "step {step} cannot be written as a stock checkpoint: a stock layer has both attention and mlp; keep {layer}, "
    "drop it, or ask for zeroed projections (--zero-parts: exact, saves nothing)",
)
WRITTEN_GROUP = Refused(
    "W202",
    "step {step} cannot be written as a stock checkpoint: a stock model runs its layers one after the other; run the "
    "plan live",
)
WRITTEN_KV = Refused(
    "W203",
    "step {step} cannot be written as a stock checkpoint: a stock layer uses its own keys and values; write {layer} "
    "without @",
)
WRITTEN_MAP = Refused(
    "W204",
    "step {step} cannot be written as a stock checkpoint: a stock model has no fitted maps; drop {span} instead",
)
WRITTEN_EXIT = Refused(
    "W205",
    "step {step} cannot be written as a stock checkpoint: a stock model always runs all its layers; drop the layers "
    "behind it",
)
WRITTEN_HEAD = Refused(
    "W284",
    "step {step} cannot be written as a stock checkpoint: a stock model has the base's head alone; write --as planned, "
    "or leave it out",
)
FAST_HEAD = Refused(
    "U568",
    "{step} is a head of the plan's own, and the fast loop calls the model's; call model.generate without it",
)
NO_HEAD = Refused(
    "W261",
    "step {step} cannot be copied into a GGUF file: it is a head of the plan's own; leave it out",
)
WRITTEN_GATE = Refused(
    "W205",
    "step {step} cannot be written as a stock checkpoint: a stock model decides nothing at run time; keep or drop "
    "{layer}",
)
NO_BLOCK = Refused(
    "W261",
    "step {step} cannot be copied into a GGUF file: its layers are whole layers of the base; keep the layer or drop it",
)
