"""Measures whose work is handed out: shares of a text, texts and measures side by side give what one process gives."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal.api.measuring import measure_several
from shoal.evaluation.cluster_resources import Cluster
from shoal.models.load import Loaded, load
from shoal.registry import entries
from shoal.scores import Traits

from .planted import random_data
from .test_api import model_folder

TEXTS = [random_data(5, 16), random_data(3, 12, seed=1)]


def is_alone(name: str) -> bool:
    traits: Traits = getattr(importlib.import_module(entries("measures")[name].module), "TRAITS", Traits())
    return traits.alone


ALONE = sorted(filter(is_alone, entries("measures")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder, device="cpu")


class Pool:
    """Processes as `Machines` has them, in this one: the last that was asked answers first."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.asked = worker, list[Any]()

    def anywhere(self, jobs: Sequence[Sequence[Any]]) -> Iterator[Any]:
        self.asked += [job[1][0] for job in jobs]
        return (self.worker.do(*job) for job in reversed(jobs))


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Pool]:
    made: list[Pool] = []

    @contextmanager
    def machines(cluster: Cluster, make: Any, loaded: Loaded, rest: Any) -> Iterator[Pool]:
        made.append(Pool(make(loaded, rest)))
        yield made[-1]

    monkeypatch.setattr("shoal.api.measuring_apart.machines", machines)
    return made


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ALONE)
def test_shares_of_a_text_give_what_the_text_gives(name: str, batch: int, loaded: Loaded, pools: list[Pool]) -> None:
    asked: dict[str, Any] = {"data": TEXTS[:1], "batch": batch}
    there = measure_several(loaded, [name], **asked, cluster=Cluster("local", 2))
    here = measure_several(loaded, [name], **asked)
    assert there == here and pools[0].asked == [name, name]
    assert there.scores[name].samples == here.scores[name].samples


def test_measures_and_texts_run_side_by_side(loaded: Loaded, pools: list[Pool]) -> None:
    names = ["block-influence", "magnitude", "loss-removed"]
    asked: dict[str, Any] = {"data": TEXTS, "stability": True}
    assert repr(measure_several(loaded, names, **asked, cluster=Cluster("local", 2))) == repr(
        measure_several(loaded, names, **asked)
    )
    assert pools[0].asked == ["block-influence"] * 2 + ["magnitude"] * 2 + ["loss-removed"] * 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray; runs where it is installed")
@pytest.mark.parametrize("stream", [False, True])
def test_processes_of_ray_measure_the_same(folder: Path, loaded: Loaded, stream: bool) -> None:
    names, source = ["block-influence", "kl-removed"], load(folder, device="cpu", stream=stream)
    there = measure_several(source, names, data=TEXTS, cluster=Cluster("local", 2))
    assert there == measure_several(loaded, names, data=TEXTS)
