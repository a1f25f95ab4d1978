"""What is fuzzed: every reader of files that strangers write. A target takes bytes; it may raise `ShoalError` alone."""

from __future__ import annotations

import atexit
import gzip
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shoal.data.chat import Chat
from shoal.data.files import read_file
from shoal.deciding.policy_file import Level, PolicyFile, load_policy
from shoal.errors import ShoalError
from shoal.models.diagnosis import diagnose, read_metadata
from shoal.models.load import inspect_source, load_config
from shoal.models.shards import INDEX, SINGLE, read_places, stored_tensors
from shoal.plan import Plan, format_steps, parse_plan, parse_steps, plan_from_json, plan_to_json
from shoal.registry import entries

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [],
    "max_position_embeddings": 32,
    "layer_types": ["full_attention"] * 3,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "shoal": {"base_layers": [0, 2, 3], "base": {"layers": {"decoder": 4}}},
}
GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 32,
}
POLICY = PolicyFile(
    "llama", "sha256:0", "sha256:1", (Level("agreement=0.9", {1: 0.9, 2: 0.8}, True, 2.5), Level("whole", {}))
).to_dict()
TEXTS = (
    b"0-11,14-29",
    b"12a,12m,10x3",
    b"29-0",
    b"(7|8),13@12",
    b"~12-15,20?g,!early?g,3/project",
    b"[3, 7, 11]",
    b"--prune-layers 3,7,11",
    b'{"attention": [1], "mlp": [2, 3]}',
    b"slices:\n- sources:\n  - model: m\n    layer_range: [0, 3]\n",
    b'{"block_configs": [{"attention": {"no_op": true}, "ffn": {"no_op": false, "ffn_mult": 1.0}}]}',
)


@dataclass(frozen=True)
class Target:
    """One reader."""

    name: str
    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    share: int
    """Of the inputs; slow readers get fewer."""


@cache
def _scratch() -> Path:
    # memory, where the system has it, since every input is a file
    root = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a folder of our own is made in it
    folder = tempfile.mkdtemp(prefix="shoal-fuzz-", dir=root)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of zeros."""
    data, place = {}, 0
    for name, shape in tensors.items():
        size = 4
        for n in shape:
            size *= n
        data[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text + bytes(place)


@cache
def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of `CONFIG`."""
    from shoal.models.meta import meta_model

    folder = _scratch() / "seed"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model = meta_model(load_config_unchecked(folder))
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def load_config_unchecked(folder: Path) -> Any:
    """The config of a folder without weights."""
    (folder / SINGLE).write_bytes(header({"x": (1,)}))
    return load_config(folder)


@cache
def _identity() -> Plan:
    return Plan.identity(inspect_source(_sound("base")))


@cache
def _sound(name: str) -> Path:
    folder = _scratch() / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / SINGLE).write_bytes(header(shapes()))
    return folder


def _config(data: bytes) -> None:
    folder = _sound("config")
    (folder / "config.json").write_bytes(data)
    load_config(folder)


def _inspected(data: bytes) -> None:
    folder = _sound("inspect")
    (folder / "config.json").write_bytes(data)
    inspect_source(folder)


def _index(data: bytes) -> None:
    folder = _sound("index")
    (folder / INDEX).write_bytes(data)
    stored_tensors(folder)


def _places(data: bytes) -> None:
    file = _scratch() / "header.safetensors"
    file.write_bytes(data)
    read_places(file)


def _plan_json(data: bytes) -> None:
    plan = plan_from_json(data)
    assert plan_from_json(plan_to_json(plan)) == plan


def _policy(data: bytes) -> None:
    file = _scratch() / "policy.json"
    file.write_bytes(data)
    found = load_policy(file)
    found.save(file)
    assert load_policy(file).exits == found.exits


def _notation(data: bytes) -> None:
    text = data.decode("utf-8", errors="replace")
    steps = parse_steps(text)
    assert parse_steps(format_steps(steps)) == steps
    parse_plan(text, _identity())


def _diagnosed_config(data: bytes) -> None:
    folder = _sound("doctor")
    (folder / "config.json").write_bytes(data)
    diagnose(read_metadata(folder))


def _diagnosed_index(data: bytes) -> None:
    folder = _sound("doctor-index")
    (folder / INDEX).write_bytes(data)
    diagnose(read_metadata(folder))


def _diagnosed_header(data: bytes) -> None:
    folder = _sound("doctor-header")
    (folder / SINGLE).write_bytes(data)
    diagnose(read_metadata(folder))


def _exchanged(name: str) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        return entries("exchange")[name].load()().read(data, _identity())

    return run


class _Chat:
    """Writes messages without a template."""

    chat_template = "none"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(f"<{one['role']}>{one['content']}" for one in messages)


def _read_rows(name: str) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        path = _scratch() / name
        path.write_bytes(data)
        return [document.text for document in read_file(path, None, Chat(_Chat())).pieces]

    return run


ROWS = {
    "rows.jsonl": (
        b'{"messages": [{"role": "user", "content": "hi"}, {"from": "gpt", "value": "no"}]}\n',
        b'{"instruction": "a", "input": "b", "output": "c"}\n{"instruction": "a", "output": "c"}\n',
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "\\u00e9"}\n',
    ),
    "rows.json": (b'{"data": [{"text": "a"}, {"text": "b"}]}', b'[{"prompt": "a", "response": "b"}]'),
    "rows.csv": (b'text,id\n"a,b",1\nc,2\n', b"prompt;response\na;b\n"),
    "rows.jsonl.gz": (gzip.compress(b'{"text": "a"}\n', mtime=0),),
}
"""Files of rows, by name."""


@cache
def targets() -> dict[str, Target]:
    """All of them by name."""
    index = json.dumps({"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(shapes(), SINGLE)}).encode()
    broken = {**CONFIG, "num_hidden_layers": 5, "layer_types": ["full_attention"] * 6, "mlp_only_layers": [0, 4]}
    configs = tuple(json.dumps(c).encode() for c in (CONFIG, GEMMA, broken, {**CONFIG, "text_config": GEMMA}))
    gaps = {name.replace("layers.2.", "layers.5."): shape for name, shape in shapes().items()}
    headers = (header(shapes()), header(gaps), header({"a": (2, 3), "b": (0,)}))
    plan = _identity()
    plans = (plan_to_json(plan).encode(), plan_to_json(parse_plan("0,2x2,1a", plan)).encode())
    foreign = []
    for name in entries("exchange"):
        seeds = [*TEXTS, *plans]
        with suppress(ShoalError):  # formats that need sizes, or cannot say this plan, have the common seeds
            seeds.insert(0, entries("exchange")[name].load()().write(parse_plan("0,2", plan), None).encode())
        foreign.append(Target(f"exchange:{name}", _exchanged(name), tuple(seeds), 6))
    found = (
        Target("config", _config, configs, 8),
        Target("inspect", _inspected, configs, 2),
        Target("index", _index, (index,), 12),
        Target("header", _places, headers, 12),
        Target("plan.json", _plan_json, plans, 12),
        Target("policy.json", _policy, (json.dumps(POLICY).encode(),), 6),
        Target("notation", _notation, TEXTS, 12),
        Target("doctor:config", _diagnosed_config, configs, 3),
        Target("doctor:index", _diagnosed_index, (index,), 3),
        Target("doctor:header", _diagnosed_header, headers, 3),
        *foreign,
        *(Target(f"data:{name}", _read_rows(name), seeds, 6) for name, seeds in ROWS.items()),
    )
    return {target.name: target for target in found}
