"""The proof of a written folder: a fresh process with plain transformers must compute what the plan computes live."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from shoal.errors import ModelError, WriteError
from shoal.evaluation import Progress
from shoal.executing.weights import Tensors, load_weights
from shoal.models.checkpoint import read_json
from shoal.models.load import Loaded, check_source, load, usable_device
from shoal.models.opened import open_model
from shoal.models.stacks import find_stacks
from shoal.plan import Plan, load_plan, require, shapes_of
from shoal.record import environment
from shoal.writing import proof_child
from shoal.writing.blueprint import Blueprint
from shoal.writing.checks import Check, conclusions, digest
from shoal.writing.left_out import carried_tensors
from shoal.writing.reference import Reference, counted_reference, live_reference, quiet
from shoal.writing.reference_kinds import counted_kind, kind_reference, proves_as_causal
from shoal.writing.references_check import references_check
from shoal.writing.surgery import blueprint

FORMAT = "shoal-proof/1"
FILE = Path("shoal") / "proof.json"


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found when a folder was loaded in a fresh process."""

    passed: bool
    checks: tuple[Check, ...]
    environment: dict[str, Any] = field(default_factory=dict)
    against: str = "the live plan"
    """What the folder was compared with."""

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """The content of proof.json."""
        return {"format": FORMAT, **asdict(self)}


def prove(folder: str | Path, model: nn.Module, plan: Plan, *, tokenizer: Any = None, **options: Any) -> Proof:
    """Prove that `folder` computes what `model` computes while `plan` runs on it. Options as in `live_reference`.

    `model` is the base model; the parent needs no second copy of its weights, the fresh process holds the folder's.
    Raises `WriteError` W231 when the fresh process cannot be run.
    """
    live = live_reference if proves_as_causal(model) else kind_reference
    return prove_many([(Path(folder), live(model, plan, tokenizer=tokenizer, **options))])[0]


