"""Small nets that are trained to take over what a removed span did: where each stands and how it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import torch

from shoal.errors import UsageError
from shoal.fitting.holes import Hole, Pair
from shoal.fitting.maps import limit_tensor
from shoal.fitting.result import Fit
from shoal.fitting.train import Learned, Trained, train
from shoal.models.packed import is_plain
from shoal.models.streamed import parameters_of, weights_loaded
from shoal.plan import Map, Plan, Run, Step
from shoal.plan.select import whole_run

Kind = Literal["layer", "ffn", "swiglu"]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a net stands: as the step `place` of the plan (a layer) or before it (a map)."""

    place: int
    step: Run | Map
    holes: tuple[Hole, ...]
    """What it takes over."""

    def targets(self, pair: Pair) -> list[torch.Tensor]:
        """The dense states that it should make, [batch, length, hidden] each."""
        match self.step:
            case Map():
                return list(pair.targets(self.holes[0]))
            case Run():
                pair.dense_to(max(self.step.layer, self.holes[-1].last) + 1)
                return list(pair.dense.states)
            case _:
                assert_never(self.step)

    @property
    def replaces(self) -> bool:
        """Whether it stands in the place of the plan's step, and not before it."""
        match self.step:
            case Run():
                return True
            case Map():
                return False
            case _:
                assert_never(self.step)


def map_sites(holes: Sequence[Hole]) -> list[Site]:
    """A map in each hole."""
    return [Site(hole.position, Map(hole.first, hole.last, hole.weights), (hole,)) for hole in holes]


def layer_sites(plan: Plan, holes: Sequence[Hole], name: str, stack: str | None) -> list[Site]:
    """The layer before each hole, or behind the one that the plan begins with. Raises U557."""
    steps = plan.steps(stack)
    found: dict[int, Site] = {}
    for hole in holes:
        place = max(0, hole.position - 1)
        run = whole_run(steps[place])
        if hole.part != "layer" or run is None:
            raise UsageError(
                f"{name} trains the layer beside {hole}, and no whole layer with its own weights runs there; keep one",
                code="U557",
            )
        before = found[place].holes if place in found else ()
        found[place] = Site(place, replace(run, weights=f"{name}-{run.layer}"), (*before, hole))
    return list(found.values())


def with_sites(plan: Plan, sites: Sequence[Site], stack: str | None) -> Plan:
    """The plan with these nets in it."""
    steps: list[Step] = list(plan.steps(stack))
    for site in reversed(sites):  # from behind, so that places stay right
        steps[site.place : site.place + site.replaces] = [site.step]
    return plan.with_steps(tuple(steps), stack)


def layer_net(pair: Pair, run: Run) -> Learned:
    """The tensors of the run's layer as they are. Raises U556 when they are not in memory, or quantised."""
    own = parameters_of(pair.inputs.stack.layer(run.layer))
    if not all(map(is_plain, own.values())):
        raise UsageError(
            f"training needs the weights of layer {run.layer} in memory and not quantised; load the model so",
            code="U556",
        )
    named = {f"{run.weights}.{name}": tensor for name, tensor in own.items()}
    return Learned(named, {name: tensor.dtype for name, tensor in named.items()}, {})


def map_net(
    pair: Pair, site: Site, targets: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], kind: Kind, inner: int
) -> Learned:
    """A net that adds nothing yet, in units in which the states and what they lack have the size 1."""
    state = pair.pruned.states[0]
    size, draw = state.shape[-1], torch.Generator().manual_seed(pair.job.seed + site.holes[0].first)
    shapes = {"gate": (inner, size)} | ({"down": (inner, size)} if kind == "swiglu" else {})
    drawn = {name: torch.randn(shape, generator=draw) / size**0.5 for name, shape in shapes.items()}
    zeros = {"up": torch.zeros(size, inner), "bias": torch.zeros(size)}
    named = {f"{site.step.weights}.{n}": t.to(state.device) for n, t in (drawn | zeros).items()}
    x = torch.cat([s[keep].float() for s, keep in zip(pair.pruned.states, kept, strict=True)])
    y = torch.cat([t.to(k.device)[k].float() for t, k in zip(targets, kept, strict=True)])
    given, lacking = (float(one.square().mean().sqrt().clamp(min=1e-12)) for one in (x, y - x))
    factors = {name: 1 / given if name.endswith((".gate", ".down")) else lacking for name in named}
    return Learned(named, dict.fromkeys(named, state.dtype), factors)


def fit_site(
    pair: Pair, site: Site, kind: Kind, *, inner: int | None, epochs: int, rate: float
) -> tuple[Learned, dict[str, torch.Tensor], Fit]:
    """Train the net of a site, at which the pruned stream stands, on the dense states, and take the stream through it.

    The net, the tensors beside it that are not trained, and mean |f(x) - y|^2 / |y|^2 per element before and after.
    Raises U554 when no token counts.
    """
    targets = site.targets(pair)
    if isinstance(site.step, Run):  # read once, however many steps the training takes
        with weights_loaded(pair.inputs.stack.layer(site.step.layer)):
            return _fit_here(pair, site, targets, kind, inner=inner, epochs=epochs, rate=rate)
    return _fit_here(pair, site, targets, kind, inner=inner, epochs=epochs, rate=rate)


def _fit_here(
    pair: Pair,
    site: Site,
    targets: Sequence[torch.Tensor],
    kind: Kind,
    *,
    inner: int | None,
    epochs: int,
    rate: float,
) -> tuple[Learned, dict[str, torch.Tensor], Fit]:
    limit = pair.limit()
    kept = pair.counted(limit)
    size = targets[0].shape[-1]
    fixed: dict[str, torch.Tensor] = {}
    match site.step:
        case Map():
            fixed = limit_tensor(site.holes[0], limit)
            net = map_net(pair, site, targets, kept, kind, inner or max(1, size // (2 if kind == "ffn" else 3)))
        case Run():
            net = layer_net(pair, site.step)
        case _:
            assert_never(site.step)

    def loss(number: int) -> torch.Tensor:
        keep = kept[number]
        out = pair.pruned.run(number, site.step, fixed | net.tensors())[keep].float()
        wanted = targets[number].to(out.device)[keep].float()
        length = wanted.square().sum(-1).clamp(min=1e-12)
        return ((out - wanted).square().sum(-1) / length).mean() / size

    fitted = [n for n in range(len(kept)) if n not in pair.held and bool(kept[n].any())]
    held = [n for n in sorted(pair.held) if bool(kept[n].any())]
    if not fitted:
        raise UsageError("no token is left to train on; give more or longer calibration sequences", code="U554")
    done = train(list(net.leaves.values()), loss, fitted, held, epochs=epochs, rate=rate, seed=pair.job.seed)
    pair.pruned.advance(site.step, fixed | net.finished())
    if site.replaces:
        pair.skip_step()
    return net, fixed, _fit(site, done, epochs)


def _fit(site: Site, done: Trained, epochs: int) -> Fit:
    note = f"{epochs} epochs, relative errors"
    return Fit(", ".join(map(str, site.holes)), done.before, done.after, done.held_before, done.held_after, note)
