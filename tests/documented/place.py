"""The folder where documented commands run: tiny models, plans and texts under the names that the pages use."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from shoal.models import gguf
from shoal.models.load import Loaded, load
from shoal.models.opened import open_model
from shoal.plan import Plan, parse_plan, save_plan
from shoal.writing.folder import write
from shoal.writing.gguf_out.write import convert_model
from shoal.writing.reference import live_reference

from ..gguf_files import TEXT, tiny_model, tiny_tokenizer
from .standins import LESS
from .texts import ROOT

DEPTH = 30
"""Of the built-in model: documented plans name its layers."""
CHAT = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
VOCAB = 320
SHORT, LONG = 1_500, 4_000
"""Characters of the built-in text, one window of 512 tokens, and of the files, one of 1,024."""


def build(place: Path) -> Path:
    """Fill `place` and return it."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    model = tiny_model("llama", num_hidden_layers=DEPTH, max_position_embeddings=2048)
    loaded = Loaded(model, tokenizer, "smollm2")
    convert_model(loaded, Plan.identity(loaded.opened.spec), place / "smollm2.gguf", outtype="f32")
    (place / "base.gguf").symlink_to("smollm2.gguf")
    _saved(model, tokenizer, place / "MODEL")
    for name in ("FOLDER", "BASE"):
        (place / name).symlink_to("MODEL")
    for name, other in _others().items():
        _saved(_filled(other), tokenizer, place / name)
    _plans(place)
    _texts(place)
    _broken(place)
    _adapter(place)
    (place / "examples").symlink_to(ROOT / "examples")
    return place


def _saved(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _others() -> dict[str, PreTrainedModel]:
    size = {"vocab_size": VOCAB, "d_model": 32, "decoder_start_token_id": 0}
    t5 = T5Config(**size, d_kv=8, d_ff=64, num_layers=6, num_decoder_layers=6, num_heads=4)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    bart = BartConfig(**size, **heads, encoder_layers=12, decoder_layers=12, max_position_embeddings=64)
    bert = BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4
    )
    return {
        "T5": T5ForConditionalGeneration(t5),
        "BART": BartForConditionalGeneration(bart),
        "ENCODER": BertForMaskedLM(bert),
    }


