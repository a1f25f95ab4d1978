"""What stands in the slots of a stock checkpoint for the tensors that runs have of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from shoal.errors import WriteError
from shoal.executing.affine import folded_affine
from shoal.executing.looked_up import TiedTensors
from shoal.executing.low_rank import folded
from shoal.models.linear import is_transposed
from shoal.models.opened import open_model
from shoal.models.stacks import Stack
from shoal.plan import shapes_of
from shoal.plan.around import affine_of, around_run
from shoal.plan.low_rank import factors_of
from shoal.plan.neurons import resized
from shoal.plan.sources import StackLayer
from shoal.plan.spec import LayerSpec
from shoal.plan.tensors import tensors_of
from shoal.writing.blueprint import AND, StackSlots, Tensors


def own_tensors(
    model: PreTrainedModel,
    stack: Stack,
    layers: Sequence[LayerSpec],
    found: StackSlots,
    weights: Mapping[str, torch.Tensor],
) -> tuple[StackSlots, dict[str, torch.Tensor]]:
    """The slots with an id of its own for each in which low-rank factors become a matrix, and the tensors of all ids.

    What the factors change is the matrix of the run: that of its own tensors, of the tied layer, or of the layer.
    """
    ties, own = dict(found.tied), dict[str, torch.Tensor]()
    replaced, mlps = dict(found.replaced), dict(found.mlps)
    for slot, weights_id in found.replaced:
        layer = found.slots[slot]
        held = _matrices(model, stack, layer, ties.get(slot))
        replaced[slot], made = _own(stack, layers[layer], held, weights_id, f"{weights_id}@{slot}", weights)
        own |= made
    for slot, half in found.mlps:
        if half.weights is not None:
            held = _matrices(model, stack, half.layer, half.tie)
            name, made = _own(stack, layers[half.layer], held, half.weights, f"{half.weights}@{slot}m", weights)
            mlps[slot] = half._replace(weights=name)
            own |= made
    return found._replace(replaced=tuple(replaced.items()), mlps=tuple(mlps.items())), own


def _matrices(model: PreTrainedModel, stack: Stack, index: int, tie: int | StackLayer | None) -> Tensors:
    """What a run of a layer has before its own tensors: those of the layer, and the matrices of the tied one."""
    layer = stack.layer(index)
    held: Tensors = layer.state_dict()
    if tie is None:
        return held
    tied = TiedTensors(layer, open_model(model).layer_of(tie, stack), across=isinstance(tie, StackLayer))
    return held | {name: tensor.detach() for name, tensor in tied.items()}


def _own(
    stack: Stack, layer: LayerSpec, held: Tensors, weights_id: str, made: str, weights: Mapping[str, torch.Tensor]
) -> tuple[str, Tensors]:
    """The tensors of a run of `layer`, which has `held` before them, and their id: `made` where low-rank factors change
    some, or some lie over those that runs share."""
    given = {name: t for one in weights_id.split(AND) for name, t in tensors_of(one, weights).items()}
    there = stack.layer(layer.index)
    factors, affine = (found(given, there.state_dict()) for found in (factors_of, affine_of))
    _refuse_around(layer.index, weights_id, given, stack)
    if not factors and not affine and AND not in weights_id:
        return weights_id, _fitting(stack, layer, weights_id, weights)
    whole = {f"{made}.{name}": t for name, t in given.items() if name in held}
    for module, pair in factors.items():
        name = f"{made}.{module}.weight"
        matrix = whole.get(name, held[f"{module}.weight"])
        transposed = is_transposed(there.get_submodule(module))
        whole[name] = folded(matrix, pair, transposed=transposed)
    for module, words in affine.items():
        names = f"{made}.{module}.weight", f"{made}.{module}.bias"
        matrix = whole.get(names[0], held[f"{module}.weight"])
        bias = whole.get(names[1], held.get(f"{module}.bias"))
        if bias is None and "shift" in words:
            why = f"it shifts what {module} makes, which has no bias to hold that"
            raise _refusal("W287", f"{layer.index}:{weights_id}", why, "write it --as planned")
        transposed = is_transposed(there.get_submodule(module))
        new = folded_affine(matrix, bias, words, transposed=transposed)
        whole |= {name: tensor for name, tensor in zip(names, new, strict=True) if tensor is not None}
    return made, _fitting(stack, layer, made, whole)


def _refuse_around(layer: int, weights_id: str, given: Tensors, stack: Stack) -> None:
    around = around_run(given, stack.layer(layer).state_dict())
    if around:
        why = f"the tensor {next(iter(around))} stands around the layer, where no stock model has one"
        raise _refusal("W287", f"{layer}:{weights_id}", why, "write it --as planned")


def _fitting(stack: Stack, layer: LayerSpec, weights_id: str, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of one id, ID.PARAMETER, in the dtypes of the layer that runs with them. Those of another number of
    neurons have passed `with_width`."""
    index = layer.index
    there, other = stack.layer(index).state_dict(), resized(layer, tensors_of(weights_id, shapes_of(weights)))
    own = {name: tensor for name, tensor in weights.items() if name.startswith(f"{weights_id}.")}
    if not own:
        raise _refusal("W209", f"{index}:{weights_id}", f"the tensors {weights_id}.* are not given", f"write {index}")
    for name, tensor in own.items():
        old = there.get(name[len(weights_id) + 1 :])
        if old is None or (old.shape != tensor.shape and name[len(weights_id) + 1 :] not in other):
            why = f"{name} is {list(tensor.shape)} and the layer holds {None if old is None else list(old.shape)} there"
            raise _refusal("W209", f"{index}:{weights_id}", why, f"write {index}")
    return {name: tensor.to(there[name[len(weights_id) + 1 :]].dtype) for name, tensor in own.items()}


def _refusal(code: str, step: str, why: str, nearest: str) -> WriteError:
    return WriteError(f"step {step} cannot be written as a stock checkpoint: {why}; {nearest}", code=code)
