"""Experiment trackers: what a run finds goes, while it runs, to TensorBoard, Weights & Biases, MLflow and others,
through accelerate's classes for them.

`TRACKERS` is the one table of their names. A tracker that fails is left out from then on, with a note; the run goes on.

U767 no such tracker        U768 its package is not installed        U769 it cannot be started
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from shoal.errors import UsageError, first_line, note

PROJECT = "shoal"
"""What runs are filed under."""
Values = Mapping[str, float | str | None]
"""By name; what is not finite and what is None is left out."""


@dataclass(frozen=True, slots=True)
class Known:
    """A tracker that accelerate has a class for."""

    package: str
    """What pip calls it."""
    modules: tuple[str, ...] = ()
    """Any one of which must be there; as the package where none is named."""
    run: str | None = None
    """Its class's option that names a run."""
    folder: str | None = None
    """Where it writes, of one that writes to a folder; {run} is the run's name."""
    texts: Literal["logged", "noted", "none"] = "logged"
    """Whether it takes texts as it takes numbers, as settings, each under a name of its own, or not at all."""


TRACKERS: Mapping[str, Known] = {
    "aim": Known("aim", folder=".", texts="none"),
    "clearml": Known("clearml", texts="none"),
    "comet_ml": Known("comet-ml", ("comet_ml",)),
    "dvclive": Known("dvclive", texts="noted"),
    "mlflow": Known("mlflow", run="run_name", texts="noted"),
    "swanlab": Known("swanlab", run="experiment_name", texts="none"),
    "tensorboard": Known("tensorboard", ("tensorboard", "tensorboardX"), folder="runs/{run}"),
    "trackio": Known("trackio", run="name"),
    "wandb": Known("wandb", run="name"),
}


def require_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The names as accelerate writes them, each once; nothing is imported. Raises U767 for one that is not known, U768
    for one whose package, or accelerate, is not installed."""
    found = tuple(dict.fromkeys(name.strip().replace("-", "_") for name in names))
    for name in found:
        if name not in TRACKERS:
            raise UsageError(f"no tracker is called {name!r:.40}; there are {', '.join(TRACKERS)}", code="U767")
        known = TRACKERS[name]
        if not any(find_spec(module) for module in known.modules or (known.package,)):
            raise UsageError(
                f"--track {name} needs the package {known.package}; run: pip install {known.package}", code="U768"
            )
    if found and find_spec("accelerate") is None:
        raise UsageError("--track needs the package accelerate; run: pip install accelerate", code="U768")
    return found


class Tracked:
    """The trackers of one run."""

    def __init__(self, trackers: Mapping[str, Any] | None = None) -> None:
        self._trackers = dict(trackers or {})
        self._from, self._named, self._step = 0, -1, -1

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def log(self, values: Values, step: int | None = None) -> None:
        """Hand on numbers and texts of a step, the next one where none is named. Some trackers leave out what goes
        back: steps that begin anew, as those of another stage, are counted on from the last."""
        if not self:
            return
        if step is not None and step < self._named:
            self._from = self._step
        self._named = self._named if step is None else step
        self._step = at = self._step + 1 if step is None else self._from + step
        clean = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in values.items() if _is_said(value)}
        texts = {name: value for name, value in clean.items() if isinstance(value, str)}
        numbers = {name: value for name, value in clean.items() if not isinstance(value, str)}
        for name in list(self._trackers):
            self._try(name, lambda one, kind: _hand_on(one, kind, numbers, texts, at))

    def finish(self) -> None:
        """The run is over."""
        for name in list(self._trackers):
            self._try(name, lambda one, _: one.finish())

    def _try(self, name: str, do: Callable[[Any, str], None]) -> None:
        try:
            do(self._trackers[name], TRACKERS[name].texts)
        except Exception as error:  # a full disk, a server that is gone: the run is worth more than its curves
            del self._trackers[name]
            note(f"the tracker {name} failed ({first_line(error)}); the run goes on without it")


@contextmanager
def tracking(names: Sequence[str], verb: str, facts: Values) -> Iterator[Tracked]:
    """The trackers of these names, started, with `facts` as the run's settings; they are finished behind the block,
    whatever happens in it. The run is called by its verb and the time.

    Raises what `require_trackers` raises, and U769 for one that cannot be started.
    """
    asked = require_trackers(names)
    if not asked:
        yield Tracked()
        return
    from accelerate import PartialState

    PartialState()  # what its trackers write goes through a log that wants to know the process
    run = f"{verb}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    tracked = Tracked({name: _started(name, run, facts) for name in asked})
    try:
        yield tracked
    finally:
        tracked.finish()


def _started(name: str, run: str, facts: Values) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = TRACKERS[name]
    options: dict[str, Any] = {} if known.run is None else {known.run: run}
    if known.folder is not None:
        own = os.environ.get("TENSORBOARD_LOGGING_DIR") if name == "tensorboard" else None
        options["logging_dir"] = known.folder.format(run=run) if own is None else str(Path(own).expanduser() / run)
    try:
        made = LOGGER_TYPE_TO_CLASS[name](PROJECT, **options)
        made.start()
        made.store_init_configuration({key: value for key, value in facts.items() if value is not None})
    except Exception as error:  # each library has classes of its own: no account, no server, no place to write
        raise UsageError(
            f"the tracker {name} cannot be started ({first_line(error)}); set it up as its documentation says, or "
            "leave it out of --track",
            code="U769",
        ) from None
    return made


def _hand_on(tracker: Any, kind: str, numbers: Values, texts: Values, step: int) -> None:
    said = {**numbers, **texts} if kind == "logged" else dict(numbers)
    if said:
        tracker.log(said, step=step)
    if texts and kind == "noted":
        tracker.store_init_configuration({f"{name} {step}": text for name, text in texts.items()})


def _is_said(value: float | str | None) -> bool:
    return isinstance(value, str) or (value is not None and math.isfinite(value))
