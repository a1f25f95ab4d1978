"""One process runs all engines, and its settings have to stand before vLLM is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from shoal_vllm.greedy import SETTINGS, greedy

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
FOLDERS = Path(os.environ.get("SHOAL_VLLM_FOLDERS", "build/vllm-folders"))
"""What make_folders.py has written."""


class Case:
    """A folder, and what transformers computes from it."""

    def __init__(self, place: str) -> None:
        self.folder = FOLDERS / place
        self.said = json.loads(self.folder.with_suffix(".json").read_text())
        self.scores = load_file(self.folder.with_suffix(".scores"))

    def run(self, **options: Any) -> dict[str, Any]:
        """Greedy tokens under vLLM in float32."""
        given = {"dtype": "float32", "enable_prefix_caching": False} | options
        return greedy(str(self.folder), self.said["prompts"], len(self.said["tokens"][0]), **given)

    def same(self, found: dict[str, Any]) -> bool:
        """Whether all tokens are those of transformers."""
        return bool(found["tokens"] == self.said["tokens"])

    def furthest(self, found: dict[str, Any]) -> float:
        """The largest difference of a log-probability, up to the first other token."""
        worst = 0.0
        for number, (made, right) in enumerate(zip(found["tokens"], self.said["tokens"], strict=True)):
            for step, scores in enumerate(found["scores"][number]):
                if made[:step] != right[:step]:
                    break
                for token, score in scores.items():
                    worst = max(worst, abs(score - float(self.scores[str(number)][step][int(token)])))
        return worst


def families() -> list[str]:
    """The families that there are folders of."""
    if not FOLDERS.is_dir():
        pytest.exit(f"there is no {FOLDERS}; run make test-vllm, or make_folders.py in Shoal's environment", 2)
    return sorted(one.name for one in FOLDERS.iterdir() if (one / "plain").is_dir())
