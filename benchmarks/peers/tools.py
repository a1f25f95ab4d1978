"""How each tool is asked to drop layers, and what it answered."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoints import DROPPED, kept, ranges
from benchmarks.peers.environments import Environment

HERE = Path(__file__).parent
LIMIT = 1e-4
"""Logits that differ by more are not the same model's; those of the checkpoints are of size 1."""
TIMEOUT = 600
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

Command = Callable[[Environment, Path, Path], list[str]]


@dataclass(frozen=True)
class Verdict:
    """What a tool did with one checkpoint."""

    kind: str
    """right, refused, does not finish, does not load, loads wrong."""
    detail: str
    facts: Mapping[str, Any]


def mergekit(where: Environment, base: Path, output: Path) -> list[str]:
    pieces = [f"  - sources:\n      - model: {base}\n        layer_range: {piece}\n" for piece in ranges()]
    slices = base.with_name(f"{base.name}.slices.yaml")
    slices.write_text(f"slices:\n{''.join(pieces)}merge_method: passthrough\ndtype: float32\n", encoding="utf-8")
    # the checkpoints have no tokenizer
    return [str(where.python.with_name("mergekit-yaml")), str(slices), str(output), "--no-copy-tokenizer", "--quiet"]


def driver(name: str) -> Command:
    def command(where: Environment, base: Path, output: Path) -> list[str]:
        return [str(where.python), str(HERE / "drivers" / name), str(base), str(output), *map(str, DROPPED)]

    return command


def shoal(where: Environment, base: Path, output: Path) -> list[str]:
    start = [str(where.python), "-c", "from shoal.cli import main; main()"]
    return [*start, "write", str(base), "--plan", ",".join(map(str, kept())), "--output", str(output), "--quiet"]


TOOLS: dict[str, Command] = {
    "no tool": driver("plain.py"),
    "mergekit": mergekit,
    "optipfair": driver("optipfair_.py"),
    "economize": driver("economize_.py"),
    "shoal": shoal,
}


def tried(tool: str, where: Environment, base: Path, output: Path) -> Verdict:
    """Let `tool` drop the layers of `base`, and judge what it wrote to `output`."""
    if where.error:
        return Verdict("not installed", where.error, {})
    done = _run(TOOLS[tool](where, base, output))
    left = sorted(file.name for file in output.iterdir()) if output.exists() else []
    if done.returncode:
        message = _last(done.stderr)
        on_purpose = not left and ("Traceback" not in done.stderr or _raised_in(done.stderr, tool))
        leaves = f"; leaves {', '.join(left)}" if left else "; nothing written"
        return Verdict("refused" if on_purpose else "does not finish", f"{message}{leaves}", {"files": left})
    judged = _run([sys.executable, str(HERE / "judge.py"), str(base), str(output), *map(str, DROPPED)])
    if judged.returncode:
        raise RuntimeError(f"the judge of {tool} on {base.name} failed: {_last(judged.stderr)}")
    return verdict(json.loads(judged.stdout.splitlines()[-1]))


def verdict(found: Mapping[str, Any]) -> Verdict:
    """From the judge's findings."""
    keys = [f"{len(found[kind])} {kind}" for kind in ("missing", "unexpected", "mismatched") if found.get(kind)]
    tensors = f"; tensors {', '.join(keys)}" if keys else ""
    if found.get("layers", len(kept())) != len(kept()):
        tensors += f"; its config says {found['layers']} layers"
    if "error" in found:
        return Verdict(
            "does not load" if "uncached" not in found else "does not run", _bare(found["error"]) + tensors, found
        )
    wrong = max(found["uncached"], found["cached"])
    numbers = f"largest difference {found['uncached']:.2g} uncached, {found['cached']:.2g} cached{tensors}"
    return Verdict("right" if wrong <= LIMIT and not keys else "loads wrong", numbers, found)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    settings = os.environ | _OFFLINE
    try:
        return subprocess.run(  # noqa: S603
            command, check=False, capture_output=True, text=True, env=settings, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"still running after {TIMEOUT} s")


def _last(text: str) -> str:
    """The error's own line: the last one that is not indented, with what hangs below it when it says nothing."""
    lines = [line for line in text.splitlines() if line.strip()]
    heads = [n for n, line in enumerate(lines) if not line.startswith((" ", "\t"))]
    said = " ".join(line.strip() for line in lines[heads[-1] :]) if heads else "no message"
    return _bare(said)[:300]


def _bare(text: str) -> str:
    """Without the folders of this machine."""
    return re.sub(r"(?:/[\w.+@ -]+)+/", "", text)


def _raised_in(text: str, tool: str) -> bool:
    files = re.findall(r'File "([^"]+)"', text)
    return bool(files) and f"/{tool}/" in files[-1].replace("\\", "/").partition("site-packages")[2]
