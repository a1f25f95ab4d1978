"""Small `Spec` values, written by hand so that every number in a test can be checked with a pencil."""

from __future__ import annotations

from dataclasses import replace

from shoal.plan import KVSpec, LayerSpec, PartSpec, Plan, Spec, StackSpec, parse_plan

HIDDEN = 16
VOCAB = 128
ATTENTION = PartSpec(("self_attn",), params=640, flops=1280)
MLP = PartSpec(("mlp",), params=1536, flops=3072)
NORMS = 32
LAYER_PARAMS = 640 + 1536 + NORMS
LAYER_FLOPS = 1280 + 3072
WIDTH = 32  # 4 query heads x (4 + 4)
FULL = KVSpec("full", heads=2, key_dim=4, value_dim=4)  # 16 elements a token
SLIDING = replace(FULL, kind="sliding", window=4)
RECURRENT = KVSpec("recurrent", state=96)
NO_KV = KVSpec("none")
OTHER_PARAMS = 2 * VOCAB * HIDDEN + HIDDEN  # embeddings, head, final norm
HEAD_FLOPS = 2 * VOCAB * HIDDEN


def layer(index: int, kind: str = "full_attention", kv: KVSpec = FULL, *, width: int = WIDTH) -> LayerSpec:
    return LayerSpec(index, kind, LAYER_PARAMS, LAYER_FLOPS, width, kv, ATTENTION, MLP, vectors=NORMS)


def stack(name: str, *layers: LayerSpec) -> StackSpec:
    return StackSpec(name, f"model.{name}.layers", HIDDEN, layers)


def spec(family: str, *stacks: StackSpec) -> Spec:
    return Spec(family, stacks, OTHER_PARAMS, HEAD_FLOPS, VOCAB)


def llama() -> Spec:
    """8 equal layers."""
    return spec("llama", stack("decoder", *(layer(i) for i in range(8))))


def alternating() -> Spec:
    """8 layers: even ones see a window of 4 tokens, odd ones see all."""
    kinds = [("sliding_attention", SLIDING), ("full_attention", FULL)] * 4
    return spec("gemma2", stack("decoder", *(layer(i, kind, kv) for i, (kind, kv) in enumerate(kinds))))


def hybrid() -> Spec:
    """8 layers: attention in 3 and 7, a bare mlp in 5, recurrent in the rest."""
    layers = [layer(i, "linear_attention", RECURRENT, width=0) for i in range(8)]
    layers[3], layers[7] = layer(3), layer(7)
    layers[5] = LayerSpec(5, "mlp", MLP.params, MLP.flops, 0, NO_KV, None, MLP)
    return spec("hybrid", stack("decoder", *layers))


def two_stacks() -> Spec:
    """An encoder of 4 layers without KV, and a decoder of 6 whose layer 0 makes the position bias of all."""
    encoder = stack("encoder", *(layer(i, kv=NO_KV) for i in range(4)))
    first = replace(layer(0), pinned="it makes the position bias that all layers use")
    return spec("t5", encoder, stack("decoder", first, *(layer(i) for i in range(1, 6))))


def native_sharing() -> Spec:
    """6 layers; in this family 4 and 5 read the KV that layer 3 stores."""
    readers = [replace(layer(i, kv=KVSpec("shared")), needs=(3,)) for i in (4, 5)]
    return spec("gemma3n", stack("decoder", *(layer(i) for i in range(4)), *readers))


def plan_of(notation: str, model: Spec | None = None) -> Plan:
    """The plan that a person would type for a model (by default `llama()`)."""
    return parse_plan(notation, Plan.identity(model or llama()))
