"""The mean of several layers' keys and values, for the one that stores them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoal.errors import UsageError
from shoal.fitting.sharing import Group
from shoal.models.head_channels import projections_of
from shoal.models.opened import OpenedModel
from shoal.models.projections import HeadMatrices, Projection, Projections, ScoreSide
from shoal.models.roles import HeadRoles
from shoal.plan.sources import STORED

Own = Mapping[int, Mapping[str, torch.Tensor]]
"""By layer the tensors that a run has in the place of the layer's, by their names within it."""


def averaged(opened: OpenedModel, group: Group, own: Own, stack: str) -> dict[str, torch.Tensor]:
    """For the first layer of `group`, by their names within it, the tensors with which it makes the mean of what the
    matrices of all layers' keys and values make. Raises U668 for a layer whose matrices of keys and values are not
    known, or are no product of one matrix (latent ones)."""
    roles = [fact.roles for fact in opened.facts(stack).layers]
    layers = {layer: opened.stack(stack).layer(layer) for layer in group}
    first = roles[group[0]]
    if first is None or any(roles[layer] != first for layer in group):
        raise _refusal(group, "no role of its matrices is known, or the roles differ")
    if set(first.unused(STORED)) >= {*first.keys, *first.values}:
        names = _parameters(layers[group[0]], first, group)
        parts = {n: [own[i].get(n, layers[i].get_parameter(n)).detach() for i in group] for n in names}
        return {
            name: torch.stack([p.to(many[0].device).float() for p in many]).mean(0).to(many[0].dtype)
            for name, many in parts.items()
        }
    known = require_known(opened, group, stack, "average")
    tables = [HeadMatrices(layers[layer], known[layer], dict(own[layer])) for layer in group]
    for pick in (_values, _keys):
        one = pick(known[group[0]])
        for head in range(len(one.channels)):
            rows = [t.rows(pick(t.known), head) for t in tables]
            tables[0].put_rows(one, head, torch.stack([row.to(rows[0]) for row in rows]).mean(0))
    return {**own[group[0]], **tables[0].written(_keys(known[group[0]]), _values(known[group[0]]))}


def fewer_heads(
    opened: OpenedModel, layer: int, own: Mapping[str, torch.Tensor], heads: int, stack: str
) -> dict[str, torch.Tensor]:
    """The tensors `own` of a layer, by their names within it, of which those that make keys and values make `heads`
    heads: each the mean of neighbouring ones. Raises U667 where these are not so many, U668 for a layer that does not
    run with fewer."""
    spec = opened.spec.stack(stack).layers[layer]
    if heads < 1 or spec.kv.heads % heads:
        raise UsageError(
            f"share-kv: heads={heads} does not divide the {spec.kv.heads} heads of keys and values of layer {layer}; "
            "give a number that does",
            code="U667",
        )
    if not spec.kv.any_heads and heads < spec.kv.heads:
        raise _refusal((layer,), "it runs with all its heads of keys and values alone", "average with heads")
    made = dict(own)
    module = opened.stack(stack).layer(layer)
    for one in spec.projections:
        if len(one.makes) == 1 and one.makes <= STORED:
            for name, shape in one.tensors:
                held = own.get(name, module.get_parameter(name)).detach()
                grouped = held.float().reshape(heads, spec.kv.heads // heads, -1, *shape[1:])
                made[name] = grouped.mean(1).flatten(0, 1).to(held.dtype).contiguous()
    return made


def require_known(opened: OpenedModel, group: Group, stack: str, how: str) -> dict[int, Projections]:
    """The matrices of each layer by heads. Raises U668 where those of queries, keys, values or output are not known, or
    where positions turn the keys of two layers in different ways."""
    found: dict[int, Projections] = {}
    for layer, one in projections_of(opened, group, stack).items():
        why = one if isinstance(one, str) else one.scores if isinstance(one.scores, str) else None
        if why is not None or isinstance(one, str):
            raise _refusal((layer,), str(why), how)
        found[layer] = one
    turns = {(side.pairs, side.plain) for one in found.values() if isinstance(side := one.scores, ScoreSide)}
    if len(turns) > 1:
        raise _refusal(group, "positions turn their keys in different ways", how)
    return found


def _refusal(group: Group, why: str, how: str = "average") -> UsageError:
    named = "layer" if len(group) == 1 else "layers"
    other = "how=average or how=first" if how == "aligned" else "how=first"
    return UsageError(
        f"share-kv: how={how} cannot rewrite the attention of {named} {', '.join(map(str, group))}: {why}; "
        f"take {other}",
        code="U668",
    )


def _parameters(layer: torch.nn.Module, roles: HeadRoles, group: Group) -> list[str]:
    modules = roles.unused(STORED)
    if len(roles.keys) != 1 or len(roles.values) != 1 or roles.keys == roles.values:
        raise _refusal(group, f"{len(modules)} modules make keys and values together, and no one matrix does")
    return [f"{module}.{name}" for module in modules for name, _ in layer.get_submodule(module).named_parameters()]


def _values(known: Projections) -> Projection:
    return known.values


def _keys(known: Projections) -> Projection:
    assert isinstance(known.scores, ScoreSide)
    return known.scores.keys
