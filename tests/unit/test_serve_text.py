"""Text in pieces: what a stream hands out is the text, whole characters and no stop sequence, however it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.text import IncrementalDetokenizer, StopStrings

WORDS = (" the", "the", " caf", "é", "")


def as_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def as_words(ids: Sequence[int]) -> str:
    """As sentencepiece does: the space in front of the first word is not there."""
    return "".join(WORDS[i] for i in ids).removeprefix(" ")


def pieces(decode: object, ids: Sequence[int]) -> list[str]:
    made = IncrementalDetokenizer(decode)  # type: ignore[arg-type]
    return [*(made.add(token) for token in ids), made.rest()]


@given(st.binary(max_size=40))
def test_any_bytes_come_out_as_the_whole_text(ids: bytes) -> None:
    assert "".join(pieces(as_bytes, list(ids))) == as_bytes(list(ids))


@given(st.text(alphabet="aé€😀\n", max_size=20))
def test_no_character_is_broken(text: str) -> None:
    ids = list(text.encode())
    made = pieces(as_bytes, ids)
    assert "".join(made) == text
    assert not any("\ufffd" in piece for piece in made)
    assert len(made) == len(ids) + 1 and sum(map(bool, made)) == len(text)  # each as soon as its last byte is there


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=12))
def test_a_word_keeps_the_space_in_front_of_it(ids: list[int]) -> None:
    assert "".join(pieces(as_words, ids)) == as_words(ids)


def letter_by_letter(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text up to the stop sequence that is complete first."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(st.data())
def test_stop_sequences_are_found_wherever_the_text_is_cut(data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="ab\n", max_size=16))
    stops = data.draw(st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    finder = StopStrings(stops)
    said = [finder.add(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = finder.found
    assert ("".join(said) + finder.rest(), found) == letter_by_letter(text, stops)


@pytest.mark.parametrize(
    ("cut", "said"),
    [(["x ", "E", "N", "Dx"], ["x ", "", "", ""]), (["x E", "N", "o"], ["x ", "", "ENo"]), (["xEND"], ["x"])],
)
def test_what_may_be_a_stop_sequence_is_held_back_and_nothing_else(cut: list[str], said: list[str]) -> None:
    finder = StopStrings(["END"])
    assert [finder.add(piece) for piece in cut] == said