def _filled(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights large enough that every layer matters."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, 0, 0.15)
    return model.eval()


def _plans(place: Path) -> None:
    base = load(place / "MODEL", device="cpu")
    plan = parse_plan("0-11,14-29", Plan.identity(open_model(base.model).spec, source="MODEL"))
    save_plan(plan, place / "plan.json")
    write(base, plan, place / "PLAN", prove=False)
    (place / "pruned-folder").symlink_to("PLAN")


def _texts(place: Path) -> None:
    text = (TEXT + " ") * (LONG // len(TEXT))
    for name in ("wiki", "valid", "test", "texts", "a", "b", "notes"):
        (place / f"{name}.txt").write_text(f"{name}: {text}", encoding="utf-8")
    (place / "prompts.txt").write_text("Why is the sky blue?\n", encoding="utf-8")
    items = [{"context": "the cat sat on the", "continuation": " mat"}] * 3
    (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    labelled = [{"text": f"the cat {word} on the mat", "label": word} for word in ("sat", "ran")] * 3
    (place / "labels.jsonl").write_text("".join(json.dumps(item) + "\n" for item in labelled), encoding="utf-8")
    choices = [{"query": "the cat sat on the", "choices": ["mat", "sky"], "gold": 0}] * 6
    for name in ("choices", "piqa"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in choices), encoding="utf-8")
    _rows(place, text)
    (place / "mine.py").write_text(
        (ROOT / "examples" / "thin_middle.py").read_text(encoding="utf-8").replace("def thin_middle", "def mine"),
        encoding="utf-8",
    )


def _rows(place: Path, text: str) -> None:
    """The files of docs/data.md."""
    chat = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    (place / "chat.jsonl").write_text(json.dumps(chat), encoding="utf-8")
    (place / "alpaca.json").write_text(json.dumps([{"instruction": text, "output": text}]), encoding="utf-8")
    (place / "rows.jsonl").write_text(json.dumps({"body": text}), encoding="utf-8")
    (place / "logs.csv").write_text(f'id,message\n1,"{text}"\n', encoding="utf-8")


def _adapter(place: Path) -> None:
    """The adapter of docs/adapters.md."""
    import peft

    model = load(place / "MODEL", device="cpu").model
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(str(place / "lora"))


def _broken(place: Path) -> None:
    """The folder of docs/doctor.md: layer 1 of 4 was deleted by hand, and the config was left as it was."""
    from ..contract.families import tiny

    model = tiny("gemma3_text", "eager")
    config, state = model.config.to_dict(), model.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("model.layers.1.")}
    model.save_pretrained(place / "broken", state_dict=kept)
    file = place / "broken" / "config.json"
    stale = json.loads(file.read_text(encoding="utf-8")) | {"num_hidden_layers": 3}
    file.write_text(json.dumps(stale | {"layer_types": config["layer_types"]}), encoding="utf-8")


@contextmanager
def stand_ins(place: Path, own: Path) -> Iterator[None]:
    """Within, everything in `place` also lies in the empty folder `own`, which is the working folder; the GGUF file of
    `place` is the built-in model, the built-in text is short, proofs are made in this process, and a server answers one
    request and ends."""
    for entry in place.iterdir():
        (own / entry.name).symlink_to(entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(own)
        patch.setenv("SHOAL_CACHE", str(place / "cache"))
        for name in LESS:
            resolve_name(name)  # or a module that is imported later would keep what stands in for the other's function
        patch.setattr("shoal.models.gguf.builtin_file", lambda: place / "smollm2.gguf")
        patch.setattr("shoal.data.sources.builtin_text", lambda split: (f"{split} {TEXT} " * 100)[:SHORT])
        patch.setattr("shoal.serve.listen.bind", _anywhere)
        patch.setattr("shoal.serve.listen.listen", answer_once)
        convert = gguf._convert
        known = (place / "smollm2.gguf").resolve()
        patch.setattr(
            "shoal.models.gguf._convert",
            lambda file, folder: (
                shutil.copytree(place / "MODEL", folder) if file.resolve() == known else convert(file, folder)
            ),
        )
        for name in ("load", "check_source", "inspect_source"):
            patch.setattr(f"shoal.models.load.{name}", _once(resolve_name(f"shoal.models.load.{name}"), place))
        patch.setattr("shoal.evaluation.generation.PROMPTS", ("Why?",))
        patch.setattr("shoal.api.prompts.BUILTIN", {"short": ("Why?",)})
        for name, most in LESS.items():
            patch.setattr(name, _given_less(resolve_name(name), most))
        patch.setattr("shoal.writing.reference.TOKENS", 8)
        with proving_here(greedy=(1, 4)):
            yield


KNOWN: dict[str, Any] = {}
"""The base models that were loaded or looked at: every command has the same, which all give back as they took it."""


def _once(function: Callable[..., Any], place: Path) -> Callable[..., Any]:
    """`function` called once for each base model and options."""

    @functools.wraps(function)
    def known(source: Any, **options: Any) -> Any:
        if source not in ("smollm2", "MODEL") or options.get("stream"):
            return function(source, **options)
        key = f"{function.__name__} {place} {source} {sorted(options.items())}"
        if key not in KNOWN:
            KNOWN[key] = function(source, **options)
        return KNOWN[key]

    return known


def _given_less(function: Callable[..., Any], most: dict[str, int]) -> Callable[..., Any]:
    @functools.wraps(function)
    def less(*args: Any, **given: Any) -> Any:
        asked = {name: given.get(name, n) for name, n in most.items()}
        return function(*args, **given | {name: None if n is None else min(n, most[name]) for name, n in asked.items()})

    return less


@contextmanager
def proving_here(**options: Any) -> Iterator[None]:
    """Within, proofs are made in this process, with these `options` of `live_reference`."""
    pipes = {name: getattr(subprocess, name) for name in ("DEVNULL", "PIPE")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal.writing.proof.subprocess", SimpleNamespace(run=_proved_here, **pipes))
        patch.setattr("shoal.writing.proof.live_reference", functools.partial(live_reference, **options))
        yield


def _proved_here(words: list[str], **_: Any) -> SimpleNamespace:
    """The proof's child within this process: the same measurements, without the seconds in which libraries start."""
    from shoal.writing.proof_child import answer

    request = json.loads(Path(words[-1]).read_text(encoding="utf-8"))
    with torch.no_grad():
        answers = [answer(job) for job in request["jobs"]]
    Path(request["answers"]).write_text(json.dumps(answers), encoding="utf-8")
    return SimpleNamespace(returncode=0, stderr=b"")


def _anywhere(host: str, port: int) -> Any:
    """A socket on a free port: other tests may hold the one that the page names."""
    import socket

    return socket.create_server((host, 0))


def answer_once(app: Any, sock: Any, **_: Any) -> None:
    """Ask the served application what docs/serving.md asks with curl; its answer is that of one choice."""
    from starlette.testclient import TestClient

    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        said = client.post("/v1/chat/completions", json=asked_of_the_server() | {"max_tokens": 2})
    assert said.status_code == 200, said.text
    assert len(said.json()["choices"]) == 1


def asked_of_the_server() -> dict[str, Any]:
    """The body of the curl command of docs/serving.md."""
    from .texts import commands

    words = next(own.words for own in commands("docs/serving.md") if own.text.startswith("curl"))
    assert words[1].endswith("/v1/chat/completions")
    body: dict[str, Any] = json.loads(words[words.index("-d") + 1])
    return body
