"""The survey of models that read pictures and text; writes the third part of its page.

`python -m tests.survey.pictures` surveys every type of `AutoModelForImageTextToText`; with names of types it prints
their rows. `--rows FILE` keeps the rows in a file, so that the types can be surveyed in parts: the section is written
once the file holds every type.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from shoal.errors import ShoalError
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.kinds import auto_for
from shoal.plan import require
from shoal.writing.surgery import blueprint, require_writable, rewrite

from .picture_models import Inputs, answers, picture_prompt, text_prompt, tiny_pictures
from .survey import KINDS, LIMIT, SEEN, Row, _apart, _plain, _plan, _said


@dataclass
class PictureRow(Row):
    """What was found for one type."""

    picture: str = ""
    """`yes` where every verdict is of a prompt with a picture too; else why there is none."""


def types() -> list[str]:
    """Every model type of which transformers has a model that writes text about pictures."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def survey_pictures(model_type: str) -> PictureRow:
    """The row of one type, written in one process and read in another."""
    with tempfile.TemporaryDirectory(prefix="shoal-survey-") as place:
        row, error = _apart(_write_all, model_type, place)
        if error is not None:
            return PictureRow(model_type, missing=error)
        made = PictureRow(**row)
        if made.missing is None:
            found, error = _apart(_read_all, place, made.verdicts)
            made.verdicts = found or {k: v if v != "written" else f"wrong: {error}" for k, v in made.verdicts.items()}
        return made


def _write_all(model_type: str, place: str) -> dict[str, Any]:
    row = PictureRow(model_type)
    try:
        model = tiny_pictures(model_type)
        prompts = {"text": text_prompt(model)}
        whole = {"text": answers(model, prompts["text"])}
        if lost := _lost(model):
            row.missing = f"transformers does not find {lost} of the tensors that it saves of one"
    except Exception as error:
        row.missing = _said(error)
    if row.missing is not None:
        return asdict(row)
    try:
        prompts["picture"] = picture_prompt(model)
        whole["picture"] = answers(model, prompts["picture"])
        row.picture = "yes"
    except Exception as error:
        row.picture = f"the survey makes none that it takes ({_said(error)[:90]})"
        prompts.pop("picture", None)
    notes = []
    for name, found in whole.items():
        if "cached" not in found:
            notes.append(f"{name} in one pass only: the stock model's own cached passes differ or fail")
    row.note = "; ".join(notes)
    for name, prompt in prompts.items():
        save_file({key: value.contiguous() for key, value in prompt.items()}, Path(place) / f"{name}.st")
    for kind in KINDS:
        row.verdicts[kind] = _written(model, kind, (prompts, whole), Path(place) / kind, row.reasons)
    return asdict(row)


def _lost(model: PreTrainedModel) -> int:
    """How many tensors of the whole model transformers itself does not find in the folder that it saved it to."""
    with tempfile.TemporaryDirectory(prefix="shoal-survey-") as place:
        model.save_pretrained(place)
        auto = getattr(transformers, auto_for(AutoConfig.from_pretrained(place)))
        return len(auto.from_pretrained(place, dtype=torch.float32, output_loading_info=True)[1]["missing_keys"])


def _written(
    model: PreTrainedModel,
    kind: str,
    base: tuple[dict[str, Inputs], dict[str, dict[str, torch.Tensor]]],
    place: Path,
    reasons: dict[str, str],
) -> str:
    """`written`, a code, or `wrong: why`. `base`: the prompts, and what the whole model answers to them."""
    prompts, whole = base
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
            found = {name: answers(model, prompt, whole[name].keys()) for name, prompt in prompts.items()}
        wrong = next((w for name in prompts if (w := _unlike(found[name], whole[name], name))), None)
        if wrong is not None:
            return wrong
        place.mkdir()
        rewrite(model, plan).save_pretrained(place)
    except Exception as error:
        return f"wrong: {_said(error)}"
    flat = {f"{name}.{key}": t.contiguous() for name, one in found.items() for key, t in one.items()}
    save_file(flat, place / "expected.st")
    return "written"


def _unlike(found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], name: str) -> str | None:
    """What is wrong with a live plan's answers: that they are the whole model's, or depend on the cache."""
    if (found["uncached"] - whole["uncached"]).abs().max().item() < SEEN:
        return f"wrong: the plan changes nothing after a {name}"
    if "cached" in found:
        apart = (found["cached"] - found["uncached"]).abs().max().item()
        if not apart <= LIMIT:
            return f"wrong: live cached passes over a {name} differ by {apart:.1e}"
    return None


def _read_all(place: str, verdicts: dict[str, str]) -> dict[str, str]:
    """The verdicts with every `written` judged by plain transformers."""
    return {kind: _read(Path(place) / kind) if verdict == "written" else verdict for kind, verdict in verdicts.items()}


def _read(place: Path) -> str:
    try:
        auto = getattr(transformers, auto_for(AutoConfig.from_pretrained(place)))
        model, info = auto.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
        expected = load_file(place / "expected.st")
        found: dict[str, torch.Tensor] = {}
        for name in sorted({key.partition(".")[0] for key in expected}):
            wanted = [key.partition(".")[2] for key in expected if key.startswith(f"{name}.")]
            answered = answers(model.eval(), load_file(place.parent / f"{name}.st"), wanted)
            found |= {f"{name}.{key}": value for key, value in answered.items()}
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


def main(words: list[str]) -> int:
    """Survey the named types and print them; write the section when `--rows` holds all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rows", type=Path)
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, Any]] = {}
    if asked.rows is not None and asked.rows.exists():
        rows = json.loads(asked.rows.read_text(encoding="utf-8"))
    names = asked.names or types()
    for name in names:
        started = time.perf_counter()
        row = survey_pictures(name)
        rows[name] = asdict(row) | {"seconds": time.perf_counter() - started}
        said = ", ".join(f"{k} {v}" for k, v in row.verdicts.items())
        sys.stderr.write(f"{name}: {row.missing or said} | picture: {row.picture} {row.note}\n")
        for code, why in row.reasons.items():
            sys.stderr.write(f"    {code}: {why}\n")
        if asked.rows is not None:
            asked.rows.write_text(json.dumps(rows), encoding="utf-8")
    if (asked.rows is not None or not asked.names) and set(rows) >= set(types()):
        from .page import write_pictures

        seconds = sum(row.pop("seconds") for row in rows.values())
        write_pictures([PictureRow(**row) for _, row in sorted(rows.items())], seconds)
    return any(v.startswith("wrong") for name in names for v in rows[name]["verdicts"].values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
