"""What the base model is: stacks, layers, parts, KV. Derived by `shoal.inspect`, never written by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Literal

from shoal.errors import PlanError
from shoal.plan.sources import Product

KVKind = Literal["full", "sliding", "recurrent", "shared", "none"]


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one layer keeps between tokens, per sequence, in elements (not bytes)."""

    kind: KVKind
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None
    """Sliding layers keep at most this many tokens."""
    state: int = 0
    """Recurrent layers: elements of the constant state."""
    rotated: bool = True
    """Whether keys turn with tables of positions that the layer is given; True where that is not known."""
    apart: bool = True
    """Whether keys and values are stored as such, each for itself, and not as one latent state of both."""
    any_heads: bool = False
    """Whether the layer runs with fewer heads of them (`fewer_heads.py`)."""

    @property
    def per_token(self) -> int:
        """Elements added by one token: heads x (key_dim + value_dim); 0 for a recurrent layer."""
        return self.heads * (self.key_dim + self.value_dim)

    def elements(self, tokens: int) -> int:
        """Elements held for one sequence of `tokens` tokens."""
        kept = min(tokens, self.window) if self.window is not None else tokens
        return kept * self.per_token + self.state


@dataclass(frozen=True, slots=True)
class PartSpec:
    """The attention or the mlp of one layer."""

    modules: tuple[str, ...]
    """Child module names inside the layer; several when a layer keeps its mlp inline (OPT: fc1, fc2)."""
    params: int
    flops: int
    """Matrix-multiply FLOPs for one token, experts counted as often as they are used."""
    vectors: int = 0
    """How many of `params` are in tensors of one dimension: norms, biases. A tie leaves them alone."""


@dataclass(frozen=True, slots=True)
class ProjectionSpec:
    """A matrix of an attention that makes queries, keys or values and nothing else, with its bias."""

    module: str
    """The module within the layer."""
    makes: frozenset[Product]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """(name within the layer, shape)."""

    @property
    def flops(self) -> int:
        """Matrix-multiply FLOPs for one token."""
        return sum(2 * prod(shape) for _, shape in self.tensors if len(shape) > 1)


@dataclass(frozen=True, slots=True)
class NeuronTensor:
    """A tensor of an mlp in which every neuron has places of its own."""

    name: str
    """Within the layer."""
    shape: tuple[int, ...]
    dim: int
    """The dimension along which the places are."""


