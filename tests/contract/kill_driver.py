"""Run as a script by test_kill: kills many writes at random moments and says what each left behind.

Imports are paid once: every write is a fork of this process.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Plan, load_plan, parse_plan
from shoal.writing import folder as folder_module
from shoal.writing.proof import Proof

STOPPED = 7


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def write(loaded: Loaded, text: str, output: Path, report: Callable[[str], None]) -> None:
    plan = parse_plan(text, Plan.identity(inspect(loaded.model)))
    names = ("writing", "proving", "publishing", "written")
    folder_module.write(
        loaded, plan, output, overwrite=True, shard_size="20KB", progress=lambda done, *_: report(names[done])
    )


def stopped_write(
    loaded: Loaded, text: str, output: Path, wait: tuple[str, float] | None, number: int
) -> tuple[tuple[float, float], int, list[str]]:
    """Fork a write, send it the signal `number` at (stage, seconds after its begin), and wait for its end. Returns
    seconds at which it began to publish and at which it ended, the wait status and the stages it reached."""
    out, into = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 0
        try:
            os.write(into, b"start\n")
            write(loaded, text, output, lambda stage: os.write(into, f"{stage}\n".encode()))
        except KeyboardInterrupt:
            code = STOPPED
        os._exit(code)  # after the `except`: as in any program, what the exception held is closed by now
    os.close(into)
    start, seen, killed = time.monotonic(), b"", wait is None
    due: float | None = None
    published = 0.0
    while True:
        if not killed and wait is not None and due is None and wait[0].encode() in seen:
            due = time.monotonic() + wait[1]
        left = None if due is None or killed else max(0.0, due - time.monotonic())
        ready, _, _ = select.select([out], [], [], left)
        if not ready:
            os.killpg(process, number)
            killed = True
            continue
        got = os.read(out, 4096)
        if not got:
            break
        seen += got
        if b"publishing" in got:
            published = time.monotonic() - start
    os.close(out)
    _, status = os.waitpid(process, 0)
    return (published, time.monotonic() - start), status, seen.decode().split()


def state(output: Path, plans: set[str]) -> str:
    """absent, the notation of the plan of a complete folder, or what is wrong with it."""
    if not output.exists():
        return "absent"
    if not (output / "shoal" / "proof.json").is_file():
        return "WRONG: no proof.json"
    try:
        text = str(load_plan(output))
        found, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        json.loads((output / "shoal" / "proof.json").read_text())
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    bad = [info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]
    right = text in plans and found.config.num_hidden_layers == len(load_plan(output).layers()) and not bad
    return text if right else f"WRONG: {text} {bad}"


def main(root: Path, kills: int, interrupts: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    real, loaded = folder_module._proved, Loaded(model(), None, "tiny")
    folder_module._proved = lambda *_: Proof(True, ())
    draw = random.Random(0)
    warm = [stopped_write(loaded, "0-2", root / "warm", None, signal.SIGKILL)[0] for _ in range(4)]
    whole = min(end for _, end in warm)  # the longer ones waited for a busy machine
    publishing = min(end - published for published, end in warm)
    results = []
    for number, count in ((signal.SIGKILL, kills), (signal.SIGINT, interrupts)):
        for turn in range(count):
            fresh = turn % 2 == 0
            output = root / (f"new{int(number)}-{turn}" if fresh else f"old{int(number)}")
            if not fresh and not output.exists():
                stopped_write(loaded, "0-2", output, None, number)
            had = state(output, {"0-2", "1,3"})
            text = "1,3" if had == "0-2" else "0-2"
            # every third one in the last moments, where the folder takes its name
            last = turn % 3 == 0
            wait = ("publishing" if last else "start", draw.uniform(0, publishing if last else whole))
            _, status, stages = stopped_write(loaded, text, output, wait, number)
            beside = [p.name for p in output.parent.glob(f".{output.name}.shoal-*")]
            now = state(output, {"0-2", "1,3"})
            results.append({"signal": int(number), "had": had, "wanted": text, "now": now, "status": status,
                            "stages": stages, "beside": len(beside)})  # fmt: skip
    often = root / f"old{int(signal.SIGKILL)}"
    stopped_write(loaded, "0", often, None, signal.SIGKILL)
    final = {"now": state(often, {"0"}), "beside": len(list(root.glob(f".{often.name}.shoal-*")))}
    folder_module._proved = real
    _, status, stages = stopped_write(loaded, "0-2", root / "proving", ("proving", 0.5), signal.SIGINT)
    proving = {"status": status, "stages": stages, "left": len(list(root.glob("*proving*")))}
    return {"results": results, "last": final, "proving": proving, "whole": whole}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
