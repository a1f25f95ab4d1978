"""LLM-Streamline: a small trained net takes over what each removed span did."""

from __future__ import annotations

import torch

from shoal.examples import TransformExamples
from shoal.fitting.holes import Pair, find_holes
from shoal.fitting.nets import Kind, fit_site, layer_sites, map_sites, with_sites
from shoal.fitting.result import Fit, Job, Transformed
from shoal.fitting.train import Learned, frozen, language_loss, train
from shoal.models.kinds import require_causal
from shoal.plan import Plan

Tensors = dict[str, torch.Tensor]
_RATES: dict[Kind, float] = {"layer": 3e-4, "ffn": 1e-3, "swiglu": 1e-3}

EXAMPLES = TransformExamples(role="trained", quick={"epochs": 1, "loss_epochs": 0})


def streamline(
    job: Job,
    *,
    kind: Kind = "layer",
    epochs: int = 8,
    loss_epochs: int = 1,
    inner: int | None = None,
    rate: float | None = None,
) -> Transformed:
    """Train a net that takes over what each removed span did: first on the dense states, then on the language loss.

    layer: the layer that runs before the span (at the very beginning: behind it) gets weights of its own, which start
    as they are; a stock checkpoint holds it. ffn: y = x + U silu(G x) + b; swiglu: y = x + U (silu(G x) * D x) + b,
    with G, D [inner, hidden] and U [hidden, inner], which starts at zero. These are maps in the hole and run live only;
    `inner` None costs what a linear map costs: hidden / 2 for ffn, hidden / 3 for swiglu.
    `epochs` over the sequences with Adam on mean |f(x) - y|^2 / |y|^2, x the state of the model as pruned and mended so
    far, y the dense one behind the span; maps leave first tokens and outliers out, as `linear-map` does. Then
    `loss_epochs` on the cross-entropy of the next token, for all nets of the plan at once and nothing else.
    A quarter of the sequences is held back and says after which epoch a net is best. The start counts as one, so that
    the fit is never worse than dropping, and training nothing is dropping, bit for bit. `rate`: 3e-4 for a layer and
    1e-3 for a net unless given, a third of it for the language loss. Raises U557 where no whole layer stands beside a
    span, M322 for a model without next-token scores unless `loss_epochs` is 0.

    Source: Chen et al. 2024 (LLM-Streamline, arXiv 2403.19135).

    How we differ: the layer before what was removed is trained (with window=released of the method `llm-streamline` it
    is the first of the window, as in the released code); errors are relative to each token's length, as attention sinks
    would drown the others.
    """
    if loss_epochs:
        require_causal(job.model, "the language loss of streamline")
    holes = find_holes(job.plan, "streamline", job.stack)
    whole = kind == "layer"
    sites = layer_sites(job.plan, holes, "streamline", job.stack) if whole else map_sites(holes)
    pair = Pair(job) if whole else Pair(job, skip_first=1, outlier=8.0)
    rate = _RATES[kind] if rate is None else rate
    nets: list[Learned] = []
    beside: list[Tensors] = []
    fits: list[Fit] = []
    with frozen(job.model):
        for number, site in enumerate(sites):
            pair.prune_to(site.place)
            net, fixed, fit = fit_site(pair, site, kind, inner=inner, epochs=epochs, rate=rate)
            nets, beside, fits = [*nets, net], [*beside, fixed], [*fits, fit]
            job.tell(number + 1, len(sites), "trained stand-ins")
        notes = _on_language(job, pair, with_sites(job.plan, sites, job.stack), nets, beside, loss_epochs, rate / 3)
    moved = [number for number, net in enumerate(nets) if net.moved()]
    weights = dict(job.weights)
    for number in moved:
        weights |= beside[number] | nets[number].finished()
    return Transformed(with_sites(job.plan, [sites[n] for n in moved], job.stack), weights, tuple(fits), notes)


def _on_language(
    job: Job, pair: Pair, plan: Plan, nets: list[Learned], beside: list[Tensors], epochs: int, rate: float
) -> tuple[str, ...]:
    """Train all nets together on the loss of the whole model; what that did, in words."""
    if not epochs:
        return ()

    def tensors() -> Tensors:
        return dict(job.weights) | {n: t for one in (*beside, *(net.tensors() for net in nets)) for n, t in one.items()}

    loss = language_loss(job.model, job.data, job.batch, plan, tensors)
    fitted = [number for number in range(len(pair.kept)) if number not in pair.held]
    done = train(
        [leaf for net in nets for leaf in net.leaves.values()],
        loss,
        fitted,
        sorted(pair.held),
        epochs=epochs,
        rate=rate,
        seed=job.seed,
        on_epoch=lambda epoch: job.tell(epoch, epochs, "language loss"),
    )
    said = f"{epochs} epochs of language loss after the errors above: {done.before:.4f} to {done.after:.4f}"
    if done.held_before is not None:
        said += f", on held-out sequences {done.held_before:.4f} to {done.held_after:.4f}"
    return (said,)
