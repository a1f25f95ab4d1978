"""What every exit would have said about every token: recorded once, in one pass, so that thresholds are chosen offline.

Of each token a few numbers are kept (24 bytes for each exit), never its logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never, get_args

import numpy as np
import torch

from shoal.atomic import write_atomically
from shoal.data import Data
from shoal.deciding.decisions import Decision
from shoal.deciding.exit_units import has_probes
from shoal.deciding.exit_view import ExitView, confidence_of
from shoal.deciding.forward import ForwardView
from shoal.deciding.policy import Policy
from shoal.deciding.signals import WITHOUT_HEAD, Signal
from shoal.errors import DataError, UsageError
from shoal.evaluation.risk import Losses, sequence_means
from shoal.evaluation.scoring import CHUNK_ELEMENTS, Progress, logits_of, require_context
from shoal.executing.weights import Tensors, hash_of_used
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.plan import Exit, Map, Parallel, Plan, Run
from shoal.plan.price import layers_run
from shoal.plan.steps import layers_of, runs

SIGNALS = tuple(name for name in get_args(Signal) if name != "probe")
"""What every exit has; a probe has to be fitted first."""


@dataclass(frozen=True, eq=False)
class Features:
    """Recorded exits. Axes: exits [e], sequences [s], tokens [t]: the columns that count as generated, but the last."""

    layers: tuple[int, ...]
    """The base layer behind which each exit is."""
    depths: tuple[float, ...]
    """Layers that have run at each exit, and in the whole plan: [e + 1]."""
    signals: dict[str, np.ndarray]
    """float32 [e, s, t] by name."""
    choice: np.ndarray
    """int32 [e + 1, s, t]: the likeliest token at each exit, and of the whole plan."""
    nll: np.ndarray
    """float32 [e + 1, s, t]: cross-entropy of the text's next token in nats."""
    counted: np.ndarray
    """bool [s, t]: no padding."""
    prompt: int
    """Columns in front that count as prompt."""
    made: dict[str, Any]
    """What was recorded: model, plan, data."""

    def __post_init__(self) -> None:
        if not self.counted.any(1).all():
            raise DataError(
                f"a calibration sequence has no token behind its prompt of {self.prompt}; give longer sequences or a "
                "shorter --prompt",
                code="D471",
            )

    @property
    def wrong(self) -> np.ndarray:
        """bool [e + 1, s, t]: the exit's token is not the one that the whole plan would write."""
        found: np.ndarray = self.choice != self.choice[-1]
        return found

    @property
    def rise(self) -> np.ndarray:
        """float32 [e + 1, s, t]: how much larger the cross-entropy is than at the end."""
        found: np.ndarray = self.nll - self.nll[-1]
        return found

    def only(self, sequences: np.ndarray) -> Features:
        """The same for some of the sequences, in this order."""
        return Features(
            self.layers,
            self.depths,
            {name: values[:, sequences] for name, values in self.signals.items()},
            self.choice[:, sequences],
            self.nll[:, sequences],
            self.counted[sequences],
            self.prompt,
            self.made,
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all. Raises W229."""
        from safetensors.numpy import save

        arrays = {f"signal.{name}": values for name, values in self.signals.items()}
        arrays |= {"choice": self.choice, "nll": self.nll, "counted": self.counted}
        head = {"layers": self.layers, "depths": self.depths, "prompt": self.prompt, "made": self.made}
        content = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {"exits": json.dumps(head)})
        write_atomically(path, content)


def load_features(path: str | Path) -> Features:
    """Read what `save` wrote. Raises D472 for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            head = json.loads(file.metadata()["exits"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        signals = {name: arrays[f"signal.{name}"] for name in _names("signal.probe" in arrays)}
        layers, depths = tuple(head["layers"]), tuple(head["depths"])
        return Features(
            layers, depths, signals, arrays["choice"], arrays["nll"], arrays["counted"], head["prompt"], head["made"]
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} holds no recorded exits ({str(error)[:80]}); remove it, and they are recorded anew", code="D472"
        ) from None


class _Recorder(Policy):
    """Never leaves; keeps what every exit shows of the counted columns."""

    def __init__(self, plan: Plan, first: int) -> None:
        super().__init__(plan)
        self.first = first
        self.ids = torch.empty(0)
        self.read: Any = None
        self.rows: list[dict[str, torch.Tensor]] = []
        self.headless: list[str] = []

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        found = _looked(lambda part: self.read(step.head, view.hidden[:, part], part), self.ids, self.first)
        self.rows.append(found | {name: view.read(name)[:, self.first : -1].cpu() for name in self.headless})
        return False


def record_exits(
    model: Any,
    plan: Plan,
    data: Data,
    *,
    prompt: int,
    weights: Tensors | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Features:
    """One teacher-forced pass of `plan`, which has exits, over `data`, at which nobody leaves.

    Columns from `prompt` on count as generated. So the keys and values of earlier tokens are those of the whole plan,
    which is what the fill "defer" gives; with the other fills a token that left changes what later ones see. Raises
    U510 for windows beyond the context, D471 for windows without a token behind the prompt, P13x for plans whose exits
    cannot be decided on this model.
    """
    length = data.ids.shape[1]
    require_context(model, length)
    require_length(length, prompt)
    exits, depths = exit_places(plan)
    recorder = _Recorder(plan, prompt)
    shape = len(data), length - 1 - prompt
    names = _names(has_probes(plan, weights or {}))
    recorder.headless = [name for name in names if name in WITHOUT_HEAD]
    arrays = {name: np.zeros((len(exits), *shape), np.float32) for name in names}
    choice = np.zeros((len(exits) + 1, *shape), np.int32)
    nll = np.zeros((len(exits) + 1, *shape), np.float32)
    counted = np.ones(shape, bool)
    done = 0
    with running(model, plan, weights, policy=recorder) as handle, evaluating(model):
        assert handle.deciding is not None
        assert handle.deciding.executor is not None
        recorder.read = handle.deciding.executor.read
        for ids, mask in data.batches(batch):
            rows = slice(done, done + len(ids))
            recorder.rows, recorder.ids = [], ids
            logits = logits_of(model, ids, mask)
            for at, found in enumerate(recorder.rows):
                for name in names:
                    arrays[name][at, rows] = found[name].numpy()
                choice[at, rows], nll[at, rows] = found["choice"].numpy(), found["nll"].numpy()
            whole = _looked(partial(_columns, logits), ids, prompt)
            choice[-1, rows], nll[-1, rows] = whole["choice"].numpy(), whole["nll"].numpy()
            if mask is not None:
                counted[rows] = (mask[:, prompt:-1] * mask[:, prompt + 1 :]).bool().cpu().numpy()
            done += len(ids)
            if progress is not None:
                progress(done, len(data), "recording exits")
    made = {
        "plan": plan.hash, "weights": hash_of_used(plan, weights), "fingerprint": plan.base.fingerprint,
        "data": asdict(data.info),
    }  # fmt: skip
    return Features(exits, depths, arrays, choice, nll, counted, prompt, made)


def live_losses(
    model: Any,
    policy: Policy,
    plan: Plan,
    data: Data,
    features: Features,
    *,
    weights: Tensors | None = None,
    batch: int = 1,
    nats: bool = False,
    progress: Progress | None = None,
) -> tuple[Losses, float]:
    """The policy itself at work on the same text, teacher-forced, with the keys and values that its fill makes: the
    mean loss of each sequence (share of tokens other than the whole plan's; with `nats` the rise of the cross-entropy,
    not clipped), and the mean number of layers of the counted tokens. `features` are of the same sequences in order."""
    first, lost, deep, done = features.prompt, [], [], 0
    with running(model, plan, weights, policy=policy) as handle, evaluating(model):
        handle.prompt = first
        for ids, mask in data.batches(batch):
            rows = slice(done, done + len(ids))
            logits = logits_of(model, ids, mask)
            own = _looked(partial(_columns, logits), ids, first)
            if nats:
                lost.append(own["nll"].numpy() - features.nll[-1, rows])
            else:
                lost.append(own["choice"].numpy() != features.choice[-1, rows])
            deep.append(np.array(handle.trace.depths)[:, first:-1])
            done += len(ids)
            if progress is not None:
                progress(done, len(data), "running the policy")
    layers = sequence_means(np.concatenate(deep), features.counted)
    return sequence_means(np.concatenate(lost), features.counted), float(layers.mean())


def _names(probes: bool) -> tuple[str, ...]:
    return (*SIGNALS, "probe") if probes else SIGNALS


def require_length(length: int, prompt: int) -> None:
    """Raise D471 for sequences without a token behind the prompt, U607 for a prompt of none."""
    if prompt < 1:
        raise UsageError(f"--prompt {prompt} leaves no token to begin with; give 1 or more", code="U607")
    if length - prompt < 2:
        raise DataError(
            f"sequences of {length} tokens have nothing to calibrate on behind a prompt of {prompt}; give --length "
            f"{prompt + 2} or more, or a shorter --prompt",
            code="D471",
        )


def exit_places(plan: Plan) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The layer in front of each exit, and how many layers have run there and at the end."""
    layers: list[int] = []
    depths: list[float] = []
    last, depth = -1, 0.0
    for step in plan.steps():
        match step:
            case Exit():
                layers.append(last)
                depths.append(depth)
            case Run() | Map() | Parallel():
                depth += layers_run(runs((step,)))
                last = max(layers_of(step), default=last)
            case _:
                assert_never(step)
    return tuple(layers), (*depths, depth)


def _columns(logits: torch.Tensor, part: slice) -> torch.Tensor:
    return logits[:, part]


def _looked(logits: Callable[[slice], torch.Tensor], ids: torch.Tensor, first: int) -> dict[str, torch.Tensor]:
    """What the logits of the columns first..length-2 say, [batch, length - 1 - first] each, on the CPU: the confidence
    as policies read it, the likeliest token, and "nll", the cross-entropy of the next token in nats."""
    found: list[dict[str, torch.Tensor]] = []
    at, step, last = first, 1, ids.shape[1] - 1
    while at < last:
        part = slice(at, min(at + step, last))
        own = logits(part).float()
        wanted = ids[:, part.start + 1 : part.stop + 1].to(own.device)
        nll = torch.nn.functional.cross_entropy(own.flatten(0, 1), wanted.flatten(), reduction="none")
        found.append(confidence_of(own) | {"nll": nll.view(wanted.shape)})
        at = part.stop
        step = max(1, CHUNK_ELEMENTS // (len(ids) * own.shape[-1]))  # the first column tells how long one is
    return {name: torch.cat([one[name] for one in found], -1).cpu() for name in found[0]}
