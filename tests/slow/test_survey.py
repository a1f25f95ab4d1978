"""The whole surveys: no model type of the installed transformers may be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest


def survey(module: str, types: Iterable[str]) -> list[str]:
    """The lines of the survey `module` over `types`, from a process of its own, which starts no threads before it
    forks. Fails when one of them is wrong."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", module, *types],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src")},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0, [line for line in lines if "wrong:" in line]
    return lines


@pytest.mark.timeout(1800)
def test_no_type_is_wrong() -> None:
    from ..survey.survey import types

    assert sum(" right" in line for line in survey("tests.survey.survey", types())) >= 150


@pytest.mark.timeout(1800)
def test_no_other_kind_is_wrong() -> None:
    """Encoders, encoder-decoders and vision models."""
    from ..survey.overrides_kinds import TYPES

    right = {line.split()[0] for line in survey("tests.survey.kinds", TYPES) if line.count(" right") == 5}
    assert len(right) >= 15


@pytest.mark.timeout(1800)
def test_no_model_that_reads_pictures_is_wrong() -> None:
    from ..survey.pictures import types

    lines = survey("tests.survey.pictures", types())
    assert sum(" right" in line and "picture: yes" in line for line in lines) >= 20
