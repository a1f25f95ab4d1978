"""A table in the place of removed mlps: what they made of inputs like this one."""

from __future__ import annotations

import torch

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.executing.fitted_map import nearest_entry, scaled
from shoal.fitting.clusters import k_means, means
from shoal.fitting.holes import Hole, Pair, filled, find_holes
from shoal.fitting.maps import limit_tensor
from shoal.fitting.result import Fit, Job, Transformed

EXAMPLES = TransformExamples(
    role="fitted",
    quick={"entries": 16},
    refused=(((2,), {"skip_first": 24}, "U554"), ((2,), {"entries": 0}, "U555")),
)


def memo(job: Job, *, entries: int = 256, skip_first: int = 1, outlier: float = 8.0) -> Transformed:
    """Put a table where layers, attentions or mlps were removed: y = x + values[argmin_j |x' - keys_j|].

    x [hidden] is the state of the model as pruned so far, x' = x / rms(x), what a norm in front of an mlp leaves of it;
    keys [entries, hidden] are the centres of `entries` clusters (k-means) of the x' of the calibration tokens, values
    [entries, hidden] the mean over a cluster's tokens of what the dense model's state behind the removed part has more
    than x. So no table fits the calibration tokens worse than dropping, and with an entry for each different input it
    is exact on them. Costs the product with the keys, entries x hidden multiplications a token, and one row of the
    values. `skip_first` tokens of each sequence and tokens longer than `outlier` medians are not fitted; the latter are
    handed on as they are (the tensor `limit`). A quarter of the sequences is held back, to say what the table is worth
    on other text.

    It is meant for mlps (plans as 0-13,14a,15-29): what an attention makes of a token is no function of its state
    alone. Runs live only.

    Source: after ConvMemo (de Moura et al. 2019, Skipping CNN Convolutions Through Efficient Memoization, doi
    10.1007/978-3-030-27562-4_5): tables from the inputs of convolutions to their outputs.

    How we differ: mlps of Transformers in place of convolutions; inputs are clustered, where the paper groups output
    values to make tables small, and indexed by the nearest centre, for which the paper has a mapping of its own. It was
    read as its abstract alone.

    Raises U555 for no entries.
    """
    if entries < 1:
        raise UsageError(f"a table of {entries} entries is not possible; give 1 or more", code="U555")
    holes = find_holes(job.plan, "memo", job.stack)
    pair = Pair(job, skip_first=skip_first, outlier=outlier)
    return filled(pair, holes, lambda hole: _fit_table(pair, hole, entries), "tables")


def _fit_table(pair: Pair, hole: Hole, entries: int) -> tuple[dict[str, torch.Tensor], Fit]:
    """The tensors keys, values and limit for `hole`, at which the pruned stream stands, and how well they fit."""
    limit = pair.limit()
    kept, targets = pair.counted(limit), pair.targets(hole)
    rows: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {True: [], False: []}
    for number, (state, keep) in enumerate(zip(pair.pruned.states, kept, strict=True)):
        own = state[keep].float()
        rows[number in pair.held].append((own, targets[number].to(state.device)[keep].float() - own))
    states, changes = (torch.cat(each) for each in zip(*rows[False], strict=True))
    if not len(states):
        raise UsageError("no token is left to fit a table on; give more or longer calibration sequences", code="U554")
    inputs = scaled(states)
    label = k_means(inputs, entries, pair.job.seed + hole.first)
    keys = means(inputs, label, int(label.max()) + 1)
    # a token counts where it is looked up; two keys that are alike leave one of them without any
    used, label = nearest_entry(states, keys).unique(return_inverse=True)
    keys, values = keys[used], means(changes, label.cpu(), len(used))
    held = [torch.cat(each) for each in zip(*rows[True], strict=True)]
    fit = Fit(
        str(hole),
        float(changes.square().mean()),
        _error(states, changes, keys, values),
        float(held[1].square().mean()) if held and len(held[1]) else None,
        _error(held[0], held[1], keys, values) if held and len(held[1]) else None,
        f"{len(keys)} entries for {len(states)} tokens",
    )
    tensors = {f"{hole.weights}.keys": keys, f"{hole.weights}.values": values}
    return tensors | limit_tensor(hole, limit), fit


def _error(states: torch.Tensor, changes: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    """The mean squared error of the table, per element."""
    return float((changes - values[nearest_entry(states, keys)]).square().mean())
