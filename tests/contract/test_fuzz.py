"""A few inputs for every reader; `python -m tests.fuzz.run` drives the same readers with 100,000."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from shoal.errors import ModelError, ShoalError
from shoal.registry import entries

from ..fuzz.folders import judge
from ..fuzz.mutate import near
from ..fuzz.run import Watch
from ..fuzz.targets import ROWS, targets

SLOW = ("inspect", "doctor:config", "doctor:index", "doctor:header")
NAMES = (
    "config",
    "index",
    "header",
    "plan.json",
    "policy.json",
    "notation",
    *SLOW,
    *(f"exchange:{n}" for n in entries("exchange")),
    *(f"data:{n}" for n in ROWS),
)


def test_every_reader_is_driven() -> None:
    assert set(targets()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_knows_documented_errors_alone(name: str) -> None:
    target = targets()[name]

    @settings(max_examples=4 if name in SLOW else 25, database=None, suppress_health_check=list(HealthCheck))
    @given(near(target.seeds))
    def read(data: bytes) -> None:
        with suppress(ShoalError):
            target.run(data)

    read()


@pytest.mark.filterwarnings("ignore")  # stock transformers is asked about broken folders too
def test_a_damaged_folder_is_refused_or_right(tmp_path: Path) -> None:
    counts = Counter[str]()
    assert [wrong for number in range(16) if (wrong := judge(number, 0, tmp_path, counts)) is not None] == []
    assert counts["written"] >= 4
    assert counts.total() == 16


def test_a_reader_that_breaks_is_caught(tmp_path: Path) -> None:
    def read(data: bytes) -> None:
        if data == b"documented":
            raise ModelError("one sentence", code="M307")
        if data == b"slow":
            while True:
                pass
        if data == b"broken":
            raise KeyError(data)

    watch = Watch("planted", read, tmp_path, 0.1)
    for data in (b"fine", b"documented"):
        watch(data)
    assert not watch.failures
    for data in (b"slow", b"broken", b"broken"):
        watch(data)
    assert watch.counts == {"inputs": 5, "read": 1, "M307": 1, "failures": 3}
    assert sorted(kind.partition(" ")[0] for kind in watch.failures.values()) == ["KeyError", "longer"]
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {b"slow", b"broken"}
