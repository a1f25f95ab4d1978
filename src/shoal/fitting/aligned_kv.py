"""A plan whose layers share keys and values, and the tensors that fit it: several sharings from one pass over text."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.errors import UsageError
from shoal.fitting.align import Lost, align
from shoal.fitting.average import require_known
from shoal.fitting.kv_moments import Moments, moments_of
from shoal.fitting.result import Job, Transformed
from shoal.fitting.sharing import Group, sole_runs, with_tensors
from shoal.models.opened import open_model
from shoal.models.projections import HeadMatrices, Projections
from shoal.plan import Plan, require, shapes_of
from shoal.plan.edit import share_kv
from shoal.plan.later import later_sources
from shoal.plan.tensors import tensors_of


class Aligner:
    """Closed forms of groups of layers, fitted on the job's text under the job's plan. The text is read once, when the
    first of them is asked for."""

    def __init__(self, job: Job, groups: tuple[Group, ...], what: str) -> None:
        """`groups`: those that may be asked for. Raises U667 and U668 for layers that cannot share, and what a plan
        that shares raises, before any text is read."""
        opened = open_model(job.model)
        self.job, self.groups = job, groups
        self.stack = opened.stack(job.stack)
        own = sole_runs(job.plan, groups, opened.spec.stack(self.stack.name), what)
        for group in groups:
            shared = shared_plan(job.plan, (group,), self.stack.name)
            require(shared, opened.spec, shapes_of(job.weights))
            refuse_later(shared, self.stack.name, what)
        self.known: dict[int, Projections] = {}
        for group in groups:
            self.known |= require_known(opened, group, self.stack.name, "aligned")
        self.tensors = {layer: tensors_of(run.weights or "", job.weights) for layer, run in own.items()}
        self._moments: Moments | None = None

    def convert(self, groups: Iterable[Group], *, weighted: bool = True, ridge: float = 1e-3) -> Transformed:
        """The plan in which the later layers of each group read the first one's keys and values, with its tensors; no
        layer may stand in two groups. The notes say what each layer loses."""
        if self._moments is None:
            modules = {layer: one.values.module for layer, one in self.known.items()}
            self._moments = moments_of(self.job, self.groups, modules)
        wanted = tuple(groups)
        new, notes = {}, []
        for group in wanted:
            matrices = {
                layer: HeadMatrices(self.stack.layer(layer), self.known[layer], dict(self.tensors[layer]))
                for layer in group
            }
            lost = align(group, matrices, self._moments, weighted=weighted, ridge=ridge)
            notes += [_said(one, group[0]) for one in lost]
            for layer in group:
                new[layer] = {**self.tensors[layer], **matrices[layer].rewritten(source=layer == group[0])}
        return with_tensors(self.job, shared_plan(self.job.plan, wanted, self.stack.name), new, "share-kv", *notes)


def shared_plan(plan: Plan, groups: Iterable[Group], stack: str) -> Plan:
    """`plan` in which the later layers of each group read the keys and values of its first one."""
    for group in groups:
        for reader in group[1:]:
            plan = share_kv(plan, reader, group[0], stack=stack)
    return plan


def refuse_later(plan: Plan, stack: str, what: str) -> None:
    """Raise U681 where a layer would read one that runs later: what it would be given depends on what it makes, so it
    cannot be predicted from text that the model has read without it."""
    for _, run, source in later_sources(plan.steps(stack)):
        raise UsageError(
            f"{what} fits what a layer reads to what the model makes, and layer {source.layer} runs later than layer "
            f"{run.layer}, which would read it; name the layer that is read first, or give how=average or how=first",
            code="U681",
        )


def _said(lost: Lost, source: int) -> str:
    who = f"{lost.layer}" if lost.layer == source else f"{lost.layer} reads {source}"
    return f"{who}: {lost.keys:.1%} of what its keys do is lost, {lost.values:.1%} of its values"
