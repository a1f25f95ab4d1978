"""What is typed: the texts whose meaning must never change. A new set may add texts; none is ever taken away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shoal.plan import Spec
from tests.unit.specs import alternating, hybrid, layer, llama, native_sharing, spec, stack, two_stacks

PLANS = {
    "drop": "0-1,3-4",
    "parts": "0,1a,2m,3-4",
    "repeat": "0-1,2x2,3-4",
    "reorder": "0,2,1,3-4",
    "kv-source": "0-2,3@2,4",
    "parallel-sum": "0,(1|2),3-4",
    "parallel-mean": "0,(1|2m)mean,3-4",
    "map-full": "0-1,~2-3,4",
    "map-low-rank": "0-1,~2-3:low,4",
    "map-scale": "0-1,~2:scaled,3-4",
    "map-ffn": "0-1,~2-3:ffn,4",
    "map-swiglu": "0-1,~2-3:swiglu,4",
    "own-tensors": "0-1,2:new,3-4",
    "own-and-repeat": "0-1,2:new,2,3@1,(4|3:other)",
    "gates": "0,1?g/project,2?g/mask,3?other/copy,4",
    "exits": "0,!early?mine,1/project,2/mask,!late?mine,3/project,4/mask",
    "exits-own-head": "0-1,!here=own?mine,2/project,3/project,4/project",
}
"""Plans of the kept model of five layers."""
DECIDED = {"gates": "skip:random=1", "exits": "exit:confidence=0.01", "exits-own-head": "exit:confidence=0.01"}
"""Who decides in those that need somebody."""

POLICIES = (
    "exit:after=1", "exit:after=2,prefill=true,fill=mask", "exit:confidence=0.01,first=0",
    "exit:confidence=0.002,first=0,by=margin,fill=copy", "exit:confidence=0.02,layers=0-1,3,by=certainty,fill=mask",
    "exit:confidence=0.6,first=0,every=2,by=saturation,fill=defer", "patience:first=0", "patience:agree=3,first=0",
    "adainfer:first=0,bias=-0.1", "skip:random=2", "skip:random=1,fill=mask,random_seed=3",
    "skip:listed=0,2-3,phase=decode", "skip:early=2", "skip:middle=2", "skip:late=1,fill=project", "skip:every=2",
    "unified", "unified:speedup=1.7,layout=released", "by-position:last=2,length=8",
    "by_position:last=2,length=9,levels=2", "by-position:last=2,length=8,layout=even",
    "menu:plans=0-4+0-1+0,3-4,choose=turn", "apart:decode=0,3-4", "apart:prefill=0,2-4,decode=0,4,fill=project",
    "ffn-skip:cold_first=1,cold_last=0,threshold=0.5", "calibrated:at=0:0.02+2:0.01",
    "calibrated:at=1:0.01,by=margin,fill=mask", "per-prompt:skip=2", "policy.json",
)  # fmt: skip
"""Policies as typed, on the kept model of five layers; `policy.json` is the file of the set."""
REFUSED = (
    "exot:after=1", "exit:confidense=1", "exit:", "exit", "exit:confidence=1.1", "exit:after=9", "exit:first=7,after=1",
    "patience:agree=1", "skip", "skip:early=1,late=1", "skip:listed=7", "skip:listed=1a", "skip:random=1,fill=none",
    "unified:speedup=5", "menu:plans=0-4", "per-prompt:skip=4", "by-position:length=0", "ffn-skip:cold_first=5",
    "calibrated", "calibrated:at=x:1", "calibrated:at=1:2", "calibrated:at=1", "none.json",
)  # fmt: skip

TYPED = {
    "policies": (*POLICIES[:-1], *REFUSED, "exit: confidence = 0.9 ,by=margin", " exit :after=1"),
    "drafts": (
        "exit", "exit:2", "exit:layer=2", "skip:0,2-3", "skip:keep=0,2-3", "attention", "attention:2",
        "attention:layers=1-2", "lookup", "lookup:1", "lookup:ngram=3", "swift", "swift:0.3",
        "swift:window=4;fraction=0.3", "cosine:0.9", "cosine:threshold=0.9;every=8", "clasp:skip=1;every=1", "clasp:1",
        "knapsack:every=3", "dynamic-exit", "dynamic-exit:places=4", "dynamic_exit:places=4;decay=0.9",
        "exot:2", "exit:layr=2", "exit:2;3", "exit:two", "swift:window=x",
    ),
    "transforms": (
        "refit", "refit:ridge=0.01", "slerp:t=0.3", "linear-map:ridge=none,bias=false", "linear_map:ridge=1e-3",
        "low-rank-map:rank=2,ridge=0.1", "channel-scale", "streamline:kind=ffn,epochs=2",
        "parallel-pairs:first=0,last=1", "refti", "refit:rigde=1", "refit:ridge=much", "refit:", "mka: t = 0.3",
    ),
    "methods": (
        "shortgpt", "shortgpt:skip_first=2", "position:which=first", "position:which=frist", "sleb",
        "poor_mans_bert", "shortgtp", "shortgpt:skip-first=1",
    ),
}  # fmt: skip
"""By kind, texts with a name and options, as their verbs take them."""
SETTINGS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("measures", "block-influence", ()),
    ("measures", "block_influence", ("skip_first=1",)),
    ("measures", "block-influence", ("skip-first= 1 ",)),
    ("measures", "angular-distance", ("span=2",)),
    ("methods", "position", ("which=middle",)),
    ("search", "listed", ("layers=3,4, 5",)),
    ("search", "beam", ()),
)
"""Options as `--set` takes them: kind, name, pairs."""

SPECS: dict[str, Callable[[], Spec]] = {
    "llama": llama,
    "alternating": alternating,
    "hybrid": hybrid,
    "two_stacks": two_stacks,
    "native_sharing": native_sharing,
}
EVERY = (
    "0-7", " 0 , 1,2 ,3-7", "7-0", "0-5,7", "0,1,2", "3,3,3,4", "3x3,4", "0-2,2x2", "0,1a,2m,3-7", "0a,0m,1-7", "0-7a",
    "1x2", "0-4,5@4,6@4,7", "0,(1|2),3-7", "0,(1a | 1m)sum,2-7", "0,(1-3)mean,4-7", "0-1,~2-5,6-7", "0-1,~2-5:ID,6-7",
    "0,~1,2-7", "0,1:new,2-7", "0-1:a.b+c_d-e,2-7", "0-3,4?g,5?g/project,6?h/copy,7", "0-3,!early,4-7",
    "0-3,!early=own?g,4/mask,5/defer,6-7", "0,1:w?g/project,2x2@0,3-7", "3@5,4-7", "0-1,2a@1,3-7", "7", "3a",
)  # fmt: skip
COSTED: dict[str, tuple[str, ...]] = {
    "llama": EVERY,
    "alternating": EVERY,
    "hybrid": ("0-7", "3-7", "0-4,6-7", "3,7", "0-3,5a,6-7", "0,3x2,7"),
    "two_stacks": (
        "encoder: 0-3; decoder: 0-5", "encoder: 0,3", "0,2-5", "decoder:0-5;encoder:3-0", "decoder: 1-5",
        "encoder: 0a,1m,(2|3)", "encoder: ~0-1,2-3; decoder: 0,!e,1?g/project,2-5", " encoder:0; decoder : 0x2,1-5",
    ),
    "native_sharing": ("0-5", "0-3", "0-3,5", "0,3-5", "0-2,4-5"),
}  # fmt: skip
"""By hand-written spec, plans as typed: their texts, hashes, files, problems and costs."""


def servable() -> Spec:
    """Eight layers with Llama's four matrices and an mlp of 256: sizes that every exchange format can state."""
    first = layer(0)
    assert first.attention is not None
    assert first.mlp is not None
    attention, mlp = replace(first.attention, params=2 * 16 * (16 + 2 * 4)), replace(first.mlp, params=3 * 16 * 256)
    return spec("llama", stack("decoder", *(replace(first, index=i, attention=attention, mlp=mlp) for i in range(8))))