def verify(
    folder: str | Path,
    base: Loaded | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Proof:
    """Repeat the proof of a written folder. The base is `base`, or what the folder's plan names; when it cannot be had,
    a weaker proof is made, and `against` says so: the counts of the folder's own config, the tensors as they were when
    it was written, and logits that do not depend on the cache. `dtype`: of the base (default: of the folder's config).
    `trust_remote_code`: run code that comes with the folder or its base.

    Raises `NotationError` when the folder holds no plan, `PlanError` P101 when `base` is another model, `ModelError`
    for a folder that is no checkpoint, `UsageError` U550 or U551 for missing or changed weights of the plan,
    `WriteError` W231.
    """
    if progress is not None:
        progress(0, 1, "verify")
    how = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    proof = _verified(Path(folder), base, how, options)
    if progress is not None:
        progress(1, 1, "verify")
    return proof


def _verified(folder: Path, base: Loaded | None, how: dict[str, Any], options: dict[str, Any]) -> Proof:
    plan, weights = load_plan(folder), load_weights(folder)
    device, trust = usable_device(how["device"]), how["trust_remote_code"]
    with quiet():  # a folder that is broken says so here, not from inside a fresh process
        checked = check_source(folder, trust_remote_code=trust)
        config, empty = checked.config, checked.structure
        _ = open_model(empty).spec
    why = "the plan names no source for its base"
    if base is None and plan.base.source is not None:
        try:
            with quiet():
                dtype = how["dtype"] or str(config.dtype or "auto").removeprefix("torch.")
                base = load(plan.base.source, device=device, dtype=dtype, trust_remote_code=trust)
        except (ModelError, WriteError) as error:
            why = f"the base is not to be had ({error})"
        else:
            fingerprint = open_model(base.model).spec.fingerprint
            if fingerprint != plan.base.fingerprint:
                base, why = None, f"{plan.base.source} is another model now ({fingerprint[:15]})"
    if base is not None:
        require(plan, open_model(base.model).spec, shapes_of(weights))
        plans = _blueprint_of(empty, base.model, plan, weights)
        return prove(folder, base.model, plan, tokenizer=base.tokenizer, weights=weights, plans=plans, **options)
    known = read_json(folder / FILE).get("environment", {}) if (folder / FILE).is_file() else {}
    sums = known.get("weights") if isinstance(known, dict) else None
    with quiet():
        counted = counted_reference if proves_as_causal(empty) else counted_kind
        reference = counted(empty, device=device, digest=sums)
    return prove_many([(folder, reference)], against=f"its own config, because {why}")[0]


def _blueprint_of(empty: PreTrainedModel, base: PreTrainedModel, plan: Plan, weights: Tensors) -> Blueprint:
    """How the folder of the model `empty` was made: earlier versions wrote an attention and the mlp behind it as two
    layers, of each of which a part is zeroed."""
    plans = blueprint(base, plan, zero_parts=True, weights=weights)
    if all(len(plans.of(stack.name).slots) == stack.depth for stack in find_stacks(empty)):
        return plans
    return blueprint(base, plan, zero_parts=True, weights=weights, joined=False)


def prove_many(jobs: Sequence[tuple[Path, Reference]], *, against: str = "the live plan") -> list[Proof]:
    """The proofs of several folders from one fresh process, which is what costs the time. Raises W231."""
    with tempfile.TemporaryDirectory(prefix="shoal-proof-") as scratch:
        answers = _ask(jobs, Path(scratch))
    proofs = []
    for (folder, reference), answer in zip(jobs, answers, strict=True):
        expected = replace(reference, carried=carried_tensors(folder))
        checks = (*conclusions(expected, answer), references_check(folder))
        proofs.append(Proof(all(c.passed for c in checks), checks, _environment(reference, answer), against))
    return proofs


def _ask(jobs: Sequence[tuple[Path, Reference]], scratch: Path) -> list[dict[str, Any]]:
    requests = []
    for number, (folder, reference) in enumerate(jobs):
        file = scratch / f"{number}.safetensors"
        save_file(reference.tensors, file)
        requests.append(
            {
                "folder": str(folder.resolve()),
                "reference": str(file),
                "device": reference.device,
                "dtype": reference.dtype,
                "options": reference.options,
                "prompts": reference.prompts,
                "tokens": reference.tokens,
                "auto": reference.auto,
            }
            | ({} if reference.depths is None else {"depths": reference.depths})
            | ({} if reference.adapter is None else {"adapter": reference.adapter})
            | ({"shoal": str(Path(proof_child.__file__).parents[2])} if reference.needs_shoal else {})
        )
    request, answers = scratch / "request.json", scratch / "answers.json"
    facts = {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}
    request.write_text(json.dumps({"jobs": requests, "answers": str(answers), **facts}), encoding="utf-8")
    done = subprocess.run(  # noqa: S603 - this very Python runs a file of this package
        [sys.executable, "-P", proof_child.__file__, str(request)],
        env=_clean_environment(),
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode or not answers.is_file():
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        ended = f"with signal {-done.returncode}" if done.returncode < 0 else f"with exit code {done.returncode}"
        raise WriteError(f"the process that proves the folder ended {ended}: {lines[-1][:300]}", code="W231")
    found: list[dict[str, Any]] = json.loads(answers.read_text(encoding="utf-8"))
    return found


def _clean_environment() -> dict[str, str]:
    """The parent's environment without Python's search path: the folder must load where Shoal is not. Only where the
    libraries themselves are found by that path (as on clusters with modules) do their folders stay on it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    libraries = {str(Path(str(m.__file__)).parents[1]) for m in (torch, transformers, safetensors)}
    installed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    if libraries - installed and "PYTHONPATH" in os.environ:
        kept["PYTHONPATH"] = os.pathsep.join(sorted(libraries))
    return kept | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _environment(reference: Reference, answer: dict[str, Any]) -> dict[str, Any]:
    facts = {"device": reference.device, "dtype": reference.dtype, **reference.options}
    if "weights" in answer:
        facts |= {"class": answer["class"], "weights": digest(answer["weights"])}
    return facts | {
        "threads": torch.get_num_threads(),
        **environment(),
    }
