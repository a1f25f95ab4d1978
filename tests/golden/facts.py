"""What a set of kept files says, read with the code of the day; `make.py` stored it once, the tests compare.

Everything is computed in float64 on the CPU, so that it is the same on every processor to a dozen digits. All paths are
relative: these functions run inside a copy of the set.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import shoal
from shoal.api.measuring import measure
from shoal.api.stand_ins import parse_then
from shoal.api.study import Cell, Protocol
from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.executing.weights import hash_of_used, load_weights
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.load import Loaded, load
from shoal.plan import (
    Plan,
    Shape,
    check,
    cost,
    format_steps,
    load_plan,
    parse_plan,
    parse_steps,
    plan_from_json,
    plan_to_json,
    strip,
    weights_hash,
)
from shoal.registry import entries, get
from shoal.speculating.parse import parse_draft
from tests.contract.families import tiny
from tests.contract.kinds import kind
from tests.golden.spelled import COSTED, FAMILIES, KINDS, POLICIES, REFUSED, SETTINGS, SPECS, TYPED, servable

LENGTH, PROMPT = 9, 5
SHAPE = Shape(batch=2, prompt=20, context=30)
SMALL: dict[str, Any] = {"data": "text.txt", "length": 24, "limit": 4}
"""The text on which figures are taken."""
FEW = SMALL | {"limit": 2}
SEARCHES: dict[str, dict[str, Any]] = {
    "journal": {"method": "sleb", **SMALL},
    "race": {"method": "sleb", **SMALL, "limit": 60},
}
"""By journal, what `prune` was asked for; with 60 sequences candidates race."""
CALIBRATED: dict[str, Any] = {
    "policy": "exit:first=0,fill=defer", "targets": ("agreement=0.6", "loss=0.5"), "data": "text.txt", "length": 24,
    "prompt": 8, "limit": 40, "features": "exits.safetensors",
}  # fmt: skip
COMPARED: dict[str, Any] = {
    "methods": ("shortgpt", "position:which=first", "sleb"),
    "budgets": ("layers=0.8,0.6",),
    "protocol": Protocol(
        data="text.txt", tests=("text.txt",), length=24, limit=2, window=24, windows=2, new_tokens=0, pairs=0,
        compared=1,
    ),
}  # fmt: skip
BUDGETED: dict[str, dict[str, Any]] = {
    "nas-prune": {"budget": "layers=0.6", "settings": {"trials": 8, "population": 4}},
    "puzzle": {"budget": "layers=0.6"},
}
"""Methods that count no layers."""


def opened() -> Loaded:
    """The kept model in float64."""
    loaded = load("model", device="cpu")
    loaded.model.double()
    return loaded


def batch() -> dict[str, torch.Tensor]:
    """Two sequences without padding, [2, LENGTH]."""
    ids = torch.tensor([[(7 * column + 31 * row) % 256 + 3 for column in range(LENGTH)] for row in range(2)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: Any) -> list[Any]:
    """Every 97th logit of one pass, [2, LENGTH, 3] as lists."""
    found: list[Any] = model(**batch(), use_cache=False).logits[..., ::97].tolist()
    return found


def written(model: Any) -> list[list[int]]:
    """The tokens that greedy decoding adds to both sequences."""
    ids = model.generate(
        **batch(), max_new_tokens=5, min_new_tokens=5, do_sample=False, temperature=None, top_p=None, top_k=None
    )
    found: list[list[int]] = ids[:, LENGTH:].tolist()
    return found


def of_plans() -> dict[str, Any]:
    """For each kept plan: what it is, what it costs, and what it computes."""
    loaded = opened()
    spec = inspect(loaded.model)
    return {place.name: _of_plan(loaded, spec, place) for place in sorted(Path("plans").iterdir())}


def _of_plan(loaded: Loaded, spec: Any, place: Path) -> dict[str, Any]:
    plan, weights = load_plan(place), load_weights(place)
    text = (place / "shoal" / "plan.json").read_text(encoding="utf-8")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    policies = place / "policy.txt"
    policy = policies.read_text(encoding="utf-8").strip() if policies.exists() else None
    with running(loaded.model, plan, weights, policy=policy):
        computed = {"logits": logits(loaded.model), "written": written(loaded.model)}
    return {
        "text": str(plan),
        "hash": plan.hash,
        "weights": hash_of_used(plan, weights),
        "same file": plan_to_json(plan, weights=weights_hash(place)) == text,
        "strip": strip(plan),
        "problems": [problem.code for problem in check(plan, spec, shapes)],
        "cost": cost(plan, spec, SHAPE, shapes).to_dict(),
        "shown": shoal.show(plan, spec, weights),
        **computed,
    }


def of_policies() -> dict[str, Any]:
    """For each policy as typed: its plan, how deep each token goes and what comes out, or why it is refused."""
    loaded = opened()
    return {text: _of_policy(loaded, text) for text in [*POLICIES, *REFUSED, "policy.json"]}


def _of_policy(loaded: Loaded, text: str) -> dict[str, Any]:
    try:
        with running(loaded.model, "0-4", policy=text) as handle:
            handle.prompt = PROMPT
            found = {"plan": str(handle.plan), "hash": handle.plan.hash, "logits": logits(loaded.model)}
            return found | {"depths": handle.trace.depths, "counts": handle.trace.counts.to_dict()}
    except ShoalError as error:
        return {"refused": error.code}


def of_spellings() -> dict[str, Any]:
    """For each text with options: the registered name and the keyword arguments with which its function is called."""
    spec = inspect(tiny("llama"))
    plan = Plan.identity(spec)
    readers: dict[str, Callable[[str], Any]] = {
        "policies": lambda text: make_policy(text, plan, spec),
        "drafts": lambda text: parse_draft(text, spec),
        "transforms": lambda text: [one.entry.load()(**one.options) for one in parse_then([text])],
        "methods": lambda text: get("methods", Cell(text, "layers=0.5", 0).name).load()(
            **Cell(text, "layers=0.5", 0).settings()
        ),
    }
    found: dict[str, Any] = {f"{name} {text}": _called(name, readers[name], text) for name, texts in TYPED.items()
                             for text in texts}  # fmt: skip
    for name, own, pairs in SETTINGS:
        found[f"{name} {own} {' '.join(pairs)}"] = _plain(get(name, own).parse(list(pairs)))  # type: ignore[arg-type]
    return found


def _called(name: str, read: Callable[[str], Any], text: str) -> list[Any]:
    calls: list[Any] = []
    with _listening(name, calls):
        try:
            read(text)
        except ShoalError as error:
            return [error.code]
        except _HeardError:
            pass
    return calls


class _HeardError(Exception):
    """The function was called: nothing more is to be known."""


@contextmanager
def _listening(name: str, calls: list[Any]) -> Iterator[None]:
    """Every function of one kind notes its name and keyword arguments instead of doing its work."""
    held = []
    for entry in entries(name).values():  # type: ignore[arg-type]
        module = import_module(entry.module)
        function = getattr(module, entry.attribute)
        held.append((module, entry.attribute, function))
        setattr(module, entry.attribute, _noting(entry.name, function, calls))
    try:
        yield
    finally:
        for module, attribute, function in held:
            setattr(module, attribute, function)


def _noting(name: str, function: Any, calls: list[Any]) -> Any:
    @functools.wraps(function)
    def noting(*_: Any, **given: Any) -> Any:
        calls.append([name, _plain({key: value for key, value in given.items() if key != "spec"})])
        raise _HeardError

    return noting


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def of_hashes() -> dict[str, Any]:
    """For each notation as typed, on hand-written specs and on real families: canonical text, hash, file, cost."""
    found: dict[str, Any] = {}
    for name, texts in COSTED.items():
        spec = SPECS[name]()
        for text in texts:
            plan = parse_plan(text, Plan.identity(spec, source="me/base"))
            kept = plan_to_json(plan)
            assert plan_from_json(kept) == plan
            found[f"{name} {text}"] = {
                "text": str(plan),
                "hash": plan.hash,
                "file": kept,
                "strips": [strip(plan, stack.name) for stack in spec.stacks],
                "problems": sorted({problem.code for problem in check(plan, spec)}),
                "cost": None if check(plan, spec) else cost(plan, spec, SHAPE).to_dict(),
                "steps": [format_steps(parse_steps(format_steps(steps))) for _, steps in plan.stacks],
            }
    for family in FAMILIES:
        spec = inspect(tiny(family, "eager"))
        found[family] = {"fingerprint": spec.fingerprint, "cost": cost(Plan.identity(spec), spec, SHAPE).to_dict()}
    for one in KINDS:
        spec = inspect(kind(one))
        found[one] = {"fingerprint": spec.fingerprint, "hash": Plan.identity(spec).hash}
    return found


def of_exchange() -> dict[str, Any]:
    """For each kept file of another tool: the plan in it, and what the format makes of that plan."""
    spec = servable()
    base = Plan.identity(spec, source="me/base")
    found: dict[str, Any] = {}
    for file in sorted(Path("exchange").iterdir()):
        form = get("exchange", file.stem).load()()
        plan = form.read(file.read_bytes(), base)
        try:
            again = form.write(plan, spec)
        except ShoalError as error:
            again = error.code
        found[file.name] = {"plan": str(plan), "hash": plan.hash, "written": again}
    return found


def of_figures() -> dict[str, Any]:
    """Every measure's values, and the plan and scores of every method that needs no more than text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "U655")  # all are given the same text, also those that read none
        return _figures()