FAMILIES = ("llama", "gpt2", "gemma3_text", "gemma3n_text", "qwen2_moe", "mamba2")
"""Tiny families whose fingerprints and costs are kept."""
KINDS = ("t5", "bert", "vit")


def tensors(hidden: int, vocabulary: int, inner: int) -> dict[str, dict[str, Any]]:
    """For each plan with weights of its own, name to shape; `make.py` fills them with numbers once."""
    square, vector = (hidden, hidden), (hidden,)
    return {
        "map-full": {"map-2-3.weight": square, "map-2-3.bias": vector, "map-2-3.limit": (1,)},
        "map-low-rank": {"low.up": (hidden, 2), "low.down": (2, hidden), "low.bias": vector},
        "map-scale": {"scaled.scale": vector, "scaled.bias": vector},
        "map-ffn": {"ffn.gate": (6, hidden), "ffn.up": (hidden, 6), "ffn.bias": vector},
        "map-swiglu": {"swiglu.gate": (6, hidden), "swiglu.down": (6, hidden), "swiglu.up": (hidden, 6)},
        "own-tensors": {"new.mlp.down_proj.weight": (hidden, inner), "new.self_attn.o_proj.weight": square},
        "own-and-repeat": {"new.mlp.down_proj.weight": (hidden, inner), "other.input_layernorm.weight": vector},
        "exits-own-head": {
            "own.lens": square, "own.lens_bias": vector, "own.weight": (vocabulary, hidden), "own.probe": vector,
            "own.probe_bias": (1,),
        },
    }  # fmt: skip
