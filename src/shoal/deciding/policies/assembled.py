"""Assembled: at each step a router picks for each token one of several layers, attentions or mlps, or none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

from shoal.deciding.gating import filled, halved
from shoal.deciding.places import PlaceOptions, PlacePolicy, places_of
from shoal.deciding.policy import Grain, Policy
from shoal.deciding.policy_options import layer_list
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Run, Spec, format_steps
from shoal.plan.select import whole_run
from shoal.plan.sources import Fill
from shoal.plan.steps import PARTS, decides

EXAMPLES = PolicyExamples(
    deciding=("assembled:layers=1-2,choose=skip", "assembled:layers=1-2,choose=skip,part=layer,fill=mask",
              "assembled:layers=1-3,choose=own,steps=2,grain=row"),
    never=("assembled:part=halves,choose=own,fill=mask", "assembled:part=layer,choose=own,fill=mask",
           "assembled:part=layer,choose=own,reach=0", "assembled:part=layer,choose=own,grain=row,ends=true"),
    always={"assembled:layers=1-2,choose=skip": "0,3", "assembled:layers=1-2,part=layer,choose=skip,ends=true": "0,3",
            "assembled:layers=1-3,part=layer,choose=own,steps=2": "0,1,3",
            "assembled:layers=1-2,part=layer,choose=own,steps=1,fill=mask": "0,1,3"},
    refused=(
        Refusal("routers that have not learned", "assembled:layers=1-2", "U714", "pick-0a-0.weight"),
        Refusal("no stretch of the plan", "assembled:layers=1-2,choose=own", "U716", "layers=1,2", plan="0,2-3"),
        Refusal("layers apart", "assembled:layers=1,3,choose=own", "U716", "layers=1,3"),
        Refusal("no steps", "assembled:steps=0,choose=own", "U716", "steps=0"),
        Refusal("a reach below 0", "assembled:reach=-1,choose=own", "U716", "reach=-1"),
        Refusal("a temperature of 0", "assembled:temperature=0,choose=own", "U716", "temperature=0"),
        Refusal("nothing to skip to", "assembled:skip=false,choose=skip", "U716", "skip=false"),
        Refusal("the mask of a whole sequence", "assembled:grain=row,fill=mask,choose=own", "U716", "fill=mask"),
        Refusal("halves side by side", "assembled:choose=own", "U711", "layer 1", family="falcon"),
        Refusal("gates of another policy", "assembled:choose=own", "U715", "route", plan="0,1?route,2-3"),
    ),
)  # fmt: skip
GATE = "pick"


def assembled(
    plan: Plan,
    spec: Spec,
    *,
    layers: str = "",
    part: Literal["halves", "layer"] = "halves",
    steps: int | None = None,
    reach: int | None = None,
    skip: bool = True,
    ends: bool = False,
    router: Literal["each", "shared"] = "each",
    grain: Literal["token", "row"] = "token",
    relax: Literal["straight-through", "gumbel"] = "straight-through",
    temperature: float = 1.0,
    final_temperature: float | None = None,
    choose: Literal["", "own", "skip"] = "",
    fill: Literal["auto", "project", "mask"] = "auto",
) -> Policy:
    """At each of H steps each token takes one module of a pool, or none: layers in any order, again, or left out.

    The pool are n `layers` (3-8), a stretch of the plan, in whose place H = `steps` steps stand (default n). With
    `part` halves a step is two places: one of the n attentions, then one of the n mlps; with `part` layer it is one of
    the n layers. With x [hidden] the state of a token in front of a place, scaled to a root mean square of 1 in
    float32, it takes the module m with the highest s_m = w_m . x + b_m, or with `skip` none where all s_m are below 0:
    x stays. All modules of a place read the same x. Module 3 of the attentions (a, m, l) of step 0 has w
    pick-0a-3.weight [1, hidden] and b pick-0a-3.bias [1]; with `router` shared a w is for all steps, and b is each
    step's own. `reach` 2: only modules at most 2 places of the pool from the step's own, m = round(t (n - 1) / (H - 1))
    at step t, with which it begins. `ends`: who took none takes none later, which is the way out. `grain` row: a
    sequence decides at each place once, by the mean of its prompt. In training the one-hot choice has the gradient of
    softmax(s / T), by `relax` gumbel of scores with Gumbel noise, T from `temperature` to `final_temperature`; every
    module of a place runs then. `choose`, without tensors: own, each step its own module, which is the plan as it
    stands; skip, none ever.

    A step has a row of the KV cache for each of its attentions, H n rows in place of n. Tokens that did not take one
    give it keys and values made of their x (`fill` project), or it does not see them (mask).

    Source: Gong et al. 2024 (Mixture-of-Modules, arXiv 2407.06677): two routers over pools of attentions and mlps with
    SKIP. part=layer, ends, router=shared: Dotzel et al. 2024 (Radial Networks, arXiv 2404.04900), by its text.

    How we differ: a token takes one module of a place and not the K best, and no score multiplies what it changes;
    routers are linear, and know the step by b alone. Of Radial Networks the one KV cache of all layers is not there,
    and the router is not told from which layer a token comes. Raises U716 for options out of range, U714 for routers
    without tensors, U715 for a plan with other gates.
    """
    last = temperature if final_temperature is None else final_temperature
    _require_sound(steps, reach, skip, choose, temperature, last, grain, fill)
    if not decides(plan.steps()):
        rule: Fill | None = None if grain == "row" else "project" if fill == "auto" else fill
        named = plan.layers()[1:] if not layers else layer_list(layers)
        plan = _placed(plan, spec, named, part, steps, reach, rule)
    modules = 1 + max(max(numbers) for numbers in places_of(plan, single=True).values())
    options = PlaceOptions(
        rows=modules + skip, none=skip, by_row=grain == "row", relax=relax, temperature=temperature,
        final_temperature=last, ends=ends and skip,
    )  # fmt: skip
    return (_ByRow if grain == "row" else _Assembled)(plan, options, modules, choose, router == "shared")


class _Assembled(PlacePolicy):
    def __init__(self, plan: Plan, options: PlaceOptions, modules: int, choose: str, shared: bool) -> None:
        super().__init__(plan, options)
        self.modules, self.choose, self.shared = modules, choose, shared
        self.steps = 1 + max(_step(place) for place in self.places)

    def weight_of(self, place: str, number: int) -> str:
        if self.shared:  # the first place that has this module
            place = next(one for one, own in self.places.items() if one[-1] == place[-1] and number in own)
        return super().weight_of(place, number)

    def fixed(self, place: str) -> int | None:
        return {"own": self.own(place), "skip": self.options.rows - 1}.get(self.choose)

    def own(self, place: str) -> int:
        return _own(_step(place), self.steps, self.modules)


class _ByRow(_Assembled):
    grain: ClassVar[Grain] = "row"
    consistent = True


def _placed(
    plan: Plan, spec: Spec, named: tuple[int, ...], part: str, steps: int | None, reach: int | None, fill: Fill | None
) -> Plan:
    """The plan with the candidates of each place one behind the other, in the place of the pool's layers."""
    there = plan.steps()
    at = next((n for n in range(len(there)) if [run.layer for run in map(whole_run, there[n : n + len(named)]) if run]
               == list(named)), None)  # fmt: skip
    if not named or at is None:
        raise _wrong(f"layers={','.join(map(str, named))} is no stretch of the plan {format_steps(there)}",
                     "name whole layers that follow each other there")  # fmt: skip
    pool = there[at : at + len(named)]
    halves = halved(plan.with_steps(pool), spec).steps() if part == "halves" else pool
    kinds = [[run for run in halves if isinstance(run, Run) and run.part == kind] for kind in PARTS]
    count = len(named) if steps is None else steps
    made: list[Run] = []
    for step in range(count):
        own = _own(step, count, len(named))
        for modules in kinds:
            for number, run in enumerate(modules):
                if reach is None or abs(number - own) <= reach:
                    kv = filled(run, spec.stack().layers[run.layer], fill)
                    made.append(replace(run, gate=f"{GATE}-{step}{run.part[0]}-{number}", kv=kv))
    return plan.with_steps((*there[:at], *made, *there[at + len(named) :]))


