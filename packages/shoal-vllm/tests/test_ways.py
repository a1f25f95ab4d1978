"""Compiled, tensor parallel and pipeline parallel: the tokens of transformers, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from shoal_vllm.greedy import SETTINGS

from .conftest import Case

NOBIND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""Two workers on few cores: no worker is bound to cores that another one has."""
ALL = ("identity", "dropped", "parts", "loop", "tied", "shared-kv", "map", "relaxed", "everything")
WAYS = {
    "compiled": ({"enforce_eager": False}, ("loop", "everything")),
    "tensor parallel": ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, ALL),
    # eager, 0.32 has no pipeline on a CPU for any model: it makes the tensors between stages when it warms up
    "pipeline parallel": (
        {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False},
        ("parts", "loop", "shared-kv", "everything"),
    ),
}
"""Options of vLLM, and the plans that are tried; compiling takes a minute for each."""
CASES = [pytest.param(way, kind, id=f"{way}-{kind}") for way, (_, kinds) in WAYS.items() for kind in kinds]


def answer(case: Case, **options: Any) -> tuple[dict[str, Any], str]:
    """What `python -m shoal_vllm.greedy` answers, and what its workers print: engines of several processes leave theirs
    behind in the one that started them."""
    job = {
        "folders": [str(case.folder)],
        "prompts": case.said["prompts"],
        "tokens": len(case.said["tokens"][0]),
        "options": {"dtype": "float32", "enable_prefix_caching": False} | options,
    }
    done = subprocess.run(
        [sys.executable, "-m", "shoal_vllm.greedy"], input=json.dumps(job), capture_output=True, text=True,
        env=os.environ | SETTINGS | NOBIND, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)[0]
    return found, done.stderr


@pytest.mark.parametrize(("way", "kind"), CASES)
def test_tokens_and_scores_are_those_of_transformers(way: str, kind: str) -> None:
    case = Case(f"llama/{kind}")
    found, printed = answer(case, **WAYS[way][0])
    if way == "pipeline parallel" and kind in ("shared-kv", "everything"):
        # vLLM's own sentence says that a worker failed; the worker's says why
        assert "error" in found and "is on another pipeline stage" in printed and "(W304)" in printed
        return
    assert "error" not in found, found
    assert case.same(found)
    assert case.furthest(found) < 1e-3
