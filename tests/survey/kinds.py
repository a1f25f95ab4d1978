"""The survey of encoders, encoder-decoders and vision models; writes the second part of its page.

`python -m tests.survey.kinds` surveys all of `TYPES` and writes its section of `docs/supported-models.md`; with names
of types it prints their rows and writes nothing. Each plan is laid on each stack of a model alone, and on all at once.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.utils import logging

from shoal.errors import ShoalError
from shoal.live import running
from shoal.models.inputs import sample_inputs
from shoal.models.inspect import inspect
from shoal.plan import Plan, parse_plan, require
from shoal.writing.proof_child import decoded, outputs
from shoal.writing.surgery import blueprint, require_writable, rewrite

from .overrides_kinds import KIND_OVERRIDES, TYPES
from .survey import LIMIT, PLANS, SEEN, _apart, _plain, _said
from .tiny import merged, shrunk


@dataclass
class KindRow:
    """What was found for one type and one of its stacks, or `all` of them at once."""

    model_type: str
    auto: str
    stack: str = ""
    missing: str | None = None
    verdicts: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def tiny_kind(model_type: str) -> PreTrainedModel:
    """The tiny model of a type under its Auto class, with random weights large enough that every layer matters."""
    kind = CONFIG_MAPPING[model_type]
    fields = merged(shrunk(kind), {"is_decoder": ..., "encoder_layers": 6, "num_encoder_layers": 6})
    own = {**kind().to_dict(), **dict.fromkeys(kind().attribute_map)}
    fields = {name: value for name, value in fields.items() if name in own or isinstance(value, dict)}
    config = kind(**merged(fields, {"decoder_start_token_id": 0} | KIND_OVERRIDES.get(model_type, {})))
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, TYPES[model_type]).from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # a table that the class makes, and no checkpoint holds
                continue
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            elif "norm" in name.lower() and name.endswith("bias"):
                parameter.normal_(0, 0.05)
    model.tie_weights()
    return model


def survey_kind(model_type: str) -> list[KindRow]:
    """The rows of one type, written in one process and read in another."""
    with tempfile.TemporaryDirectory(prefix="shoal-survey-") as place:
        rows, error = _apart(_write, model_type, place)
        if error is not None:
            return [KindRow(model_type, TYPES[model_type], missing=error)]
        made = [KindRow(**row) for row in rows]
        for row in made:
            found, error = _apart(_read, place, row.stack, row.verdicts)
            row.verdicts = found or {k: v if v != "written" else f"wrong: {error}" for k, v in row.verdicts.items()}
        return made


def _write(model_type: str, place: str) -> list[dict[str, Any]]:
    auto = TYPES[model_type]
    try:
        model = tiny_kind(model_type)
        inputs = sample_inputs(model, "cpu", batch=2, length=9)
        base = _returned(model, inputs)
    except ShoalError as error:
        return [_refused(model_type, error)]
    except Exception as error:
        return [asdict(KindRow(model_type, auto, missing=_said(error)))]
    save_file({name: value.contiguous() for name, value in inputs.items()}, Path(place) / "inputs.st")
    try:
        stacks = [stack.name for stack in inspect(model).stacks]
    except ShoalError as error:
        return [_refused(model_type, error)]
    rows = []
    for target in [*stacks, "all"] if len(stacks) > 1 else stacks:
        row = KindRow(model_type, auto, target)
        for kind, steps in PLANS.items():
            text = "; ".join(f"{stack}: {steps}" for stack in stacks if target in (stack, "all"))
            out = Path(place) / f"{target}-{kind}"
            row.verdicts[kind] = _written(model, text, (inputs, base), out, row.reasons)
        rows.append(asdict(row))
    return rows


def _refused(model_type: str, error: ShoalError) -> dict[str, Any]:
    """The row of a type that is refused as a whole."""
    verdicts = dict.fromkeys(PLANS, error.code)
    return asdict(KindRow(model_type, TYPES[model_type], "all", None, verdicts, {error.code: _plain(error)}))


def _written(model: PreTrainedModel, text: str, base: tuple[Any, Any], place: Path, reasons: dict[str, str]) -> str:
    """`written`, a code, or `wrong: why`. Nothing behind the blueprint may refuse."""
    inputs, whole = base
    try:
        spec = inspect(model)
        plan = require(parse_plan(text, Plan.identity(spec)), spec)
        blueprint(require_writable(model), plan)
    except ShoalError as error:
        reasons.setdefault(error.code, _plain(error))
        return error.code
    except Exception as error:
        return f"wrong: {_said(error)}"
    try:
        with running(model, plan):
            found = _returned(model, inputs)
        if max((found[name] - whole[name]).abs().max().item() for name in whole) < SEEN:
            return "wrong: the plan changes nothing"
        if any(not torch.equal(value, whole[name]) for name, value in _returned(model, inputs).items()):
            return "wrong: the model is not as it was"
        place.mkdir()
        rewrite(model, plan).save_pretrained(place)
    except Exception as error:
        return f"wrong: {_said(error)}"
    save_file({name: value.contiguous() for name, value in found.items()}, place / "expected.st")
    return "written"


@torch.no_grad()
def _returned(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All floating tensors of one pass, and what a decoder makes of a cache."""
    found = {name: value.clone() for name, value in outputs(model, inputs).items()}
    return found | ({"cached": decoded(model, inputs)[0]} if "decoder_input_ids" in inputs else {})


def _read(place: str, stack: str, verdicts: dict[str, str]) -> dict[str, str]:
    """The verdicts with every `written` judged by plain transformers."""
    return {
        kind: _judged(Path(place) / f"{stack}-{kind}") if verdict == "written" else verdict
        for kind, verdict in verdicts.items()
    }


def _judged(place: Path) -> str:
    try:
        name = (AutoConfig.from_pretrained(place).architectures or [""])[0]
        model, info = getattr(transformers, name).from_pretrained(place, dtype=torch.float32, output_loading_info=True)
        found = _returned(model.eval(), load_file(place.parent / "inputs.st"))
    except Exception as error:
        return f"wrong: {_said(error)}"
    bad = next(
        (f"{len(names)} {kind.replace('_', ' ')}" for kind, names in info.items() if kind.endswith("_keys") and names),
        None,
    )
    if bad is not None:
        return f"wrong: {bad}"
    expected = load_file(place / "expected.st")
    worst = {name: (found[name] - expected[name]).abs().max().item() for name in expected}
    return next((f"wrong: {name} differs by {e:.1e}" for name, e in worst.items() if not e <= LIMIT), "right")


def main(names: list[str]) -> int:
    """Survey `names` and print them, or all types and write their section."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    started, rows = time.perf_counter(), []
    for name in names or sorted(TYPES):
        for row in survey_kind(name):
            rows.append(row)
            said = row.missing or ", ".join(f"{kind} {verdict}" for kind, verdict in row.verdicts.items())
            sys.stderr.write(f"{name} {row.stack}: {said}\n")
            for code, why in row.reasons.items():
                sys.stderr.write(f"    {code}: {why}\n")
    if not names:
        from .page import write_kinds

        write_kinds(rows, time.perf_counter() - started)
    return any(verdict.startswith("wrong") for row in rows for verdict in row.verdicts.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