def _own(step: int, steps: int, modules: int) -> int:
    """The module of the pool with which a step begins."""
    return round(step * (modules - 1) / (steps - 1)) if steps > 1 else 0


def _step(place: str) -> int:
    """The step whose place it is. Raises U715 for a place of another policy."""
    kind, _, number = place.partition("-")
    if kind != GATE or not number[:-1].isdecimal() or number[-1:] not in [part[0] for part in PARTS]:
        raise UsageError(
            f"the gates {place}-... are not those that assembled puts into a plan, {GATE}-0a-3; give the plan without "
            "gates",
            code="U715",
        )
    return int(number[:-1])


def _require_sound(
    steps: int | None, reach: int | None, skip: bool, choose: str, warm: float, cold: float, grain: str, fill: str
) -> None:
    wrong = [
        (steps is not None and not 0 < steps <= 1000, f"steps={steps} is no number of steps", "write steps=4"),
        (reach is not None and reach < 0, f"reach={reach} is below 0", "write reach=0 for a step's own module alone"),
        (choose == "skip" and not skip, "choose=skip is none of the choices with skip=false", "leave one of them out"),
        (not 0 < warm < math.inf, f"temperature={warm:g} must be above 0", "write temperature=1"),
        (not 0 < cold < math.inf, f"final_temperature={cold:g} must be above 0", "write final_temperature=0.5"),
        (grain == "row" and fill != "auto", f"fill={fill} is for tokens that skip an attention, and with grain=row no "
         "key is missing", "leave it out"),
    ]  # fmt: skip
    for is_wrong, what, remedy in wrong:
        if is_wrong:
            raise _wrong(what, remedy)


def _wrong(what: str, remedy: str) -> UsageError:
    return UsageError(f"assembled: {what}; {remedy}", code="U716")
