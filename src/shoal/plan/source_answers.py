"""The sentences of what is refused of runs that take something from another layer."""

from __future__ import annotations

from shoal.plan.answers import Refused

MAP_BESIDE_ENCODER = Refused(
    "P141",
    "decoder layer {layer} has two attentions, so it cannot take over the attention map of layer {source}; write it "
    "without @a",
)
PAGED_MAP = Refused(
    "P141",
    "layer {layer} takes over an attention map, and paged attention hands out none; call generate, or write the plan "
    "without @a",
)
PAGED_HALF = Refused(
    "P162",
    "layer {layer} takes keys or values alone from layer {source}, and paged attention stores both as they are made; "
    "call generate, or write @{source}",
)
CHECKPOINTED_LATER = Refused(
    "P163",
    "layer {layer} reads the KV of layer {source}, which runs later, and gradient checkpointing would not replay its "
    "passes; switch one of them off",
)
PAGED_LATER = Refused(
    "P163",
    "layer {layer} reads the KV of layer {source}, which runs later, and paged attention has no pages for passes that "
    "go over the prompt again; call generate, or name an earlier layer",
)
GATED_LATER = Refused(
    "P133",
    "layer {layer} reads the KV of layer {source}, which runs later, so no policy can decide in this plan; name an "
    "earlier layer, or run it without gates and exits",
)
FAST_LATER = Refused(
    "U568",
    "layer {layer} reads the KV of layer {source}, which runs later, and the fast loop goes over no prompt again; call "
    "model.generate without it",
)
GATED_HALF = Refused(
    "P133",
    "layer {layer} takes keys or values alone from layer {source}, which no fill makes up for, so no token can be "
    "without it; write it without @k and @v",
)
GATED_MAP = Refused(
    "P133",
    "layer {layer} takes over an attention map, so no token can be without it; write the plan without @a",
)
FAST_MAP = Refused(
    "U568",
    "layer {layer} takes over an attention map, which the fast loop does not hand on; call model.generate without it",
)
WRITTEN_SHARED_MAP = Refused(
    "W210",
    "step {step} cannot be written as a stock checkpoint: a stock layer makes its own attention map; write {layer} "
    "without @a",
)
SHARDED_TIE = Refused(
    "P153",
    "layer {layer} is tied to layer {source}, and of layers that are spread over processes each gathers its own "
    "weights alone; run the plan on a model in one piece, or write {layer}",
)
