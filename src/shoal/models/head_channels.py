"""Which rows of which matrix are which channel of which head, and what heads may exchange without a change.

A head's values may be mapped by any invertible matrix, and so may its keys where nothing turns them; where positions
turn two channels together, by any complex number on them. The way back goes into the output matrix and the queries.
Channels are found by giving each row an answer of its own, and the exchange is *proved*: with random maps in its
matrices the layer must answer the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from shoal.models.evaluating import evaluating
from shoal.models.examine import LayerFacts
from shoal.models.listening import Call, Heard, heard, no_context, sample_calls
from shoal.models.opened import OpenedModel
from shoal.models.packed import is_plain
from shoal.models.precision import in_float64
from shoal.models.projections import HeadMatrices, Projection, Projections, ScoreSide
from shoal.models.roles import HeadRoles

NEAR = 1e-3
"""How far, of what the attention adds, the answer may be off that proves an exchange; float32 was seen to give 1e-6."""
_QUERIES, _KEYS, _VALUES = range(3)


def projections_of(
    opened: OpenedModel, layers: Sequence[int], stack: str | None = None
) -> dict[int, Projections | str]:
    """For each of the layers its matrices by heads, or why they are not known. Runs the model, which must be whole, on
    a few tokens, and a copy of each layer in float32; what was found out is kept."""
    name = opened.stack(stack).name
    known: dict[int, Projections | str] = opened.remember(f"projections of {name}", dict)
    if missing := [layer for layer in layers if layer not in known]:
        facts = opened.facts(name).layers
        calls = sample_calls(opened.model, opened.stack(name)) if any(facts[layer].roles for layer in missing) else []
        with evaluating(opened.model):
            for layer in missing:
                role = facts[layer].roles
                known[layer] = (
                    "no role of its matrices is known"
                    if role is None
                    else _projections(opened.stack(name).layer(layer), facts[layer], calls[layer], role)
                )
    return {layer: known[layer] for layer in layers}


class _UnfitError(Exception):
    """Why the matrices of an attention are not known by heads."""


def _projections(layer: nn.Module, fact: LayerFacts, call: Call, roles: HeadRoles) -> Projections | str:
    if not all(map(is_plain, layer.parameters())):
        return "its weights are quantised or not in memory"
    try:
        probe = _Probe(copy.deepcopy(layer).float(), fact, call)
        values, output = probe.rows(_one(roles.values, "values"), _VALUES), probe.columns(_one(roles.output, "output"))
        bare = Projections(values, output, "not known")
        probe.prove(bare)
        try:
            scores: ScoreSide | str = probe.scores(_one(roles.queries, "queries"), _one(roles.keys, "keys"))
            probe.prove(Projections(values, output, scores))
        except _UnfitError as error:
            scores = str(error)
        return Projections(values, output, scores)
    except _UnfitError as error:
        return str(error)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        return f"it cannot be probed ({type(error).__name__})"


def _one(modules: tuple[str, ...], what: str) -> str:
    if len(modules) != 1:
        raise _UnfitError(f"{len(modules)} modules make its {what}" if modules else f"no module makes its {what} alone")
    return modules[0]


class _Probe:
    """Calls of one layer, a copy that may be changed."""

    def __init__(self, layer: nn.Module, fact: LayerFacts, call: Call) -> None:
        self.layer, self.fact = layer, fact
        args, kwargs = call
        self.call: Call = tuple(map(_single, args)), {name: _single(value) for name, value in kwargs.items()}
        self.generator = torch.Generator().manual_seed(3)

    def heard(self, call: Call | None = None, attend: Any = None) -> Heard:
        seen = heard(self.layer, self.fact.cache_at, call or self.call, attend=attend or no_context)
        if len(seen.asked) != 1:
            raise _UnfitError("it works its attention out itself")
        return seen

    def rows(self, module: str, which: int) -> Projection:
        """The channels in what `module` answers, read off the first token, which no position has turned."""

        def read(codes: torch.Tensor) -> torch.Tensor:
            with _answering(self.layer.get_submodule(module), lambda out: codes.to(out).expand_as(out)):
                return self.heard().asked[0][which][0, :, 0]

        size = self._seen(module)[1].shape[-1]
        found = _decoded(read, size)
        return Projection(module, tuple(map(tuple, found.tolist())), self._turned(module))

    def columns(self, module: str) -> Projection:
        """The channels in what `module`, behind the attention, is given."""
        plain = self.heard().asked[0]
        heads, dim = plain[_QUERIES].shape[1], plain[_VALUES].shape[-1]

        def read(codes: torch.Tensor) -> torch.Tensor:
            table = codes.view(heads, dim)
            return self._seen(module, lambda q, k, v: table.to(v).expand(q.shape[0], q.shape[2], -1, -1))[0][0]

        found = _decoded(read, heads * dim)
        if len(found) != heads * dim:
            raise _UnfitError("what leaves its heads does not go into one matrix alone")
        places = torch.empty_like(found)
        places[found] = torch.arange(len(found))
        return Projection(module, tuple(map(tuple, places.view(heads, dim).tolist())), self._turned(module))

    def scores(self, queries: str, keys: str) -> ScoreSide:
        made = self.rows(queries, _QUERIES), self.rows(keys, _KEYS)
        turns = [_turns(self._single_channels(one, which)) for one, which in zip(made, (_QUERIES, _KEYS), strict=True)]
        if turns[0] != turns[1]:
            raise _UnfitError("positions turn its queries and its keys in different ways")
        return ScoreSide(*made, *turns[0])

    def _single_channels(self, one: Projection, which: int) -> torch.Tensor:
        """[dim, tokens, dim]: what becomes of each channel of the first head, alone, at each token."""
        dim = len(one.channels[0])
        args, kwargs = self.call
        hidden = args[0] if args else kwargs["hidden_states"]
        many = hidden.expand(dim, -1, -1)
        call: Call = ((many, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": many})

        def answer(out: torch.Tensor) -> torch.Tensor:
            ones = torch.zeros(dim, out.numel() // dim // out.shape[-1], out.shape[-1]).to(out)
            ones[torch.arange(dim), :, list(one.channels[0])] = 1
            return ones.view_as(out)

        with _answering(self.layer.get_submodule(one.module), answer):
            return self.heard(call).asked[0][which][:, 0]

    def _seen(self, module: str, attend: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes into a module, [tokens, inputs], and what comes out."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = self.layer.get_submodule(module).register_forward_hook(
            lambda _, args, out: seen.append((args[0].reshape(-1, args[0].shape[-1]), out.reshape(-1, out.shape[-1])))
        )
        try:
            self.heard(attend=attend)
        finally:
            handle.remove()
        return seen[0]

    def _turned(self, module: str) -> bool:
        """Whether its weight is [inputs, outputs]; anything but a weight and a bias is refused."""
        x, y = self._seen(
            module, lambda q, k, v: torch.randn(no_context(q, k, v).shape, generator=self.generator).to(v)
        )
        own = self.layer.get_submodule(module)._parameters
        weight, bias = own["weight"], own.get("bias")
        assert weight is not None
        for turned in (False, True):
            matrix = weight.T if turned else weight
            if matrix.shape == (y.shape[-1], x.shape[-1]) and _close(linear(x, matrix, bias), y):
                return turned
        raise _UnfitError(f"{module} does more than multiply with its weight")

    def prove(self, known: Projections) -> None:
        """Random maps of each head, with their ways back, must leave the answer as it is."""
        own = HeadMatrices(self.layer, known)
        quiet = {
            f"{known.output.module}.weight": torch.zeros_like(
                own.written(known.output)[f"{known.output.module}.weight"]
            )
        }
        before = self._answer({})
        adds = before - self._answer(quiet)
        for head in range(len(known.values.channels)):
            change = self._drawn(len(known.values.channels[head]))
            own.put_rows(known.values, head, change @ own.rows(known.values, head))
            for reader in known.readers(head):
                own.put_columns(reader, own.columns(reader) @ torch.linalg.inv(change))
        changed = [known.values, known.output]
        if not isinstance(known.scores, str):
            changed += [known.scores.queries, known.scores.keys]
            self._exchange_keys(own, known, known.scores)
        after = self._answer(own.written(*changed))
        if not bool((after - before).abs().max() <= NEAR * adds.abs().max()):
            what = "values and output" if isinstance(known.scores, str) else "queries and keys"
            raise _UnfitError(f"something that is not linear stands between its {what}")

    def _exchange_keys(self, own: HeadMatrices, known: Projections, scores: ScoreSide) -> None:
        plain = list(scores.plain)
        for head in range(len(scores.keys.channels)):
            change = torch.zeros(2 * [len(scores.keys.channels[head])], dtype=torch.float64)
            for a, b in scores.pairs:
                re, im = (0.5 + torch.rand(2, generator=self.generator, dtype=torch.float64)).tolist()
                change[a, a] = change[b, b] = re
                change[a, b], change[b, a] = -im, im
            if plain:
                change[torch.tensor(plain)[:, None], plain] = self._drawn(len(plain))
            change = change.to(own.tables[scores.keys.module].device)
            own.put_rows(scores.keys, head, change @ own.rows(scores.keys, head))
            for reader in known.readers(head):
                own.put_rows(scores.queries, reader, torch.linalg.inv(change).T @ own.rows(scores.queries, reader))

    def _answer(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The layer's answer with these tensors in place of its own."""
        args, kwargs = self.call
        kept = {name: self.layer.get_parameter(name) for name in tensors}
        try:
            for name, tensor in tensors.items():
                module, _, leaf = name.rpartition(".")
                self.layer.get_submodule(module)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            seen = heard(self.layer, self.fact.cache_at, (args, kwargs))
        finally:
            for name, tensor in kept.items():
                module, _, leaf = name.rpartition(".")
                self.layer.get_submodule(module)._parameters[leaf] = tensor
        assert seen.out is not None
        return in_float64(seen.out)

    def _drawn(self, size: int) -> torch.Tensor:
        """A matrix that is far from singular."""
        drawn = torch.randn(size, size, generator=self.generator, dtype=torch.float64)
        matrix = torch.linalg.qr(drawn)[0] * (0.5 + torch.rand(size, generator=self.generator, dtype=torch.float64))
        return matrix.to(in_float64(next(self.layer.parameters())).device)


