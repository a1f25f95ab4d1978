"""The survey: what Shoal does with every causal model type of the installed transformers; writes its page.

`python -m tests.survey.survey` surveys all types and writes `docs/supported-models.md`; with names of types it prints
their rows and writes nothing. Every type gets a process of its own, and its written folders are read by another one
that runs transformers alone, so no type can stop or colour the survey of the others.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from shoal.errors import ShoalError
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, parse_plan, require
from shoal.writing.surgery import blueprint, require_writable, rewrite

from .overrides import DEPTH, UNBUILT, VOCAB
from .tiny import tiny

KINDS = ("drop one", "drop first", "drop a third", "repeat", "swap", "swap alike")
PLANS = {
    "drop one": "0-2,4-5",
    "drop first": "1-5",
    "drop a third": "0,2-3,5",
    "repeat": "0-1,2x2,3-5",
    "swap": "0-1,3,2,4-5",
}
LIMIT, SEEN = 1e-4, 1e-3
"""Logits may differ by so much where they should agree, and must by so much where a plan should show."""
SECONDS = 60
LENGTH = 12
CHUNKS = ((7, 2, 1, 1, 1), (7, 1, 1, 1, 1, 1))
"""Tokens of each cached pass; the second where the stock model takes no chunk after the first."""


@dataclass
class Row:
    """What was found for one type. `verdicts`: by kind of plan, `right`, a code, or `wrong: why`."""

    model_type: str
    missing: str | None = None
    """Why there is no tiny model of it to survey."""
    note: str = ""
    verdicts: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """The sentence of every code met."""

    @property
    def wrong(self) -> bool:
        """Whether anything was accepted and then not right."""
        return any(verdict.startswith("wrong") for verdict in self.verdicts.values())


def types() -> list[str]:
    """Every causal model type of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def survey(model_type: str) -> Row:
    """The row of one type, each half in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="shoal-survey-") as place:
        row, error = _apart(_write_all, model_type, place)
        if error is not None:
            return Row(model_type, missing=error)
        made = Row(**row)
        if made.missing is None:
            verdicts, error = _apart(_read_all, place, made.verdicts)
            made.verdicts = verdicts or {
                k: v if v != "written" else f"wrong: {error}" for k, v in made.verdicts.items()
            }
        return made


def survey_here(model_type: str, place: str | Path) -> Row:
    """The same in this process, for tests that plant a fault in it."""
    row = Row(**_write_all(model_type, str(place)))
    row.verdicts = _read_all(str(place), row.verdicts)
    return row


def _apart(work: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """(result, None) of `work(*args)` in a forked process, or (None, why there is none)."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send((work(*args), None))
        except BaseException as error:
            theirs.send((None, _said(error)))

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return None, f"took more than {SECONDS} s"
        return ours.recv()
    except EOFError:
        process.join()
        return None, f"its process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _write_all(model_type: str, place: str) -> dict[str, Any]:
    """Build, run live and write every kind of plan below `place`; a Row as a dict."""
    row = Row(model_type)
    try:
        model = tiny(model_type)
        whole = uncached(model)
    except Exception as error:
        row.missing = f"{UNBUILT[model_type]} ({_said(error)})" if model_type in UNBUILT else _said(error)
        return asdict(row)
    chunks = _baseline(model, whole)
    if chunks is None:
        row.note = "uncached only: the stock model's own cached passes differ or fail"
    for kind in KINDS:
        row.verdicts[kind] = _written(model, kind, (whole, chunks), Path(place) / kind, row.reasons)
    return asdict(row)


def _written(
    model: PreTrainedModel, kind: str, base: tuple[torch.Tensor, Any], place: Path, reasons: dict[str, str]
) -> str:
    """`written`, a code, or `wrong: why`. Nothing behind the blueprint may refuse. `base`: the stock model's logits and
    the chunks of its cached passes."""
    whole, chunks = base
    try:
        plan = _plan(model, kind)
        if plan is None:
            return "n/a"
        require(plan, inspect(model))
        blueprint(require_writable(model), plan)
    except ShoalError as error:
        reasons.setdefault(error.code, _plain(error))
        return error.code
    except Exception as error:
        return f"wrong: {_said(error)}"
    try:
        with running(model, plan):
            found = {"uncached": uncached(model)}
            if chunks is not None:
                found["cached"] = cached(model, chunks)
        if (found["uncached"] - whole).abs().max().item() < SEEN:
            return "wrong: the plan changes nothing"
        place.mkdir()
        rewrite(model, plan).save_pretrained(place)
    except Exception as error:
        return f"wrong: {_said(error)}"
    options = {"attn_implementation": model.config._attn_implementation}
    (place / "survey.json").write_text(json.dumps({"chunks": chunks, "options": options}))
    save_file({name: t.contiguous() for name, t in found.items()}, place / "expected.st")
    return "written"


