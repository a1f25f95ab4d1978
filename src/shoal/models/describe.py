"""What a model is made of, as a Spec: its layers counted, with what `examine` found out by one forward."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.models.examine import LayerFacts, StackFacts
from shoal.models.families import Family, family_of
from shoal.models.first import first_only
from shoal.models.lists import BESIDE, multiplied
from shoal.models.meta import meta_model
from shoal.models.spread import is_spread
from shoal.models.stacks import Stack, find_stacks
from shoal.plan import KVSpec, LayerSpec, PartSpec, Spec, StackSpec
from shoal.plan.spec import KVKind, NeuronSpec, ProjectionSpec


def describe(model: PreTrainedModel, stacks: tuple[Stack, ...], facts: Mapping[str, StackFacts]) -> Spec:
    """The Spec of a model (on any device, `meta` included) with these stacks, of which `facts` holds what is known.

    The weights of a quantised model are counted as those of its structure before it was quantised: a plan speaks of
    layers, which are the same in bfloat16 and in 4 bits, and packed weights have other shapes.
    """
    counted = _unquantised(model)
    whole = stacks if counted is model else find_stacks(counted)
    users = _storage_users(whole)
    built = tuple(
        _stack_spec(stack, size, facts[stack.name], users, several=len(stacks) > 1)
        for stack, size in zip(stacks, whole, strict=True)
    )
    inside = {name for stack in whole for i in range(stack.depth) for name in _own_storages(stack, i)}
    everything = _storages(counted)
    head = counted.get_output_embeddings()
    text = model.config.get_text_config(decoder=True)
    return Spec(
        family=model.config.model_type,
        stacks=built,
        other_params=sum(count for name, count in everything.items() if name not in inside),
        head_flops=2 * head.weight.numel() if head is not None else 0,
        vocab=int(getattr(text, "vocab_size", 0) or 0),
        probed=all(facts[stack.name].forward for stack in stacks),
        parts_note=next((note for stack in stacks if (note := facts[stack.name].parts_note)), None),
    )


def is_quantised(model: nn.Module) -> bool:
    """Whether weights of the model may be held in a code of their own."""
    config = getattr(model, "config", None)
    return getattr(model, "hf_quantizer", None) is not None or hasattr(config, "quantization_config")


def _unquantised(model: PreTrainedModel) -> PreTrainedModel:
    """`model` itself, or for a quantised one its structure on the meta device with plain weights."""
    if not is_quantised(model):
        return model
    config = copy.deepcopy(model.config)
    for one in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return meta_model(config, like=model)


def _storages(module: nn.Module | None) -> dict[object, int]:
    """Elements by unique storage; adapters that PEFT put in do not belong to the base model, nor does what a plan that
    learns has put beside its layers."""
    assert module is not None
    return {
        _key(p): p.numel()
        for name, p in module.named_parameters(remove_duplicate=False)
        if not any(piece.startswith(("lora_", "ia3_", "oft_", "boft_", "vera_")) for piece in name.split("."))
        and not name.startswith(f"{BESIDE}.")
    }


def _own_storages(stack: Stack, index: int) -> dict[object, int]:
    """Of one layer, without what only the first layer owns: that stays when the layer goes."""
    first = first_only(stack) if index == 0 else None
    lent = _storages(first.module) if first is not None else {}
    return {key: count for key, count in _storages(stack.layer(index)).items() if key not in lent}


def _flat(module: nn.Module) -> set[object]:
    """The storages of parameters of one dimension."""
    return {_key(p) for p in module.parameters() if p.dim() < 2}


def _key(parameter: nn.Parameter) -> object:
    without = parameter.is_meta or is_spread(parameter)
    return id(parameter) if without else (parameter.data_ptr(), parameter.numel(), str(parameter.device))


def _storage_users(stacks: tuple[Stack, ...]) -> Counter[object]:
    return Counter(key for stack in stacks for layer in stack.layers._modules.values() for key in _storages(layer))


def _stack_spec(stack: Stack, counted: Stack, seen: StackFacts, users: Counter[object], *, several: bool) -> StackSpec:
    """`counted`: the same stack with the weights that are counted. `several`: whether the model has other stacks."""
    kinds = layer_kinds(stack.config, stack.depth)
    family = family_of(stack.config)
    sharing = _native_sharing(stack.config, kinds)
    read = {source for sources in sharing.values() for source in sources}
    names: dict[object, str] = {}
    layers: list[LayerSpec] = []
    for index, fact in enumerate(seen.layers):
        layer = counted.layer(index)
        storages, flat = _own_storages(counted, index), _flat(layer)
        config = _of_layer(stack.config, index)
        kv = _kv(fact, config, index in sharing, seen.forward) if stack.name == "decoder" else KVSpec("none")
        kv = replace(kv, any_heads=False) if index in read else kv  # its readers divide their own heads among them
        active = _active_share(config)
        layers.append(
            LayerSpec(
                index=index,
                kind=kinds[index],
                params=sum(n for key, n in storages.items() if users[key] == 1),
                vectors=sum(n for key, n in storages.items() if users[key] == 1 and key in flat),
                flops=_flops(layer, active),
                width=_width(stack.name, config, kv, [layers[i].kv for i in sharing.get(index, ())]),
                kv=kv,
                attention=_part(layer, fact.parts.attention, active, users) if fact.parts else None,
                mlp=_part(layer, fact.parts.mlp, active, users) if fact.parts else None,
                mlp_reads_attention=fact.mlp_reads_attention,
                shared=tuple(
                    (names.setdefault(key, f"{stack.name}-shared-{len(names)}"), n)
                    for key, n in storages.items()
                    if users[key] > 1
                ),
                needs=sharing.get(index, ()),
                projections=_projections(layer, fact, users),
                neurons=_neurons(layer, fact, users),
                pinned=family.pinned if index == 0 and _pins(family, stack.config) else None,
                matrices=tuple(multiplied(layer).items()) if several else (),
            )
        )
    hidden = int(getattr(stack.config, "hidden_size", 0))
    return StackSpec(stack.name, stack.path, hidden, tuple(layers))


def _pins(family: Family, config: PreTrainedConfig) -> bool:
    return family.pinned_if is None or bool(getattr(config, family.pinned_if, None))


def layer_kinds(config: PreTrainedConfig, depth: int) -> list[str]:
    """The family's own word for each layer: `layer_types` and its relatives, or what the cache would make of it."""
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list) and len(kinds) == depth:
            return [str(kind) for kind in kinds]
    for name, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        if getattr(config, name, None) is not None:
            return [kind] * depth
    return ["full_attention" if getattr(config, "num_attention_heads", None) else config.model_type] * depth