def _single(value: Any) -> Any:
    """Tensors in float32, also within a tuple of them."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    return tuple(map(_single, value)) if type(value) is tuple else value


@contextmanager
def _answering(module: nn.Module, answer: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, out: answer(out))
    try:
        yield
    finally:
        handle.remove()


def _decoded(read: Callable[[torch.Tensor], torch.Tensor], size: int) -> torch.Tensor:
    """Which of `size` places each number in what is read comes from, each place by the same factor on all."""
    factor = read(torch.ones(size))
    found = (read(torch.arange(1.0, size + 1)) / factor).cpu() - 1
    places = found.round()
    if not bool(torch.isfinite(found).all()) or not bool(((found - places).abs() < 0.1).all()):
        raise _UnfitError("a norm or another function stands behind a matrix of its heads")
    places = places.long()
    if int(places.min()) < 0 or int(places.max()) >= size or len(places.unique()) != places.numel():
        raise _UnfitError("the channels of its heads are not those of its matrices")
    return places


def _turns(made: torch.Tensor) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Pairs and plain channels of `made` [channel, tokens, channel]."""
    touched = (made != 0).any(1)
    pairs: list[tuple[int, int]] = []
    plain: list[int] = []
    for channel in range(len(made)):
        other = [c for c in touched[channel].nonzero().flatten().tolist() if c != channel]
        if not other and _close(made[channel, :, channel], made[channel, :1, channel].expand(made.shape[1])):
            plain.append(channel)
            continue
        if len(other) != 1 or not touched[other[0], channel] or not _complex(made, channel, other[0]):
            raise _UnfitError("positions turn its keys in a way that no complex number follows")
        if channel < other[0]:
            pairs.append((channel, other[0]))
    return tuple(pairs), tuple(plain)


def _complex(made: torch.Tensor, a: int, b: int) -> bool:
    return _close(made[a, :, a], made[b, :, b]) and _close(made[a, :, b], -made[b, :, a])


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1e-30))
