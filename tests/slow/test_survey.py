"""The whole surveys: no model type of the installed transformers may be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(1800)
def test_no_type_is_wrong() -> None:
    """In a process of its own, which starts no threads before it forks."""
    from ..survey.survey import types

    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.survey.survey", *types()],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src")},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    red = [line for line in done.stderr.splitlines() if "wrong:" in line]
    assert done.returncode == 0, red
    assert sum(" right" in line for line in done.stderr.splitlines()) >= 150


@pytest.mark.timeout(1800)
def test_no_other_kind_is_wrong() -> None:
    """Encoders, encoder-decoders and vision models, in a process of their own too."""
    from ..survey.overrides_kinds import TYPES

    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.survey.kinds", *TYPES],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src")},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    red = [line for line in done.stderr.splitlines() if "wrong:" in line]
    assert done.returncode == 0, red
    right = {line.split()[0] for line in done.stderr.splitlines() if line.count(" right") == 5}
    assert len(right) >= 15


@pytest.mark.timeout(1800)
def test_no_model_that_reads_pictures_is_wrong() -> None:
    """In a process of its own too."""
    from ..survey.pictures import types

    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.survey.pictures", *types()],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src")},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    red = [line for line in done.stderr.splitlines() if "wrong:" in line]
    assert done.returncode == 0, red
    assert sum(" right" in line and "picture: yes" in line for line in done.stderr.splitlines()) >= 20
