"""The tensors of an exit's own head: their names, their shapes, and which depths they read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from shoal.plan.select import exits
from shoal.plan.spec import StackSpec
from shoal.plan.steps import Step, ends_in
from shoal.plan.tensors import Finding, Shapes, tensors_of

KEEPS, READS, LOGITS, PLAUSIBLE = "keeps", "reads", "logits", "plausible"
_DEPTH = re.compile(rf"(?P<what>{READS}|{LOGITS})\.(?P<depth>-1|\d{{1,6}})", re.ASCII)


def depths_in(head: str, what: str, names: Iterable[str]) -> tuple[int, ...]:
    """The layers N of the tensors HEAD.WHAT.N, ascending; -1 is what came in."""
    start = f"{head}.{what}."
    return tuple(sorted(int(name.removeprefix(start)) for name in names if name.startswith(start)))


def depths_read(steps: tuple[Step, ...], names: Iterable[str]) -> frozenset[int]:
    """The layers whose states some head of these steps reads."""
    held = tuple(names)
    heads = {step.head for step in exits(steps)}
    return frozenset(depth for head in heads for what in (READS, LOGITS) for depth in depths_in(head, what, held))


def before_exits(steps: tuple[Step, ...]) -> dict[str, frozenset[int]]:
    """By head the layers that have made the state that all its exits are given; none where they are given several."""
    found: dict[str, frozenset[int]] = {}
    last: frozenset[int] = frozenset()
    for step in steps:
        last = ends_in(step) or last
        for one in exits((step,)):
            found[one.head] = found.get(one.head, last) & last
    return found


def unfit_heads(steps: tuple[Step, ...], stack: StackSpec, vocab: int, shapes: Shapes) -> Iterator[Finding]:
    """P113 for tensors of an exit's own head that have another name or shape than they must, P165 for those that read
    the state of a layer that does not run in front of the exit."""
    size = stack.hidden
    right = {"lens": (size, size), "lens_bias": (size,), "weight": (vocab, size), "bias": (vocab,), "probe": (size,),
             "probe_bias": (1,), "halting": (size,), "halting_bias": (1,), PLAUSIBLE: (1,)}  # fmt: skip
    ran = {-1}
    for step in steps:
        ran |= ends_in(step)
        for one in exits((step,)):
            for name, shape in tensors_of(one.head, shapes).items() if one.head != "base" else ():
                here, depth = f"{one.head}.{name} of exit {one.name}", _DEPTH.fullmatch(name)
                allowed: tuple[tuple[int, ...], ...] = (right[name],) if name in right else ()
                if depth is not None:
                    allowed = ((1,), (size,), (size, size)) if depth["what"] == READS else ((vocab,),)
                elif name == KEEPS:
                    allowed = ((1,), (size,))
                if not allowed:
                    known = f"{', '.join(right)}, {KEEPS}, {READS}.N and {LOGITS}.N of a layer N"
                    yield "P113", None, f"{here} is no tensor of a head; its tensors are called {known}"
                elif shape not in allowed:
                    said = " or ".join(str(list(one)) for one in allowed)
                    yield "P113", None, f"{here} is {list(shape)} instead of {said}; fit it on this model"
                elif depth is not None and int(depth["depth"]) not in ran:
                    layer = int(depth["depth"])
                    why = f"reads the state behind layer {layer}, which does not run in front of it"
                    yield "P165", layer, f"{here} {why}; name one of {', '.join(map(str, sorted(ran)))}"
            if PLAUSIBLE in tensors_of(one.head, shapes) and not depths_in(one.head, LOGITS, shapes):
                why = f"is for scores of several depths, and {one.head} has no {LOGITS}.N"
                yield "P113", None, f"{one.head}.{PLAUSIBLE} of exit {one.name} {why}; leave it out"
