"""Any static plan on vLLM's Transformers backend: slots are stock layers, and there is no code per family.

The backend builds the stock model on the meta device, puts its own classes in place of linear modules, norms and
experts, fuses, and gives each attention module an `Attention` of its own, for which the KV cache gets a row. What is
done here besides: parts that do not run are taken out before anything is allocated; modules of two slots with the same
tensors become one module, while the attention around them stays each slot's own, since a fused forward is bound to its
module and its row is its own; a slot without attention gets no row, and a reader that of its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index, maybe_prefix

from shoal_vllm.config import FIELD
from shoal_vllm.modules import CHANGES, Changed, Map, Nothing, Unmade, put_around
from shoal_vllm.sharing import Sharing
from shoal_vllm.slots import FolderError, Slots, read_slots


class NoAttention:
    """What a slot without attention answers to the backend, which makes an attention for every layer."""

    scale = staticmethod(lambda _: 1.0)
    sinks = staticmethod(lambda _: None)


class _Watched(nn.ModuleList):
    """The list of layers, while the backend goes through it: `begin` is called in front of the first, `after` behind
    each, so that what two slots share is given up before more is allocated."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        self.__dict__["begin"]()
        for name, child in super().named_children():
            yield name, child
            self.__dict__["after"](int(name))


class Planned:
    """Goes in front of a class of the Transformers backend."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        self.__dict__["slots"] = read_slots(getattr(config, FIELD))
        named, config.architectures = config.architectures, [self.slots.architecture]
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            config.architectures = named

    slots: Slots

    def _layers(self) -> nn.ModuleList:
        path = self.slots.layers
        for start in (self.model.base_model_prefix, "model"):
            inside = path.removeprefix(f"{start}.")
            try:
                found = self.model.get_submodule(inside)
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList) and len(found) == len(self.slots.slots):
                self.__dict__["path"] = f"model.{inside}"
                return found
        raise FolderError(f"{self.slots.architecture} has no list of layers {path}; write the folder anew", "W302")

    def _here(self) -> Iterator[tuple[int, nn.Module]]:
        """The slots of this pipeline stage."""
        return ((s, one) for s, one in enumerate(self._layers()) if not isinstance(one, PPMissingLayer))

    def recursive_replace(self) -> None:
        layers = self._layers()
        runner = MoERunner if isinstance(self, TransformersMoEForCausalLM) else ()
        self.__dict__["sharing"] = Sharing(layers, self.compilation_config.static_forward_context, runner)
        self.__dict__["changed"] = self._changed_modules()
        for s, layer in self._here():
            self._prepare(s, layer)
        kind = type(layers)
        layers.__dict__ |= {"begin": self.sharing.forget, "after": self._share_early}
        layers.__class__ = _Watched
        try:
            super().recursive_replace()
        finally:
            layers.__class__ = kind
            del layers.__dict__["begin"], layers.__dict__["after"]
        self._put_maps()
        if hasattr(self, "moe_layers"):
            there = {id(one) for one in self.model.modules()}
            self.moe_layers = [one for one in self.moe_layers if id(one) in there]
            self.mlp_layers = [one for one in self.mlp_layers if id(one) in there]
            self.num_moe_layers = len(self.moe_layers)

    def _changed_modules(self) -> set[str]:
        """The modules that no slot may fuse, so that slots share their matrices: those beside whose matrix some slot
        has tensors, and those of keys and values in layers that also run as readers."""
        every = self.slots.slots
        found = {name.rpartition(".") for slot in every for name in self.slots.own(slot)}
        store = {slot.base for slot in every if slot.part != "mlp" and slot.reads is None}
        both = (slot for slot in every if slot.reads is not None and slot.base in store)
        stored = {name for slot in both for name in self.slots.unmade(slot)}
        return {module for module, _, word in found if word in CHANGES and module} | stored

    def _prepare(self, s: int, layer: nn.Module) -> None:
        """Take out what a slot does not run, put in what it has of its own, and note which tensor goes where."""
        slot = self.slots.slots[s]
        own, out, unmade = self.slots.own(slot), self.slots.left_out(slot), self.slots.unmade(slot)
        silent = tuple(f"{name}." for name in (*out, *unmade))
        sizes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        matrices = {name for name, p in layer.named_parameters(remove_duplicate=False) if p.dim() > 1}
        shapes = {name: shape for one in slot.own for name, shape in self.slots.new[one].items()}
        beside: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            module, _, word = name.rpartition(".")
            if name in sizes and sizes[name] != shape:
                held = f"slot {s} has {name} as {list(shape)} in place of {list(sizes[name])}"
                raise FolderError(f"{held}; run the plan with Shoal", "W304")
            if name not in sizes and (word not in CHANGES or f"{module}.weight" not in sizes):
                held = f"slot {s} has a tensor {name}"
                raise FolderError(f"{held}, for which its layer has no place; write it anew", "W305")
            if name not in sizes:
                beside.setdefault(module, {})[word] = shape
        given = {name: self.slots.source(slot, name, matrix=name in matrices) for name in sizes}
        places = {}
        for module in (one for one in self.changed if f"{one}.weight" in sizes and not f"{one}.".startswith(silent)):
            places |= self._change(s, layer, module, beside.get(module, {}), given)
        for name in {*given, *own}:
            if not name.startswith(silent) and places.get(name, name):
                self.sharing.gives(s, places.get(name, name), given.get(name) or own[name])
        chain = len(out) > 1 and all(isinstance(layer._modules[name], nn.Linear) for name in out)
        for name in out:
            extra = self.slots.parts[slot.base].returns.get(name, -1)
            setattr(layer, name, Nothing(layer.get_submodule(name), extra, chain and name != out[-1]))
        for name, width in unmade.items():
            holder, leaf = self._holder(layer, name)
            setattr(holder, leaf, Unmade(self._width(width)))
            holder.add_module("unmade", nn.Identity())  # fusions are remembered by class and children

    def _change(
        self, s: int, layer: nn.Module, module: str, shapes: dict[str, tuple[int, ...]], given: dict[str, str]
    ) -> dict[str, str | None]:
        """Wrap a module, and say where its tensors are then; None: nowhere."""
        holder, leaf = self._holder(layer, module)
        linear = getattr(holder, leaf)
        if not isinstance(linear, nn.Linear):
            raise FolderError(
                f"slot {s} has tensors beside {module}, a {type(linear).__name__} and no linear module; run the "
                "plan with Shoal",
                "W304",
            )
        plan = self.model.tp_plan or {}
        name = f"{self.path}.{s}.{module}"
        style = next((plan[one] for one in plan if re.match(maybe_prefix("model", one), name)), "replicate")
        made = Changed(linear, shapes, style, self.tp_group.world_size)
        setattr(holder, leaf, made)
        holder.add_module("changed", nn.Identity())  # fusions are remembered by class and children
        inside = {one: one.removeprefix(f"{module}.") for one in given if one.startswith(f"{module}.")}
        if made.in_place:
            return {one: None if leaf == "weight" else one for one, leaf in inside.items()}
        return {one: f"{module}.base.{leaf}" for one, leaf in inside.items()}

    @staticmethod
    def _holder(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
        parent, _, leaf = path.rpartition(".")
        return layer.get_submodule(parent), leaf

    def _width(self, width: int) -> int:
        """Of keys or values of all heads, on this device."""
        heads, here = (
            self.model_config.get_total_num_kv_heads(),
            self.model_config.get_num_kv_heads(self.parallel_config),
        )
        return width // heads * here if width % heads == 0 else width

    def _put_maps(self) -> None:
        made: dict[str, Map] = {}

        def of(s: int, place: str, ids: tuple[str, ...]) -> list[Map]:
            for number, one in enumerate(ids):
                made.setdefault(one, Map(self.slots.new[one]))
                for name in self.slots.new[one]:
                    self.sharing.gives(s, f"{place}.{number}.{name}", f"shoal.{one}.{name}")
            return [made[one] for one in ids]

        last = len(self.slots.slots) - 1
        for s, layer in self._here():
            before, behind = self.slots.slots[s].before, self.slots.behind if s == last else ()
            if before or behind:
                put_around(layer, of(s, "before", before), of(s, "behind", behind))

    def _stacked(self) -> dict[str, str]:
        """By name of a module that was fused into another, the name of that."""
        every = (fuser.orig_to_new_stacked(at) for at, found in self.fusers.items() for fuser in found)
        return {old: new for one in every for old, (new, _) in one.items()}

    def _share_early(self, s: int) -> None:
        self.sharing.share(s, self.path, self._stacked(), early=True)

    def init_parameters(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().init_parameters(module, dtype)
        if module is self.model:
            self.sharing.forget()
            stacked = self._stacked()
            for s, _ in self._here():
                self.sharing.share(s, self.path, stacked, early=False)

    def _create_attention_instances(self, prefix: str = "") -> None:
        bare = {s: f"{self.path}.{s}" for s, _ in self._here() if self.slots.slots[s].part == "mlp"}
        for s, where in bare.items():
            self.attention_fusers[s] = (where, NoAttention)
        self.__dict__["rows"] = {}
        super()._create_attention_instances(prefix)
        for where in bare.values():  # nothing attends there
            self.get_submodule(where)._modules.pop("attn", None)

    def _get_attn_cls(self) -> Any:
        kind = super()._get_attn_cls()
        plain = all(slot.part != "mlp" and slot.reads is None for slot in self.slots.slots)
        if plain:
            return kind
        if kind is not Attention:
            raise FolderError(
                f"vLLM runs this model with {kind.__name__}, for which slots without attention and shared keys and "
                "values are not made; run the plan with Shoal",
                "W304",
            )
        return self._attention

    def _attention(self, *, prefix: str, **kwargs: Any) -> nn.Module:
        """The attention of one slot."""
        s = extract_layer_index(prefix)
        slot = self.slots.slots[s]
        if slot.part == "mlp":
            return nn.Identity()
        if slot.reads is not None and slot.reads not in self.rows:
            raise FolderError(
                f"slot {s} reads the keys and values of slot {slot.reads}, which is on another pipeline stage; use a "
                "smaller pipeline_parallel_size",
                "W304",
            )
        self.rows[s] = prefix
        target = None if slot.reads is None else self.rows[slot.reads]
        return Attention(prefix=prefix, kv_sharing_target_layer_name=target, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Every tensor of the folder to the slots that have it. Raises `FolderError` W306 for one that is there twice
        or that nobody has, W307 for one that is lost."""
        seen: set[str] = set()
        loaded = super().load_weights(self._routed(weights, seen))
        # some platforms pack matrices afterwards, and leave nothing to count
        self.loaded_parameters = sum(p.numel() for p in self.parameters())
        lost = sorted((self.sharing.feeds.keys() | set(self.slots.outside)) - seen)
        if not lost and self.quant_config is None:
            names = dict(self.named_parameters(remove_duplicate=False))  # a gate has a second name among the experts
            filled = {id(names[name]) for name in loaded if name in names}
            lost = sorted(name for name, held in self.named_parameters() if id(held) not in filled)
        if lost:
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            raise FolderError(f"the folder lacks the tensor {lost[0]}{more}; write it anew", "W307")
        return loaded

    def _routed(
        self, weights: Iterable[tuple[str, torch.Tensor]], seen: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        feeds, outside, elsewhere = self.sharing.feeds, set(self.slots.outside), self._elsewhere()
        declared = {f"shoal.{one}.{name}" for one, names in self.slots.new.items() for name in names}
        for name, tensor in weights:
            if name in seen:
                raise FolderError(f"the folder holds the tensor {name} twice; write it anew", "W306")
            seen.add(name)
            if name in outside:
                yield name, tensor
            elif name in feeds:
                for s, place in feeds[name]:
                    yield f"{self.slots.layers}.{s}.{place}", tensor
            elif name in declared:  # of a part that its slot leaves out, or of another pipeline stage
                continue
            elif self.quant_config is None and not name.startswith(elsewhere):
                raise FolderError(f"the folder holds the tensor {name}, which no slot has; write it anew", "W306")
            elif self.quant_config is not None:
                yield from self._codes(name, tensor)

    def _codes(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Scales and the like of a quantised matrix go where the matrix goes."""
        module = name.rpartition(".")[0]
        for s, place in self.sharing.feeds.get(f"{module}.weight", ()):
            yield f"{self.slots.layers}.{s}.{place.rpartition('.')[0]}.{name.rpartition('.')[2]}", tensor

    def _elsewhere(self) -> tuple[str, ...]:
        """What the names of tensors begin with that slots of other pipeline stages have."""
        here = {s for s, _ in self._here()}
        far = [slot for s, slot in enumerate(self.slots.slots) if s not in here]
        bases = {base for slot in far for base in (slot.base, slot.tie) if base is not None}
        return tuple(f"{self.slots.layers}.{base}." for base in bases)


class ShoalForCausalLM(Planned, TransformersForCausalLM):
    """A planned checkpoint of a dense model."""


class ShoalMoEForCausalLM(Planned, TransformersMoEForCausalLM):
    """A planned checkpoint of a model with experts."""
