"""GGUF out in llama.cpp itself: what it computes from a written file is what the live plan computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType

from gguf_files import MODELS, TEXT, tiny_model, tiny_tokenizer
from shoal.live import running
from shoal.models.gguf_source import open_source
from shoal.models.inspect import inspect
from shoal.models.load import BUILTIN, Loaded, gguf_file, load
from shoal.plan import Plan, parse_plan
from shoal.writing.gguf_out import families
from shoal.writing.gguf_out.container import write_file
from shoal.writing.gguf_out.copied import copied_manifest
from shoal.writing.gguf_out.write import convert_model, copy_file, plan_for

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed; it builds from PyPI: pip install llama-cpp-python"
)

reported = logging.getLogger("shoal.tests.gguf")  # shown by -rP

LOSSLESS, TABLED = 1e-5, 1e-3
"""By what share of the largest logit llama.cpp may differ, keys and values in float32: Gemma's activation is a float16
table."""
NEAR_TIE = 0.001
"""Gap of the two highest logits below which another order of a sum may choose another token: the logits of the five
texts differ by 6e-5 at most (measured), and their smallest gap is 0.0019."""
PROMPTS = (
    "The harbour was quiet in the early morning, and only a few boats",
    "def area(width, height):",
    "Question: Which planet is closest to the sun?\nAnswer:",
    "Once upon a time, in a small village",
    "The three most important things about cooking rice are",
)
DROPPED = "0-11,15,16,18-24,27-29"
"""Layers 12, 13, 14, 17, 25 and 26 of 30 left out."""


@pytest.fixture
def opened(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Open a file in llama.cpp with float32 keys and values; closed at the end."""
    models: list[Any] = []

    def open_(file: Path, **options: Any) -> Any:
        kinds = {"type_k": 0, "type_v": 0}
        models.append(
            llama_cpp.Llama(str(file), n_ctx=128, n_threads=1, verbose=False, logits_all=True, **kinds, **options)
        )
        return models[-1]

    yield open_
    for model in models:
        model.close()


