"""Stand-ins that live in the layer before the hole: what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from shoal.fitting.holes import Hole, Pair
from shoal.fitting.result import Fit, Job, Transformed
from shoal.fitting.writers import Prober, Writer, output_module
from shoal.models.evaluating import evaluating
from shoal.models.precision import in_float64
from shoal.models.streamed import weights_loaded
from shoal.plan import Run, Step
from shoal.plan.select import run_of
from shoal.plan.steps import PartName


@dataclass
class Site:
    """A run whose last part is rewritten so that its output comes near the dense state behind the hole after it."""

    pair: Pair
    run: Run
    part: PartName
    """The part of the run that writes last: mlp, or attention where only that runs."""
    hole: Hole
    writers: tuple[Writer, ...]
    targets: list[torch.Tensor]
    fits: list[Fit] = field(default_factory=list)

    @property
    def layer(self) -> torch.nn.Module:
        return self.pair.inputs.stack.layer(self.run.layer)

    @property
    def module(self) -> str | None:
        """The one linear module that the writers belong to."""
        return output_module(self.layer, self.writers)

    def outputs(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For one batch the state before the last part has written, and what it writes, [batch, length, hidden]."""
        with evaluating(self.pair.inputs.model):
            out = self.pair.pruned.run(number, self.run, self.pair.job.weights)
            quiet = {f"quiet.{w.name}": torch.zeros_like(self.layer.get_parameter(w.name)) for w in self.writers}
            rest = self.pair.pruned.run(number, Run(self.run.layer, self.run.part, "quiet"), quiet)
        return rest, out - rest

    def inputs(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """`outputs`, what goes into the module that writes, [batch, length, inputs], and the factor between what that
        module returns and what reaches the hidden state (Granite's residual multiplier)."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        assert self.module is not None
        module = self.layer.get_submodule(self.module)
        hook = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        try:
            rest, written = self.outputs(number)
        finally:
            hook.remove()
        given, out = seen[0]
        shaped = in_float64(out.reshape(written.shape))
        factor = float((in_float64(written) * shaped).sum() / shaped.square().sum().clamp(min=1e-30))
        return rest, written, given.reshape(*written.shape[:2], -1), factor

    def tokens(self) -> Iterator[tuple[bool, int, torch.Tensor, torch.Tensor]]:
        """For each batch: whether it is held back, its number, the tokens that count, and the weight [tokens, 1] of
        each: one over its length, or an attention sink would be all that is fitted."""
        for number, kept in enumerate(self.pair.kept):
            target = self.targets[number]
            keep = kept.to(target.device)
            yield number in self.pair.held, number, keep, 1 / target[keep].float().norm(dim=-1, keepdim=True)


Rewrite = Callable[[Site], tuple[dict[str, torch.Tensor], Fit | None]]
"""Site -> the new tensors of its layer by name, and how well they fit; none of both: the layer stays as it is."""


def rewritten(job: Job, holes: tuple[Hole, ...], name: str, rewrite: Rewrite, *, skip_first: int = 0) -> Transformed:
    """Rewrite the run before every hole, in order, each on the stream of the model as rewritten so far.

    Of several holes behind one run (layers, then the attention of the next) it stands in for all at once.
    """
    holes = tuple({hole.position: hole for hole in holes}.values())
    pair = Pair(job, skip_first=skip_first)
    prober = Prober(pair)
    steps: list[Step] = list(pair.steps)
    weights = dict(job.weights)
    fits: list[Fit] = []
    notes: list[str] = []
    for number, hole in enumerate(holes):
        before = hole.position - 1
        run = run_of(steps[before]) if before >= 0 else None
        if run is None or run.weights is not None:
            notes.append(f"no layer before {hole} that could stand in for it; nothing is put in its place")
            continue
        pair.prune_to(before)
        part: PartName = "attention" if run.part == "attention" else "mlp"
        layer = pair.inputs.stack.layer(run.layer)
        writers = prober.writers(run.layer, part)
        if not writers:
            why = f"what the {part} of layer {run.layer} writes cannot be rewritten exactly"
            notes.append(f"{why}; {hole} is only dropped")
            continue
        targets = pair.targets(hole)
        with weights_loaded(layer):
            own, fit = rewrite(Site(pair, run, part, hole, writers, targets))
            if fit is None:
                notes.append(
                    f"several matrices write what the {part} of layer {run.layer} adds; {hole} is only dropped"
                )
            else:
                fits.append(fit)
                weights_id = f"{name}-{run.layer}"
                steps[before] = replace(run, weights=weights_id)
                new = {f"{weights_id}.{key}": tensor for key, tensor in own.items()}
                weights |= new
                pair.pruned.advance(steps[before], new)
                pair.skip_step()
        job.tell(number + 1, len(holes), name)
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights, tuple(fits), tuple(notes))
