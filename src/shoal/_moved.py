"""Modules that have another name now: the old one still imports, with a note, because user files may name it.

`MOVED` is the one place to enter a rename of a module or a package. A name may be renamed again: both notes name the
last one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOMS_OF_RUN = {
    "executing": "slots timing weights",
    "recording": "attention layer_major observe states walk",
    "deciding": "arguments deciding deferred entries flow gated gates kv_rules layer_lists masks partly place "
    "policies policy_file readout signals trace",
    "decoding": "fast fast_layers fast_legal fast_loop fast_matvec listening streaming",
}
MOVED = {
    **{f"run.{name}": f"{room}.{name}" for room, names in _ROOMS_OF_RUN.items() for name in names.split()},
    "run.speculate": "speculating",
    "run.conductor": "executing.executor",
    "run.live": "live",
    "run.prefix": "plan.prefix",
    "run.freeze": "recording.frozen",
    "models.probe": "models.examine",
    "writing.stage": "atomic",
    "api.cells": "api.comparison_file",
    "api.promise": "api.risk_control",
    "api.spread": "api.distribute",
    "evaluation.clock": "evaluation.time_model",
    "evaluation.spread_loss": "evaluation.distributed_loss",
    "api.find": "api.prune",
    "methods._task": "methods._job",
    "deciding.gates": "deciding.policy",
    "deciding.place": "deciding.gating",
    "deciding.deciding": "deciding.policy_text",
    "deciding.gated": "deciding.gated_executor",
    "deciding.flow": "deciding.forward",
    "deciding.entries": "deciding.kv_state",
    "deciding.kv_rules": "deciding.kv_fills",
    "deciding.deferred": "deciding.kv_deferred",
    "deciding.arguments": "deciding.layer_arguments",
    "deciding.layer_lists": "deciding.policy_options",
    "deciding.partly": "deciding.mlp_for_some",
    "speculating.bench": "speculating.layer_trial",
    "speculating.scene": "speculating.draft_context",
    "speculating.watch": "speculating.layer_outputs",
    "speculating.foresee": "speculating.forecast",
    "speculating.account": "speculating.stats",
    "speculating.stage": "speculating.draft_runner",
    "speculating.part": "speculating.layer_subset",
    "speculating.feed": "speculating.forward_inputs",
    "serve.exchange": "serve.running_request",
    "recording.walk": "recording.layer_inputs",
    "recording.states": "recording.state_store",
    "models.agree": "models.matching_tensors",
    "models.stages": "models.backbone_outputs",
    "deciding.readout": "deciding.exit_readout",
    "deciding.exit_readout": "executing.exit_readout",
    "deciding.exit_heads": "executing.exit_heads",
    "writing.twins": "writing.copy_check",
    "writing.sides": "writing.side_files",
    "writing.several": "writing.stack_depths",
    "writing.judge": "writing.checks",
    "writing.draft": "writing.manifest",
    "writing.place": "writing.output",
    "writing.gguf_out.source": "models.gguf_source",
    "writing.gguf_out.rules": "models.gguf_rules",
    "api.look": "api.inspection",
    "api.quizzes": "api.task_scores",
    "evaluation.tally": "evaluation.mean_scores",
    "evaluation.peak": "evaluation.peak_memory",
    "report.boxes": "report.svg_shapes",
    "report.canvas": "report.matplotlib_svg",
    "report.words": "report.formatting",
    "report.hero": "report.header",
    "report.picture": "report.plan_diagram",
    "models.diagnosis.hub": "models.hub",
    "models.diagnosis.papers": "models.diagnosis.metadata",
    "models.diagnosis.deduce": "models.diagnosis.match_layers",
    "models.diagnosis.mend": "models.diagnosis.repaired_config",
}
"""Old name to new name, both without `shoal.`; what lies below a package moves with it."""

RENAMED = {
    "Scene": "DraftContext",
    "Bench": "LayerTrial",
    "Walk": "LayerInputs",
    "Stream": "ResidualStream",
    "States": "StateStore",
    "Filling": "CacheContents",
    "Feed": "ForwardInputs",
    "Exchange": "RunningRequest",
    "fit_rows": "prepare_rows",
    "now": "synchronized_time",
}
"""Old name to new name of classes and functions that a user's file may import from a module that has moved."""


def current(name: str) -> str | None:
    """Where the module `name` (without `shoal.`) is now; None for one that has not moved."""
    found = None
    while (moved := next((old for old in MOVED if f"{name}.".startswith(f"{old}.")), None)) is not None:
        found = name = MOVED[moved] + name.removeprefix(moved)
    return found


class _Moved(MetaPathFinder, Loader):
    """Finds an old name where its module is now. It stands behind the other finders: a module that exists wins."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        room, _, below = name.partition(".")
        if room != "shoal":
            return None
        new = current(below)
        if new is None and not any(old.startswith(f"{below}.") for old in MOVED):
            return None
        return ModuleSpec(name, self, origin=new and f"shoal.{new}", is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        found = ModuleType(spec.name)
        found.__path__ = []  # its own, or a second copy of what lies below would be found on the real one
        if spec.origin is None:  # only a former package around modules that have moved
            return found
        real = import_module(spec.origin)
        warnings.warn(f"{spec.name} is now {spec.origin}; import it from there", DeprecationWarning, stacklevel=2)

        def attribute(name: str) -> Any:
            return getattr(real, name if hasattr(real, name) else RENAMED.get(name, name))

        found.__dict__["__getattr__"] = attribute
        return found

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""


def install() -> None:
    """Let old names import, once in a process."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