def logits_of(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """[tokens, vocabulary]"""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def live_logits(loaded: Loaded, plan: Plan, ids: list[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad(), running(loaded.model, plan):
        found: np.ndarray[Any, Any] = loaded.model(torch.tensor([ids])).logits[0].numpy()
    return found


def share(found: np.ndarray[Any, Any], live: np.ndarray[Any, Any]) -> float:
    """The largest difference as a share of the largest logit."""
    return float(np.abs(found - live).max() / np.abs(live).max())


IDS = np.random.default_rng(0).integers(3, 300, 24).tolist()


@pytest.mark.parametrize("text", ["0-5", "0,2-3,5", "0,1x2,4,3,2"])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_computes_the_live_plan(name: str, text: str, tmp_path: Path, opened: Callable[..., Any]) -> None:
    base = Loaded(tiny_model(name), tiny_tokenizer(), name)
    plan = parse_plan(text, Plan.identity(inspect(base.model)))
    convert_model(base, plan, tmp_path / "out.gguf", outtype="f32")
    limit = TABLED if name.startswith("gemma") else LOSSLESS
    assert share(logits_of(opened(tmp_path / "out.gguf"), IDS), live_logits(base, plan, IDS)) < limit


def test_wrong_rows_or_windows_would_show(
    tmp_path: Path, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, wrong in (
        ("llama", lambda: monkeypatch.setitem(families.FAMILIES, "llama", families.Family("llama"))),
        ("gemma3_text", lambda: monkeypatch.setattr(families, "_add_windows", _first_window)),
    ):
        base = Loaded(tiny_model(name), tiny_tokenizer(), name)
        plan = parse_plan("0,2-3,5", Plan.identity(inspect(base.model)))
        wrong()
        convert_model(base, plan, tmp_path / f"{name}.gguf", outtype="f32")
        assert share(logits_of(opened(tmp_path / f"{name}.gguf"), IDS), live_logits(base, plan, IDS)) > 10 * TABLED


def _first_window(writer: Any, arch: str, window: int | None, sliding: list[bool]) -> None:
    writer.add_sliding_window(window)


def test_a_gguf_base_with_arrays_is_pruned_and_loads(tmp_path: Path, opened: Callable[..., Any]) -> None:
    """llama.cpp refuses an array of the old length; with the array permuted the file computes the live plan."""
    base = Loaded(tiny_model("llama"), tiny_tokenizer(), "llama")
    identity = Plan.identity(inspect(base.model))
    convert_model(base, identity, tmp_path / "base.gguf")
    source = open_source(tmp_path / "base.gguf")
    whole = copied_manifest(source, identity)
    listed = {
        f"llama.{key}": ([source.value(key)] * 6, GGUFValueType.ARRAY, GGUFValueType.UINT32)
        for key in ("attention.head_count_kv", "feed_forward_length")
    }
    write_file(tmp_path / "arrays.gguf", "llama", {**whole.pairs, **listed}, whole.items, lambda _: None)
    source = open_source(tmp_path / "arrays.gguf")
    plan, _ = plan_for(source, "0,2-3,3,5", "x")
    copy_file(source, plan, tmp_path / "out.gguf")
    live = parse_plan("0,2-3,3,5", identity)
    assert share(logits_of(opened(tmp_path / "out.gguf"), IDS), live_logits(base, live, IDS)) < LOSSLESS
    pruned = copied_manifest(source, plan)
    write_file(tmp_path / "stale.gguf", "llama", {**pruned.pairs, **listed}, pruned.items, lambda _: None)
    with pytest.raises(ValueError, match="Failed to load model"):
        opened(tmp_path / "stale.gguf")


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    base = Loaded(tiny_model("llama"), tiny_tokenizer(), "llama")
    convert_model(base, Plan.identity(inspect(base.model)), tmp_path / "out.gguf")
    with closing(llama_cpp.Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)) as model:
        for text in (TEXT, "the 345 dog's hill, naïve ☃\n\n  ran", "<|im_start|>the cat<|im_end|>"):
            assert model.tokenize(text.encode(), add_bos=False, special=True) == base.tokenizer(text).input_ids


@pytest.fixture(scope="module")
def smollm2_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pruned SmolLM2: copied as float32, and converted from the transformers model."""
    place = tmp_path_factory.mktemp("smollm2")
    file = gguf_file(BUILTIN)
    assert file is not None
    source = open_source(file)
    plan, _ = plan_for(source, DROPPED, BUILTIN)
    copy_file(source, plan, place / "copied.gguf", outtype="f32")
    copy_file(source, plan, place / "blocks.gguf")
    base = load(BUILTIN, device="cpu")
    plan = parse_plan(DROPPED, Plan.identity(inspect(base.model)))
    convert_model(base, plan, place / "converted.gguf", tokenizer_from=file)
    return {name: place / f"{name}.gguf" for name in ("copied", "converted", "blocks")}


@pytest.mark.parametrize("way", ["copied", "converted"])
def test_pruned_smollm2_writes_the_same_tokens(
    way: str, smollm2_files: dict[str, Path], opened: Callable[..., Any], record_property: Callable[..., None]
) -> None:
    """Float32 on both sides: with quantised blocks llama.cpp also rounds activations, which is no fault of a file."""
    base = load(BUILTIN, device="cpu")
    plan = parse_plan(DROPPED, Plan.identity(inspect(base.model)))
    model = opened(smollm2_files[way])
    for prompt in PROMPTS:
        ids = base.tokenizer(prompt).input_ids
        assert model.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        tokens, gaps, at, moved = greedy_both(base, plan, model, ids)
        said = "the same 32 tokens" if at is None else f"token {at} differs at a gap of {gaps[at]:.5f}"
        record_property(prompt, said)
        reported.warning("%s: %s; smallest gap %.5f, logits differ by %.2g: %r", way, said, min(gaps), moved, prompt)
        assert len(tokens) == 32
        assert at is None or gaps[at] < NEAR_TIE


def greedy_both(
    base: Loaded, plan: Plan, model: Any, ids: list[int]
) -> tuple[list[int], list[float], int | None, float]:
    """32 live greedy tokens, at each the gap of the two highest logits, where llama.cpp's first differs, and by how
    much any logit does up to there."""
    tokens: list[int] = []
    gaps: list[float] = []
    with torch.no_grad(), running(base.model, plan):
        out = base.model.generate(
            torch.tensor([ids]),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    for step in out.logits:
        high = step[0].float().topk(2)
        tokens.append(int(high.indices[0]))
        gaps.append(float(high.values[0] - high.values[1]))
    model.reset()
    model.eval(ids)
    moved = 0.0
    for at, token in enumerate(tokens):
        found = model.scores[model.n_tokens - 1]
        moved = max(moved, float(np.abs(found - out.logits[at][0].numpy()).max()))
        if int(np.argmax(found)) != token:
            return tokens, gaps, at, moved
        model.eval([token])
    return tokens, gaps, None, moved


def test_blocks_of_smollm2_are_those_of_the_base(smollm2_files: dict[str, Path], opened: Callable[..., Any]) -> None:
    file = gguf_file(BUILTIN)
    assert file is not None
    before = {t.name: t.data for t in GGUFReader(file).tensors}
    kept = [*range(12), 15, 16, *range(18, 25), 27, 28, 29]
    for tensor in GGUFReader(smollm2_files["blocks"]).tensors:
        first, _, rest = tensor.name.removeprefix("blk.").partition(".")
        name = f"blk.{kept[int(first)]}.{rest}" if tensor.name.startswith("blk.") else tensor.name
        assert np.array_equal(tensor.data, before[name]), tensor.name
    assert opened(smollm2_files["blocks"]).metadata["llama.block_count"] == "24"
