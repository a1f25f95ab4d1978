"""The proof of a written folder: a fresh process with plain transformers must compute what the plan computes live."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from shoal._version import __version__
from shoal.errors import ModelError, WriteError
from shoal.models.checkpoint import read_json
from shoal.models.load import Loaded, default_device, load, load_config, meta_model
from shoal.plan import Plan, load_plan
from shoal.write import proof_child
from shoal.write.reference import Reference, counted_reference, live_reference, quiet

FORMAT = "shoal-proof/1"
FILE = Path("shoal") / "proof.json"


@dataclass(frozen=True, slots=True)
class Check:
    """One question of a proof, its answer and the limit that the answer had to keep."""

    name: str
    passed: bool
    value: float | str
    limit: float | str
    how: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value} where {self.limit} is needed ({self.how})"


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
    return prove_many([(Path(folder), live_reference(model, plan, tokenizer=tokenizer, **options))])[0]


def verify(folder: str | Path, base: Loaded | None = None, *, device: str | None = None, **options: Any) -> Proof:
    """Repeat the proof of a written folder. The base is `base`, or what the folder's plan names; when it cannot be had,
    a weaker proof is made, and `against` says so: the counts of the folder's own config, the tensors as they were when
    it was written, and logits that do not depend on the cache.

    Raises `NotationError` when the folder holds no plan, `PlanError` P101 when `base` is another model, `ModelError` for a
    folder that is no checkpoint, `WriteError` W231.
    """
    folder = Path(folder)
    plan = load_plan(folder)
    config = load_config(folder)
    why = "the plan names no source for its base"
    if base is None and plan.base.source is not None:
        try:
            base = load(plan.base.source, device=device, dtype=str(config.dtype or "auto").removeprefix("torch."))
        except ModelError as error:
            why = f"the base is not to be had ({error})"
        else:
            fingerprint = _fingerprint(base.model)
            if fingerprint != plan.base.fingerprint:
                base, why = None, f"{plan.base.source} is another model now ({fingerprint[:15]})"
    if base is not None:
        return prove(folder, base.model, plan, tokenizer=base.tokenizer, **options)
    known = read_json(folder / FILE).get("environment", {}) if (folder / FILE).is_file() else {}
    digest = known.get("weights") if isinstance(known, dict) else None
    with quiet():
        reference = counted_reference(meta_model(config), device=device or default_device(), digest=digest)
    return prove_many([(folder, reference)], against=f"its own config, because {why}")[0]


def prove_many(jobs: Sequence[tuple[Path, Reference]], *, against: str = "the live plan") -> list[Proof]:
    """The proofs of several folders from one fresh process, which is what costs the time. Raises W231."""
    with tempfile.TemporaryDirectory(prefix="shoal-proof-") as scratch:
        answers = _ask(jobs, Path(scratch))
    proofs = []
    for (_, reference), answer in zip(jobs, answers, strict=True):
        checks = tuple(_checks(reference, answer))
        proofs.append(Proof(all(c.passed for c in checks), checks, _environment(reference, answer), against))
    return proofs


def limit_for(dtype: str, largest: float) -> float:
    """By how much logits may differ: 1e-4, or 4 steps of the dtype at the largest logit where that is more.

    The reloaded model runs the same kernels on the same numbers, so the difference is 0 nearly always. What remains is
    the order of a sum, when a kernel is chosen by the address of a tensor: an error of a few units in the last place.
    float32 has 24 bits, so 1e-4 holds up to logits of 200; with bfloat16 (8 bits) a logit of 20 is itself known to
    0.08 only, and 4 such steps are allowed. Faults smaller than that are found by the check of the weights, bit by bit.
    """
    return max(1e-4, 4 * torch.finfo(getattr(torch, dtype)).eps * largest)


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
            }
        )
    request, answers = scratch / "request.json", scratch / "answers.json"
    facts = {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}
    request.write_text(json.dumps({"jobs": requests, "answers": str(answers), **facts}), encoding="utf-8")
    done = subprocess.run(
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
    return json.loads(answers.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _clean_environment() -> dict[str, str]:
    """The parent's environment without Python's search path: the folder must load where Shoal is not. Only where the
    libraries themselves are found by that path (as on clusters with modules) do their folders stay on it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    libraries = {str(Path(str(m.__file__)).parents[1]) for m in (torch, transformers, safetensors)}
    installed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    if libraries - installed and "PYTHONPATH" in os.environ:
        kept["PYTHONPATH"] = os.pathsep.join(sorted(libraries))
    return kept | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _checks(reference: Reference, answer: dict[str, Any]) -> Iterator[Check]:
    if "error" in answer:
        yield Check("loads", False, str(answer["error"])[:500], "no error", "AutoModelForCausalLM in a fresh process")
        return
    expected = reference.expected
    keys = [f"{kind.removesuffix('_keys')} {key}" for kind, found in answer["keys"].items() for key in found]
    loads = "missing, unexpected and mismatched tensors of AutoModelForCausalLM in a fresh process"
    yield Check("loads", not keys, len(keys), 0, f"{loads}: {', '.join(keys[:3])}" if keys else loads)
    yield from _weights(reference, answer["weights"])
    yield from _logits(reference, answer)
    if reference.prompts:
        yield _greedy(reference, answer["greedy"])
    for name, value, wanted, how in (
        ("parameters", answer["parameters"], expected.parameters, "by unique storage, against the plan's cost"),
        ("depth", answer["depth"], expected.depth, "num_hidden_layers, against the layers of the plan"),
    ):
        yield Check(name, value == wanted, value, wanted, how)
    if answer["kv"] is not None:
        yield from _kv(reference, answer["kv"])