def _figures() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in entries("measures"):
        loaded = opened()
        try:
            found[f"measure {name}"] = [_number(value) for value in measure(loaded, name, **FEW).values]
        except ShoalError as error:
            found[f"measure {name}"] = error.code
    for name in entries("methods"):
        asked: dict[str, Any] = BUDGETED.get(name, {"drop": 2})
        try:
            pruned = shoal.prune(opened(), method=name, writable=False, **asked, **FEW)
        except ShoalError as error:
            found[f"method {name}"] = error.code
            continue
        scored = [[one.notation, _number(one.score)] for one in pruned.found.trace]
        found[f"method {name}"] = {"plan": str(pruned.plan), "hash": pruned.plan.hash, "trace": scored}
    return found


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)  # noqa: PLR0124 - nan


def of_folders() -> dict[str, Any]:
    """For each written folder: where its layers come from, what it is, and what plain transformers computes with it."""
    found: dict[str, Any] = {}
    for name in ("written", "twice"):
        config = json.loads(Path(name, "config.json").read_bytes())
        stock = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval()
        spec = shoal.inspect(name)
        found[name] = {
            "note": config["shoal"],
            "plan": str(load_plan(name)),
            "hash": load_plan(name).hash,
            "fingerprint": spec.fingerprint,
            "params": spec.params,
            "logits": logits(stock),
            "written": written(stock),
            "shown": shoal.show(load_plan(name), inspect(opened().model)) if name == "written" else None,
            "records": [sorted(json.loads(line)) for line in _lines(Path(name, "shoal", "records.jsonl"))],
            "proof": [[one["name"], one["passed"]] for one in _proof(name)["checks"]],
        }
    return found


