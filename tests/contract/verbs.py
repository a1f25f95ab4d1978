"""Every verb of the command line as one or two commands, with names in capitals for what tests put there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from shoal.cli import app

TEXT = ("--data", "DATA", "--length", "16", "--limit", "2")
CODED = re.compile(r"shoal: [NPWMDU]\d{3}: .{20}")
"""How a refusal begins."""
CHOICE = '{"query": "the cat", "choices": ["sat", "ran"], "gold": 0}\n'
"""A line of the file TASKS."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "MODEL"),
    "inspect --redundancy": ("inspect", "MODEL", "--redundancy", *TEXT, "--output", "OUT"),
    "measure": ("measure", "MODEL", *TEXT),
    "measure --stream": ("measure", "MODEL", *TEXT, "--stream"),
    "prune": ("prune", "MODEL", "-m", "position", "--drop", "1", "--no-assess", *TEXT, "--output", "OUT"),
    "prune shortgpt": ("prune", "MODEL", "--drop", "1", "--no-assess", *TEXT),
    "prune rys": ("prune", "MODEL", "-m", "rys", "--no-assess", *TEXT),
    "fuse grow": ("fuse", "MODEL", "--with", "grow:every=1", *TEXT, "--no-assess", "--output", "OUT"),
    "fuse": ("fuse", "MODEL", "--plan", "PLAN", "--with", "refit", *TEXT, "--no-assess", "--output", "OUT"),
    "heal": ("heal", "MODEL", "--plan", "PLAN", "--data", "DATA", "--watch", "DATA", "--length", "16", "--batch", "1",
             "--held", "1", "--tokens", "32", "--output", "OUT", "--anyway"),
    "compare": ("compare", "MODEL", "--output", "OUT", "-m", "position", "-b", "layers=0.7", *TEXT, "--test-data",
                "DATA", "--window", "16", "--windows", "1", "--new", "0", "--pairs", "0"),
    "evaluate": ("evaluate", "MODEL", "--data", "DATA", "--window", "16", "--limit", "1", "--no-generation"),
    "evaluate --plan": ("evaluate", "MODEL", "--plan", "PLAN", "--data", "DATA", "--window", "16", "--limit", "1",
                        "--new-tokens", "1"),
    "evaluate --cascade": ("evaluate", "MODEL", "--tasks", "TASKS", "--cascade", "PLAN", "--tradeoff", "0.5"),
    "bench": ("bench", "MODEL", "--plan", "PLAN", "--prompt", "4", "--new", "1", "--pairs", "1"),
    "bench --graph": ("bench", "MODEL", "--graph", "siblings", "--prompt", "4", "--new", "1", "--pairs", "1"),
    "generate": ("generate", "MODEL", "abc", "--plan", "PLAN", "--max-new-tokens", "1"),
    "generate --speculate": ("generate", "MODEL", "abc", "--speculate", "lookup", "--max-new-tokens", "2"),
    "generate --policy": ("generate", "MODEL", "abc", "--policy", "skip:listed=0", "--max-new-tokens", "1"),
    "generate --kv-cache": ("generate", "MODEL", "abc", "--plan", "PLAN", "--kv-cache", "minicache:start=0",
                            "--max-new-tokens", "1"),
    "evaluate --kv-cache": ("evaluate", "MODEL", "--data", "DATA", "--window", "16", "--limit", "1", "--kv-cache",
                            "minicache:start=0"),
    "fit-exits": ("fit-exits", "MODEL", "--policy", "exit:layers=0,fill=defer", *TEXT, "--output", "OUT"),
    "calibrate": ("calibrate", "MODEL", "--policy", "exit:layers=0,fill=defer", "--target", "agreement=0.1", *TEXT,
                  "--prompt", "4", "--output", "OUT"),
    "tune-draft": ("tune-draft", "MODEL", "--prompts", "PROMPTS", "--max-new-tokens", "4", "--pairs", "1",
                   "--finalists", "1"),
    "serve": ("serve", "MODEL", "--plan", "PLAN", "--port", "0"),
    "write": ("write", "MODEL", "--plan", "PLAN", "--output", "OUT"),
    "write --stream": ("write", "MODEL", "--plan", "PLAN", "--output", "OUT", "--stream"),
    "write --dry-run": ("write", "MODEL", "--plan", "PLAN", "--output", "OUT", "--dry-run"),
    "write gguf": ("write", "MODEL", "--plan", "PLAN", "--output", "OUT.gguf"),
    "verify": ("verify", "MODEL"),
    "verify --base": ("verify", "WRITTEN", "--base", "MODEL"),
    "push": ("push", "MODEL", "me/small", "--dry-run"),
    "push WRITTEN": ("push", "WRITTEN", "me/small", "--dry-run"),
    "doctor": ("doctor", "MODEL"),
    "doctor --plan": ("doctor", "MODEL", "--plan", "PLAN"),
    "doctor --repair": ("doctor", "MODEL", "--repair", "OUT"),
    "show": ("show", "PLAN", "--model", "MODEL"),
    "show a file": ("show", "PLAN"),
    "diff": ("diff", "PLAN", "WRITTEN"),
    "convert": ("convert", "PLAN", "--to", "notation", "--model", "MODEL", "--output", "OUT"),
    "convert --from": ("convert", "PLAN", "--from", "mergekit", "--to", "notation", "--model", "MODEL"),
    "ls": ("ls", "KIND"),
}  # fmt: skip


def typed(verb: str, names: dict[str, str]) -> list[str]:
    """The command of a verb with `names` put in."""
    return [
        names.get(word, word.replace("OUT", names["OUT"]) if word == "OUT.gguf" else word) for word in COMMANDS[verb]
    ]


def run(words: list[str]) -> Any:
    """The command through the command line; what nobody foresaw shows as an exception of the result."""
    return CliRunner().invoke(app, words, prog_name="shoal")


def snapshot(folder: Path) -> list[tuple[str, int]]:
    """Every file, folder and link below, with the time of its last change for those that are no folder."""
    found = []
    for at, folders, files in os.walk(folder):
        found += [(str(Path(at) / name), 0) for name in folders]
        found += [(str(Path(at) / name), (Path(at) / name).lstat().st_mtime_ns) for name in files]
    return sorted(found)