def _weights(reference: Reference, found: dict[str, int]) -> Iterator[Check]:
    expected = reference.expected
    how = "tensors whose sum of bits is not that of the base's layer"
    if expected.weights is not None:
        wrong = sorted(n for n in expected.weights.keys() | found.keys() if expected.weights.get(n) != found.get(n))
        yield Check("weights", not wrong, len(wrong), 0, f"{how}: {', '.join(wrong[:3])}" if wrong else how)
    elif expected.digest is not None:
        same = _digest(found) == expected.digest
        yield Check("weights", same, "same" if same else "changed", "same", "tensors as they were when it was written")


def _logits(reference: Reference, answer: dict[str, Any]) -> Iterator[Check]:
    """Live and reloaded logits by kind; without a live side, cached against uncached ones of the folder itself."""
    limit = limit_for(reference.dtype, reference.largest or answer.get("largest", 0.0))
    groups: dict[str, dict[str, float]] = {}
    for name, value in answer["logits"].items():
        tokens, _, kind = name.partition(".")
        groups.setdefault("logits padded" if tokens == "padded" else f"logits {kind}", {})[name] = value
    if not groups:
        groups = {"logits cached": {f"{n}, cached against uncached": v for n, v in answer["cached_uncached"].items()}}
    for name, values in sorted(groups.items(), reverse=True):
        if values:
            worst = max(values, key=lambda n: (values[n] != values[n], values[n]))
            how = f"largest absolute difference, {reference.dtype}, worst of {len(values)}: {worst}"
            yield Check(name, values[worst] <= limit, values[worst], limit, how)


def _greedy(reference: Reference, found: list[list[int]]) -> Check:
    """Tokens may part where the live model is undecided: two logits that each move by the limit can change places when
    they are less than twice the limit apart. From there on the texts differ rightly, so the rest is not compared."""
    near = 2 * limit_for(reference.dtype, reference.largest)
    parted, wrong = 0, 0
    for (tokens, gaps), other in zip(reference.greedy, found, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), None)
        if place is None:
            wrong += len(tokens) != len(other)
        else:
            parted += gaps[place] <= near
            wrong += gaps[place] > near
    how = f"prompts of {len(found)} whose {reference.tokens} greedy tokens differ from the live plan's"
    ties = f"; {parted} part at a near tie (two best scores within {near:.1e})" if parted else ""
    return Check("greedy tokens", wrong == 0, wrong, 0, how + ties)


def _kv(reference: Reference, kv: dict[str, Any]) -> Iterator[Check]:
    expected = reference.expected
    length = reference.tensors["random.ids"].shape[1]
    for name, value, wanted, how in (
        (
            "KV per token",
            kv["per_token"],
            expected.kv_per_token,
            "bytes, measured in its cache, against the plan's cost",
        ),
        ("KV held", kv["elements"], expected.kv_elements, f"elements in its cache after {length} tokens"),
    ):
        yield Check(name, value == wanted, value, wanted, how)
    if expected.rows is not None:
        same = kv["rows"] == expected.rows
        how = "window and elements of every row of its cache, in order, against the live cache's"
        yield Check("KV rows", same, "same" if same else f"{kv['rows']}"[:200], "same", how)


def _environment(reference: Reference, answer: dict[str, Any]) -> dict[str, Any]:
    facts = {"device": reference.device, "dtype": reference.dtype, **reference.options}
    if "weights" in answer:
        facts |= {"class": answer["class"], "weights": _digest(answer["weights"])}
    return facts | {
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shoal": __version__,
        "machine": platform.machine(),
    }


def _digest(sums: dict[str, int]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _fingerprint(model: nn.Module) -> str:
    from shoal.models.inspect import inspect

    return inspect(model).fingerprint