@dataclass(frozen=True, slots=True)
class NeuronSpec:
    """The neurons of a dense mlp: what stands between the matrices that make them and the one that reads them. The
    layer runs with another number of them (`neurons.py`)."""

    count: int
    makes: tuple[NeuronTensor, ...]
    """Matrices, and biases, of one or more places for each neuron."""
    reads: NeuronTensor
    """The matrix of one place for each."""

    @property
    def tensors(self) -> tuple[NeuronTensor, ...]:
        return (*self.makes, self.reads)

    def places(self, tensor: NeuronTensor, count: int) -> int:
        """How many places so many neurons have in a tensor."""
        return tensor.shape[tensor.dim] // self.count * count


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of the base model, named by its 0-based index for ever."""

    index: int
    kind: str
    """The family's own word: full_attention, sliding_attention, linear_attention, mamba, mlp, ..."""
    params: int
    flops: int
    """Matrix-multiply FLOPs for one token, without attention scores."""
    width: int
    """query heads x (key_dim + value_dim): attention scores cost 2 x width FLOPs per query and key."""
    kv: KVSpec
    attention: PartSpec | None = None
    mlp: PartSpec | None = None
    shared: tuple[tuple[str, int], ...] = ()
    """(storage, elements) of weights that other layers use too; not counted in `params`."""
    needs: tuple[int, ...] = ()
    """Layers whose state this one reads inside the base model (native KV sharing)."""
    pinned: str | None = None
    """Why this layer must run first, if it must."""
    vectors: int = 0
    """How many of `params` are in tensors of one dimension."""
    mlp_reads_attention: bool = False
    """Whether its mlp reads what its attention wrote, so that the layer is the one and then the other."""
    projections: tuple[ProjectionSpec, ...] = ()
    """The matrices that a run leaves out where it takes all that they make from another layer, as far as known."""
    neurons: NeuronSpec | None = field(default=None, compare=False)
    """None where the mlp has experts, or runs with as many neurons alone. Not compared: where the weights are packed or
    spread over processes nobody can tell, and the layer is the same one."""

    @property
    def sizes(self) -> dict[str, int]:
        """The elements of the tensors in whose place a run may have some of another shape, by their names in it."""
        found = {name: prod(shape) for one in self.projections for name, shape in one.tensors}
        return found | {one.name: prod(one.shape) for one in (self.neurons.tensors if self.neurons else ())}

    def left_out(self, part: str) -> tuple[str, ...]:
        """How the names of tensors begin of what a run of one `part` leaves out; nothing for the whole layer."""
        parts = {"attention": self.attention, "mlp": self.mlp}
        silent = [one for name, one in parts.items() if one is not None and part not in ("layer", name)]
        return tuple(f"{name}." for one in silent for name in one.modules)

    matrices: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(name within the layer, shape) of the matrices that a tie across stacks speaks of, in models of several stacks:
    what is multiplied, and no table that is looked up, such as a bias by position."""

    def unused(self, taken: Set[Product]) -> tuple[ProjectionSpec, ...]:
        """The projections that make nothing but what is `taken` from another layer."""
        return tuple(one for one in self.projections if one.makes <= taken)


@dataclass(frozen=True, slots=True)
class StackSpec:
    """One list of layers that run one after the other."""

    name: str
    """decoder, encoder, vision or text."""
    path: str
    """Where the list is in the model: model.layers, transformer.h, ..."""
    hidden: int
    layers: tuple[LayerSpec, ...]

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def decodes(self) -> bool:
        """True when the stack runs for every new token; any other runs once, and each token sees the whole prompt."""
        return self.name == "decoder"


@dataclass(frozen=True, slots=True)
class Spec:
    """What a plan can be checked and costed against."""

    family: str
    stacks: tuple[StackSpec, ...]
    other_params: int
    """Parameters outside the stacks by unique storage: embeddings, final norm, head when it is not tied."""
    head_flops: int
    """FLOPs of the output head for one position."""
    vocab: int
    probed: bool = True
    """False when no forward could be run and KV shapes come from the config."""
    parts_note: str | None = None
    """Why the layers have no separate attention and mlp, if they have none."""

    def stack(self, name: str | None = None) -> StackSpec:
        """The stack called `name`; without a name the decoder, or the first. Raises P102 when there is none."""
        by_name = {s.name: s for s in self.stacks}
        if name is None:
            return by_name.get("decoder", self.stacks[0])
        if name not in by_name:
            raise PlanError(f"the model has no stack {name!r:.60}; it has {', '.join(by_name)}", code="P102")
        return by_name[name]

    @property
    def params(self) -> int:
        """Parameters of the base model, by unique storage."""
        shared = {k: n for s in self.stacks for layer in s.layers for k, n in layer.shared}
        own = sum(layer.params for s in self.stacks for layer in s.layers)
        return self.other_params + own + sum(shared.values())

    @property
    def fingerprint(self) -> str:
        """sha256 over the structure (family, vocabulary, stacks, layer kinds and sizes): equal for a live model, its
        folder and its GGUF; blind to dtype and to the values of the weights."""
        facts = {
            "family": self.family,
            "vocab": self.vocab,
            "stacks": [[s.name, s.hidden, [[layer.kind, layer.params] for layer in s.layers]] for s in self.stacks],
        }
        return "sha256:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json, with `fingerprint` and `params` added."""
        return {**_plain(asdict(self)), "params": self.params, "fingerprint": self.fingerprint}


def _plain(value: Any) -> Any:
    """Sets as sorted lists, everywhere inside."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return sorted(value) if isinstance(value, frozenset) else value
