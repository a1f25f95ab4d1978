"""The front matter of a card as the Hub reads it: tasks, public data sets, measured figures, no guesses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from shoal.plan import Plan, parse_plan
from shoal.writing.card import Origin, model_card, origin
from shoal.writing.card_data import TASKS, pipeline_tag, public_datasets
from shoal.writing.local_paths import local_paths, shortened, without_folders

from .families import tiny

WIKI = "Salesforce/wikitext:wikitext-2-raw-v1:test"


def row(source: str, value: float = 4.0, metric: str = "perplexity", **more: Any) -> dict[str, Any]:
    how = f"{source.rpartition('/')[2]}, 8 x 64 tokens"
    return {
        "name": metric, "metric": metric, "source": source, "split": "test", "unit": "", "dense": 3.0, "pruned": value,
        "how": how, **more,
    }  # fmt: skip


def card(*rows: dict[str, Any], base: Origin | None = None, **options: Any) -> str:
    from shoal.models.inspect import inspect

    plan = parse_plan("0,2-3", Plan.identity(inspect(tiny("llama", "sdpa"))))
    return model_card(
        plan,
        base or Origin("base", "me/base", {"license": "mit"}),
        title="out",
        base_layers=(0, 2, 3),
        rows=rows,
        **options,
    )


def test_the_hub_reads_the_results() -> None:
    rows = (
        row(WIKI), row(WIKI, 0.25, "kl_divergence"), row("notes.txt", 17.5), row("more.txt", 18.5),
        row("builtin (Python 3.12)", math.nan),
        {"name": "parameters", "dense": 4, "pruned": 3, "how": "counted"},
        {"name": "healed on tokens", "dense": None, "pruned": 12_000, "read": "me/fineweb::train", "how": ""},
    )  # fmt: skip
    read = huggingface_hub.ModelCard(card(*rows))
    assert read.data.pipeline_tag == "text-generation" and read.data.base_model == "me/base"
    assert read.data.datasets == ["Salesforce/wikitext", "me/fineweb"]
    found = {(one.dataset_type, one.dataset_name, one.metric_type): one.metric_value for one in read.data.eval_results}
    assert found == {
        ("Salesforce/wikitext", "Salesforce/wikitext", "perplexity"): 4.0,
        ("Salesforce/wikitext", "Salesforce/wikitext", "kl_divergence"): 0.25,
        ("other", "notes.txt", "perplexity"): 17.5,
        ("other", "more.txt", "perplexity"): 18.5,
    }
    first = read.data.eval_results[0]
    assert (first.dataset_config, first.dataset_split, first.task_type) == (
        "wikitext-2-raw-v1",
        "test",
        "text-generation",
    )
    again = huggingface_hub.ModelCardData(**yaml.safe_load(read.data.to_yaml()) | {"model-index": None})
    assert again.pipeline_tag == "text-generation"


def test_what_is_not_known_is_left_out() -> None:
    data = yaml.safe_load(card(row("notes.txt"), auto="AutoModelForPreTraining").split("---\n")[1])
    assert not {"pipeline_tag", "datasets", "model-index"} & data.keys()
    data = yaml.safe_load(card(auto="AutoModel").split("---\n")[1])
    assert "pipeline_tag" not in data and "model-index" not in data


def test_tasks() -> None:
    assert pipeline_tag("AutoModelForSpeechSeq2Seq") == "automatic-speech-recognition"
    assert pipeline_tag("AutoModel", "input_ids") == "feature-extraction"
    assert pipeline_tag("AutoModel", "pixel_values") == "image-feature-extraction"
    assert pipeline_tag("AutoModel") is None and pipeline_tag("AutoBackbone") is None
    import transformers

    assert all(hasattr(transformers, name) for name in TASKS)


def test_the_bases_card_says_its_task(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\npipeline_tag: sentence-similarity\n---\n")
    assert origin(str(tmp_path), tmp_path).task == "sentence-similarity"
    assert "pipeline_tag: sentence-similarity" in card(base=Origin("b", task="sentence-similarity"), auto="AutoModel")


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (WIKI, ["Salesforce/wikitext"]),
        (f"{WIKI}=0.7,notes.txt=0.3", ["Salesforce/wikitext"]),
        ("a/b::train=0.5,c/d:x:train=0.5", ["a/b", "c/d"]),
        ("wikitext/test.txt", []), ("wiki.txt", []), ("builtin (Python 3.12)", []), ("list", []), (None, []),
    ],
)  # fmt: skip
def test_public_data_sets(source: object, names: list[str]) -> None:
    assert [one.name for one in public_datasets(source)] == names


def test_the_command_names_no_folder() -> None:
    said = "shoal prune /data/models/llama --data=/home/me/x/wiki.txt --plan 10/2 --output out/new --then ./mine.py:a=1"
    assert (
        without_folders(said) == "shoal prune llama --data=wiki.txt --plan 10/2 --output out/new --then ./mine.py:a=1"
    )
    assert "shoal prune llama" in card(command="shoal prune /data/models/llama --drop 1")


def test_paths_of_this_machine(tmp_path: Path) -> None:
    here = tmp_path / "out"
    text = f'"{here}" "{here}/adapter" "{tmp_path}/base/x" "/nowhere/at/all" https://huggingface.co/a/b </div> "a/b"'
    found = '"me/x" "me/x/adapter" "x" "/nowhere/at/all" https://huggingface.co/a/b </div> "a/b"'
    assert shortened(text, here, "me/x") == found
    assert list(local_paths(text, [tmp_path])) == [str(here), f"{here}/adapter", f"{tmp_path}/base/x"]
    assert not list(local_paths(text, [Path("/")])) and not list(local_paths(found, [tmp_path]))
