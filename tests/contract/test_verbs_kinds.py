"""Every verb on a model of every kind: it works, or refuses by the code of this table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..documented.place import proving_here
from .families import tiny
from .kinds import kind
from .shares import pairs
from .verbs import CHOICE, COMMANDS, run, typed

PLANS = {
    "llama": "0,2-3", "jamba": "0-2", "mamba2": "0,2-3", "bert": "0,2-5", "t5": "encoder: 0,3-5; decoder: 0,5",
    "whisper": "encoder: 0,3-5; decoder: 0,5", "vit": "0,2-5", "clip": "vision: 1-3; text: 0,2-5",
}  # fmt: skip
"""A decoder, a hybrid, a recurrent model, an encoder, two encoder-decoders, a vision model, two towers."""


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each small letter: the tiny models know 64 tokens."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    letters = {letter: i for i, letter in enumerate([*special.values(), *"abcdefghijklmnopqrstuvwxyz ,;."])}
    words = Tokenizer(models.WordLevel(letters, unk_token=special["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By kind, the folder of its tiny model; and what else the commands name."""
    root = tmp_path_factory.mktemp("kinds")
    for name in PLANS:
        model = tiny(name, "eager") if name in ("llama", "jamba", "mamba2") else kind(name)
        model.save_pretrained(root / name)
        letter_tokenizer().save_pretrained(root / name)
    (root / "data.txt").write_text("the cat sat on the mat; " * 40, encoding="utf-8")
    (root / "prompts.txt").write_text("the cat\n", encoding="utf-8")
    (root / "choices.jsonl").write_text(CHOICE * 4, encoding="utf-8")
    files = {"DATA": "data.txt", "PROMPTS": "prompts.txt", "TASKS": "choices.jsonl"}
    return {name: str(root / file) for name, file in {**files, **{n: n for n in PLANS}}.items()}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("shoal.serve.listen.listen", lambda *_, **__: None)
    with proving_here():
        yield


CAUSAL, RECURRENT = ("llama", "jamba", "mamba2"), ("jamba", "mamba2")
ALL, OTHERS = tuple(PLANS), tuple(name for name in PLANS if name not in CAUSAL)
SEVERAL, NO_TEXT = ("t5", "whisper", "clip"), ("whisper", "vit")
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    **{
        key: {"M323": (*NO_TEXT, "clip")}
        for key in ("measure", "prune shortgpt", "measure --stream", "inspect --redundancy")
    },
    "prune rys": {"M323": NO_TEXT, "M322": ("bert", "t5", "clip")},
    "fuse grow": {"M323": (*NO_TEXT, "clip"), "U664": ("mamba2", "bert", "t5"), "W206": ("jamba",)},
    **{
        key: {"M322": OTHERS}
        for key in ("compare", "evaluate", "evaluate --plan", "bench", "bench --graph", "generate", "serve")
    },
    **{key: {"M322": OTHERS, "P161": RECURRENT} for key in ("generate --kv-cache", "evaluate --kv-cache")},
    **{key: {"M322": OTHERS, "U611": RECURRENT} for key in ("generate --speculate", "tune-draft")},
    **{key: {"M322": OTHERS, "P131": RECURRENT} for key in ("generate --policy", "fit-exits", "calibrate")},
    "evaluate --cascade": {"M322": ("bert", "whisper", "vit", "clip")},
    "heal": {"M322": ("bert",), "U653": ("t5", "clip"), "M323": NO_TEXT},
    "fuse": {"U653": ("t5", "clip"), "M323": NO_TEXT},
    "write --stream": {"W240": SEVERAL},
    "write gguf": {"W265": tuple(name for name in PLANS if name != "llama"), "W266": ("llama",)},
    "verify": {"N001": ALL},
    "push": {"W310": ALL},
    "doctor --repair": {"W251": ALL},
}
"""By verb and code, the kinds that are refused; every other kind works. CLIP's text is named by --stack, its pictures
have no data; the letters of these tests are no tokenizer of GGUF; nothing is wrong with any of the folders."""
VERBS = [verb for verb in COMMANDS if "MODEL" in COMMANDS[verb] and verb not in ("verify --base", "convert --from")]


@pytest.mark.parametrize(("verb", "name"), pairs(8, VERBS, PLANS, step=3))
def test_a_verb_works_or_is_refused(verb: str, name: str, names: dict[str, str], tmp_path: Path) -> None:
    own = {"MODEL": names[name], "PLAN": PLANS[name], "OUT": str(tmp_path / "out")}
    result = run(typed(verb, names | own))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    said = (result.stderr.strip().splitlines() or [""])[-1]
    expected = next((code for code, kinds in REFUSED.get(verb, {}).items() if name in kinds), "works")
    assert (said.removeprefix("shoal: ")[:4] if result.exit_code else "works") == expected, said


def test_the_table_names_verbs_and_kinds_that_there_are() -> None:
    assert {*REFUSED} <= {*VERBS}
    assert {kind for row in REFUSED.values() for own in row.values() for kind in own} == {*ALL}