def _plan(model: PreTrainedModel, kind: str) -> Plan | None:
    """The plan of one kind; None when no two layers apart from the first are of one kind."""
    spec = inspect(model)
    if kind != "swap alike":
        return parse_plan(PLANS[kind], Plan.identity(spec))
    layers = spec.stack().layers
    facts = [(layer.kind, layer.params, layer.shared and True) for layer in layers]
    pair = next(((i, j) for i in range(1, DEPTH) for j in range(i + 1, DEPTH) if facts[i] == facts[j]), None)
    if pair is None:
        return None
    order = list(range(DEPTH))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    return parse_plan(",".join(map(str, order)), Plan.identity(spec))


def _read_all(place: str, verdicts: dict[str, str]) -> dict[str, str]:
    """The verdicts with every `written` judged by plain transformers."""
    return {kind: _read(Path(place) / kind) if verdict == "written" else verdict for kind, verdict in verdicts.items()}


def _read(place: Path) -> str:
    facts = json.loads((place / "survey.json").read_text())
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, **facts["options"]
        )
        expected = load_file(place / "expected.st")
        found = {"uncached": uncached(model.eval())}
        if facts["chunks"] is not None:
            found["cached"] = cached(model, facts["chunks"])
    except Exception as error:
        return f"wrong: {_said(error)}"
    bad = next(
        (f"{len(names)} {kind.replace('_', ' ')}" for kind, names in info.items() if kind.endswith("_keys") and names),
        None,
    )
    if bad is not None:
        return f"wrong: {bad}"
    worst = {name: (found[name] - expected[name]).abs().max().item() for name in expected}
    return next((f"wrong: {name} differs by {e:.1e}" for name, e in worst.items() if not e <= LIMIT), "right")


def _baseline(model: PreTrainedModel, whole: torch.Tensor) -> Any:
    """The chunks in which the stock model's cached passes equal its uncached one; None when there are none."""
    for chunks in CHUNKS:
        try:
            if (cached(model, chunks) - whole).abs().max().item() <= LIMIT:
                return chunks
        except Exception:  # noqa: S112 - what the stock model cannot do is not asked of a plan
            continue
    return None


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def uncached(model: PreTrainedModel) -> torch.Tensor:
    """Logits [1, t, vocab] of one pass."""
    ids = _ids()
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()


@torch.no_grad()
def cached(model: PreTrainedModel, chunks: tuple[int, ...]) -> torch.Tensor:
    """The same logits from several passes through one cache. Raises `ValueError` when there is no cache."""
    ids, past, done, logits = _ids(), {}, 0, []
    for size in chunks:
        mask = torch.ones_like(ids[:, : done + size])
        out = model(input_ids=ids[:, done : done + size], attention_mask=mask, use_cache=True, **past)
        past = {n: out[n] for n in ("past_key_values", "cache_params", "state", "mems") if out.get(n) is not None}
        if not past:
            raise ValueError("the model returns no cache")
        logits.append(out.logits.float())
        done += size
    return torch.cat(logits, dim=1)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _plain(error: ShoalError) -> str:
    return str(error).partition(": ")[2]


def main(names: list[str]) -> int:
    """Survey `names` and print them, or all types and write the page."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    started, rows = time.perf_counter(), []
    for name in names or types():
        rows.append(row := survey(name))
        sys.stderr.write(
            f"{name}: {row.missing or ', '.join(f'{k} {v}' for k, v in row.verdicts.items())} {row.note}\n"
        )
        for code, why in row.reasons.items():
            sys.stderr.write(f"    {code}: {why}\n")
    seconds = time.perf_counter() - started
    if not names:
        from .page import PAGE, kept_kinds, page

        PAGE.write_text(page(rows, seconds) + kept_kinds(), encoding="utf-8")
    sys.stderr.write(f"{len(rows)} types in {seconds:.0f} s\n")
    return any(row.wrong for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