def _proof(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(name, "shoal", "proof.json").read_bytes())
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def of_doctor() -> dict[str, Any]:
    """What the doctor says of the written folder, whole and with a config that is wrong in three ways."""
    from shoal.api.doctor import doctor

    found: dict[str, Any] = {"sound": _said(doctor("written").to_dict())}
    config = json.loads(Path("written/config.json").read_bytes())
    changes = {"too deep": {"num_hidden_layers": 7}, "too wide": {"intermediate_size": 99}, "shallow": {
        "num_hidden_layers": 2}}  # fmt: skip
    for name, change in changes.items():
        Path("written/config.json").write_text(json.dumps(config | change), encoding="utf-8")
        try:
            found[name] = _said(doctor("written").to_dict())
        except ShoalError as error:
            found[name] = error.code
    Path("written/config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return found


def _said(found: dict[str, Any]) -> dict[str, Any]:
    """Without what is known of other programs' versions, which moves on."""
    return _plain(found | {"engines": {one["engine"]: one["loads"] for one in found["engines"]}})


FACTS: dict[str, Callable[[], dict[str, Any]]] = {
    "plans": of_plans,
    "policies": of_policies,
    "spellings": of_spellings,
    "hashes": of_hashes,
    "exchange": of_exchange,
    "figures": of_figures,
    "folders": of_folders,
    "doctor": of_doctor,
}
"""By the name of the file in which a set keeps the answer."""
