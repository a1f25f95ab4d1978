"""The front matter of a model card: what the Hub sorts and shows a model by. Only what is known stands there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from shoal.models.kinds import CAUSAL, PICTURES, SEQ2SEQ

TASKS = {
    CAUSAL: "text-generation",
    SEQ2SEQ: "text2text-generation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForTextEncoding": "feature-extraction",
    PICTURES: "image-text-to-text",
}
"""The Hub's word for what a model of an Auto class does. Classes that serve several tasks are not here."""
_HEADLESS = {"input_ids": "feature-extraction", "pixel_values": "image-feature-extraction"}
"""The same for `AutoModel`, by what the model reads."""
_HUB_DATA = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*):(?P<config>[\w.-]*):(?P<split>[\w.\[\]%-]+)")
"""A Hub data set as `shoal.data` records it: owner/name:config:split. A file never has two colons in its name there."""


class Dataset(NamedTuple):
    """A public data set."""

    name: str
    """Its id on the Hub."""
    config: str | None
    split: str


def pipeline_tag(auto: str, inputs: str | None = None) -> str | None:
    """The task of a model that the class `auto` loads; `inputs`: the name of its main input, where it is known. None
    where no one task is the model's."""
    return _HEADLESS.get(inputs or "") if auto == "AutoModel" else TASKS.get(auto)


def public_datasets(source: object) -> tuple[Dataset, ...]:
    """The Hub data sets in what `DataInfo.source` says, of a mixture each; never a file, whatever its name."""
    parts = [re.sub(r"=[\d.e-]+$", "", part) for part in source.split(",")] if isinstance(source, str) else []
    found = [_HUB_DATA.fullmatch(part) for part in parts]
    return tuple(Dataset(one["name"], one["config"] or None, one["split"]) for one in found if one is not None)


def front_matter(
    *,
    base: str | None,
    license_of: Mapping[str, str] | None,
    task: str | None,
    rows: Sequence[Mapping[str, Any]],
    title: str,
) -> dict[str, Any]:
    """library_name, tags and, as far as they are known: pipeline_tag, base_model (the Hub id `base`), license,
    datasets, model-index.

    Of a row of the card `source` names the text that it was measured on, `metric` is the Hub's word for it, and `read`
    names a text that was learned from. `base_model_relation` is left out on purpose: the Hub knows adapter, merge,
    quantized and finetune, and a model without some of its layers is none of them.
    """
    data: dict[str, Any] = {"library_name": "transformers", "tags": ["shoal", "pruned", "layer-pruning"]}
    if task is not None:
        data["pipeline_tag"] = task
    if base is not None:
        data["base_model"] = base
    data |= license_of or {}
    named = [one.name for row in rows for key in ("source", "read") for one in public_datasets(row.get(key))]
    if named:
        data["datasets"] = list(dict.fromkeys(named))
    results = [] if task is None else _results(rows, task)
    if results:
        data["model-index"] = [{"name": title, "results": results}]
    return data


def _results(rows: Iterable[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """The measured figures, one result for each text: huggingface_hub would take two files for one data set."""
    groups: dict[str, list[EvalResult]] = {}
    for row in rows:
        value, source = row.get("pruned"), row.get("source")
        if not row.get("metric") or not isinstance(source, str) or not isinstance(value, int | float):
            continue
        if math.isfinite(value):
            groups.setdefault(f"{source} {row.get('split')}", []).append(_result(row, source, float(value), task))
    return [one for group in groups.values() for one in eval_results_to_model_index("", group)[0]["results"]]


def _result(row: Mapping[str, Any], source: str, value: float, task: str) -> EvalResult:
    public = public_datasets(source)
    known = public[0] if len(public) == 1 and "," not in source else None
    return EvalResult(
        task_type=task,
        dataset_name=source if known is None else known.name,
        dataset_type="other" if known is None else known.name,
        dataset_config=None if known is None else known.config,
        dataset_split=row.get("split") if known is None else known.split,
        metric_type=str(row["metric"]),
        metric_name=str(row["name"]),
        metric_value=float(f"{value:.6g}"),
        metric_args={"how": " ".join(str(row["how"]).split())} if row.get("how") else None,
    )