def _native_sharing(config: PreTrainedConfig, kinds: list[str]) -> dict[int, tuple[int, ...]]:
    """Layers that read another layer's KV inside the base model: the last `num_kv_shared_layers` read the last layer of
    their kind that stores its own (Gemma 3n and 4)."""
    count = getattr(config, "num_kv_shared_layers", 0) or 0
    first = len(kinds) - count
    if not count or first <= 0:
        return {}
    last_of_kind = {kind: index for index, kind in enumerate(kinds[:first])}
    return {index: (last_of_kind[kinds[index]],) for index in range(first, len(kinds)) if kinds[index] in last_of_kind}


def _of_layer(config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """The config as one layer sees it: where fields differ by layer (Gemma 4), transformers raises for the whole's."""
    own: PreTrainedConfig = config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config
    return own


def _width(stack: str, config: PreTrainedConfig, kv: KVSpec, sources: list[KVSpec]) -> int:
    """Query heads x (key_dim + value_dim); a layer that reads another's KV has the dimensions of its source, and one
    without a cache has heads that share out the hidden state."""
    heads = getattr(config, f"{stack}_attention_heads", getattr(config, "num_attention_heads", None))
    dims = max(one.key_dim + one.value_dim for one in (kv, *sources))
    if stack != "decoder":
        return 2 * int(getattr(config, "hidden_size", 0))
    return heads * dims if isinstance(heads, int) else 0


def _kv(fact: LayerFacts, config: PreTrainedConfig, shared: bool, forward: bool) -> KVSpec:
    if shared:
        return KVSpec("shared")
    if fact.keys is not None and fact.values is not None:
        kind: KVKind = "full" if fact.window is None else "sliding"
        roles = fact.roles
        told = (True, True, False) if roles is None else (roles.rotated, roles.apart, roles.any_heads)
        return KVSpec(kind, fact.keys[1], fact.keys[-1], fact.values[-1], fact.window, fact.state, *told)
    if fact.state:
        return KVSpec("recurrent", state=fact.state)
    heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if forward or not isinstance(heads, int):
        return KVSpec("none")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KVSpec("full", heads, size, size)


def _part(layer: nn.Module, names: tuple[str, ...], active: float, users: Counter[object]) -> PartSpec:
    children = [layer.get_submodule(name) for name in names]
    own = {key: n for child in children for key, n in _storages(child).items() if users[key] == 1}
    flat = sum(n for key, n in own.items() if key in _flat(layer))
    return PartSpec(names, sum(own.values()), sum(_flops(child, active) for child in children), flat)


def _projections(layer: nn.Module, fact: LayerFacts, users: Counter[object]) -> tuple[ProjectionSpec, ...]:
    """The modules of a layer's attention that make queries, keys or values, whose weights no other layer uses."""
    found = []
    if (roles := fact.roles) is None:
        return ()
    for name in roles.products:
        named = layer.get_submodule(name).named_parameters(prefix=name)
        own = {n.replace(".base_layer.", "."): p for n, p in named if ".lora_" not in n}
        if all(users[_key(p)] == 1 for p in own.values()):
            tensors = tuple((n, tuple(p.shape)) for n, p in own.items())
            found.append(ProjectionSpec(name, roles.makes(name), tensors))
    return tuple(found)


def _neurons(layer: nn.Module, fact: LayerFacts, users: Counter[object]) -> NeuronSpec | None:
    """The neurons of a layer's mlp, where no other layer uses its weights and they are counted as they are held."""
    if fact.neurons is None:
        return None
    held = {name.replace(".base_layer.", "."): p for name, p in layer.named_parameters()}
    alike = all(
        one.name in held and tuple(held[one.name].shape) == one.shape and users[_key(held[one.name])] == 1
        for one in fact.neurons.tensors
    )
    return fact.neurons if alike else None


def _active_share(config: PreTrainedConfig) -> float:
    """The share of a layer's experts that one token uses."""
    used = next(
        (v for n in ("num_experts_per_tok", "moe_topk", "top_k_experts") if (v := getattr(config, n, None))), None
    )
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((v for n in names if (v := getattr(config, n, None))), None)
    return used / total if isinstance(used, int) and isinstance(total, int) and total else 1.0


def _flops(module: nn.Module, active: float) -> int:
    """2 FLOPs for each element of every matrix, experts by the share in use; vectors (norms, biases) cost nothing."""
    total = 0.0
    for name, p in module.named_parameters():
        if p.dim() >= 2 and ".lora_" not in name:
            total += 2 * p.numel() * (active if "experts" in name.split(".") else 1.0)
    return round(total)
