"""The folder beside an output in which an unfinished run keeps what it needs to go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.atomic import write_atomically
from shoal.errors import UsageError
from shoal.executing.weights import load_weights, save_planned
from shoal.healing.processes import Processes
from shoal.plan import Plan, load_plan
from shoal.record import plain

FACTS = "run.json"


class RunFolder:
    """`facts` say which run it is; each finished stage has a folder with its plan, its tensors and what it did. Of
    several processes the first one alone writes."""

    def __init__(self, place: Path | None, processes: Processes | None = None) -> None:
        """`place` None keeps nothing."""
        self.place, self.processes = place, processes or Processes()
        self.facts: dict[str, Any] = {}

    @staticmethod
    def beside(output: Path) -> Path:
        """Where the run of an output keeps its checkpoints."""
        return output.with_name(f"{output.name}.healing")

    def begin(self, facts: dict[str, Any], *, resume: bool) -> bool:
        """Make the folder, or go on with the one that is there; whether there was one.

        Raises U642 for an unfinished run when `resume` is not set, U643 for one of another run.
        """
        facts = json.loads(json.dumps(plain(facts)))
        place = self.place
        if place is None:
            self.facts = facts
            return False
        self.facts, there = self.processes.told(lambda: self._begun(place, facts, resume=resume))
        return there

    def _begun(self, place: Path, facts: dict[str, Any], *, resume: bool) -> tuple[dict[str, Any], bool]:
        file = place / FACTS
        there = _read(file)
        if there is None:
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"cannot keep checkpoints in {place}: {error.strerror}; choose another output", code="U678"
                ) from None
            write_atomically(file, json.dumps(facts, indent=1) + "\n")
            return facts, False
        if not resume:
            raise UsageError(
                f"{place} holds the checkpoints of an unfinished run; go on with it (--resume), or remove that folder",
                code="U642",
            )
        for name in sorted(facts.keys() | (there.keys() - {"found"})):
            if facts.get(name) != there.get(name):
                raise UsageError(
                    f"{place} holds the checkpoints of another run: its {name} is {_short(there.get(name))} and "
                    f"not {_short(facts.get(name))}; give the options of that run, or remove that folder",
                    code="U643",
                )
        return there, True

    def stage(self, number: int) -> Path | None:
        """Where the checkpoints of a stage are."""
        return None if self.place is None else self.place / f"stage-{number}"

    def remember(self, name: str, value: Any) -> None:
        """Keep something that was found out in the course of the run."""
        self.facts = {**self.facts, "found": {**self.facts.get("found", {}), name: plain(value)}}
        if self.place is not None and self.processes.first:
            write_atomically(self.place / FACTS, json.dumps(self.facts, indent=1) + "\n")

    def found(self, name: str) -> Any:
        """What was kept under that name; None for nothing."""
        return self.facts.get("found", {}).get(name)

    def finish_stage(self, number: int, plan: Plan, weights: dict[str, Any], said: dict[str, Any]) -> None:
        """Keep the result of a stage, of which no checkpoint is needed any more."""
        if self.place is None:
            return
        self.processes.wait()  # each has written its part of the last checkpoint
        if not self.processes.first:
            return
        folder = self.place / f"stage-{number}-done"
        save_planned(plan, folder, weights)
        write_atomically(folder / "stage.json", json.dumps(plain(said)) + "\n")  # last: now the stage is done
        shutil.rmtree(self.place / f"stage-{number}", ignore_errors=True)

    def finished_stage(self, number: int) -> tuple[Plan, dict[str, Any], dict[str, Any]] | None:
        """Plan, tensors and record of a stage that is done."""
        folder = None if self.place is None else self.place / f"stage-{number}-done"
        said = None if folder is None else _read(folder / "stage.json")
        if folder is None or said is None:
            return None
        return load_plan(folder / "shoal" / "plan.json"), load_weights(folder), said

    @contextmanager
    def tidied(self) -> Iterator[None]:
        """What fails inside before there is anything to go on from leaves no folder."""
        try:
            yield
        except BaseException:
            reached = () if self.place is None else (*self.place.glob("*/checkpoint-*"), *self.place.glob("*-done"))
            if not reached and self.processes.first:
                self.remove()
            raise

    def remove(self) -> None:
        """The run is over."""
        if self.place is not None:
            shutil.rmtree(self.place, ignore_errors=True)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _short(value: Any) -> str:
    return json.dumps(value)[:80]
