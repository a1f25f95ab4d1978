"""mergekit's `scale` on the last matrix of a part: read where a plan says the same, else refused with the reason."""

from __future__ import annotations

import pytest

from .test_exchange import read, refusal, slices

SCALED = """[2, 4]
    parameters:
      scale:
      - filter: {}
        value: 0.0
      - value: 1.0"""
EXPANDED = SCALED.format("o_proj\n        value: 0.0\n      - filter: down_proj")


def scaled(name: str, old: str = "", new: str = "") -> str:
    return slices("[0, 8]", SCALED.format(name).replace(old, new))


@pytest.mark.parametrize(("name", "expected"), [("o_proj", "0-7,2-3m"), ("down_proj", "0-7,2-3a")])
def test_a_part_whose_last_matrix_is_zero_does_not_run(name: str, expected: str) -> None:
    assert read("mergekit", scaled(name)) == expected
    of_slice = scaled(name).replace("    parameters:\n      scale:\n      -", "  parameters:\n    scale:\n      -")
    assert read("mergekit", of_slice) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (slices("[0, 8]", EXPANDED), "block expansion: its layers add nothing until they are trained"),
        (slices("[0, 8]", EXPANDED), "write the file without that slice for a plan that computes the same"),
        (scaled("q_proj"), "'parameters' ('scale') in slice 1"),
        (scaled("o_proj", "value: 0.0", "value: 0.5"), "'parameters' ('scale') in slice 1"),
        (scaled("o_proj", "value: 1.0", "value: 0.7"), "'parameters' ('scale') in slice 1"),
        (scaled("o_proj", "value: 0.0", "value: [0, 1]"), "'parameters' ('scale') in slice 1"),
        (scaled("o_proj", "value: 0.0", "value: false"), "'parameters' ('scale') in slice 1"),
    ],
)
def test_any_other_scale_is_refused(text: str, said: str) -> None:
    assert said in refusal("mergekit", text)
