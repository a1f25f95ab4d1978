"""The one grammar of NAME:key=value,...: what is read, what is written, and that the two agree."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UsageError
from shoal.spelling import Spelled, chosen, read

KEYS = st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True)
PLAIN = st.text("abz019.-_+:=~/,; ", max_size=12)


def _separate(value: str) -> bool:
    """Whether a value holds nothing that would begin another option, and no blank or separator at its ends."""
    return re.search(r"[,;]\s*[\w-]+\s*=", value) is None and value == value.strip(" ,;")


VALUES = PLAIN.filter(_separate)
LONE = PLAIN.filter(lambda text: _separate(text) and "=" not in text)
NAMES = st.from_regex(r"[a-z][a-z-]{0,8}|\./[a-z]+\.py", fullmatch=True)
SPELLED = st.builds(Spelled, NAMES, st.lists(st.tuples(KEYS, VALUES), max_size=4).map(tuple)) | st.builds(
    Spelled, NAMES, lone=LONE
)


@given(SPELLED)
def test_what_is_written_is_read_back(spelled: Spelled) -> None:
    assert read(str(spelled)) == spelled


@given(SPELLED.filter(lambda one: one.options))
def test_semicolons_say_the_same_as_commas(spelled: Spelled) -> None:
    text = f"{spelled.name}:" + " ; ".join(f"{key} = {value}" for key, value in spelled.options)
    assert read(text) == spelled


@given(st.text(max_size=30) | st.text("ab:=,; \x85", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        spelled = read(text)
    except UsageError:
        assert ":" in text
        return
    assert read(str(spelled)) == spelled


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exit", Spelled("exit")),
        (" exit ", Spelled("exit")),
        ("exit:8", Spelled("exit", lone="8")),
        ("skip:0-11,14-29", Spelled("skip", lone="0-11,14-29")),
        ("exit:confidence=0.9", Spelled("exit", (("confidence", "0.9"),))),
        ("skip:listed=3-5,7", Spelled("skip", (("listed", "3-5,7"),))),
        ("skip:listed=3-5,7,when=prompt", Spelled("skip", (("listed", "3-5,7"), ("when", "prompt")))),
        ("swift:fraction=0.4;window=24", Spelled("swift", (("fraction", "0.4"), ("window", "24")))),
        ("skip:at=1,2;window=24", Spelled("skip", (("at", "1,2"), ("window", "24")))),
        ("exit:,confidence=0.9,,by=margin,", Spelled("exit", (("confidence", "0.9"), ("by", "margin")))),
        ("exit:confidence=,by=margin", Spelled("exit", (("confidence", ""), ("by", "margin")))),
        ("calibrated:at=14:0.97+20:0.8", Spelled("calibrated", (("at", "14:0.97+20:0.8"),))),
        ("calibrated:file=/a;b.json", Spelled("calibrated", (("file", "/a;b.json"),))),
        ("./mine.py:x=1", Spelled("./mine.py", (("x", "1"),))),
    ],
)
def test_texts(text: str, expected: Spelled) -> None:
    assert read(text) == expected


def test_options_can_be_added() -> None:
    assert str(read("exit:by=margin").having(confidence=1)) == "exit:by=margin,confidence=1"
    assert str(read("exit").having(head="base")) == "exit:head=base"


def test_the_registry_gives_names_and_types() -> None:
    entry, own = chosen("methods", "position:which=first")
    assert entry.name == "position" and own == {"which": "first"}
    assert chosen("drafts", "exit:2", lone=True)[1] == chosen("drafts", "exit:layer=2")[1] == {"layer": 2}


@pytest.mark.parametrize(
    ("text", "code", "why"),
    [
        ("position:", "U502", "gives no option; write position or position:key=value"),
        ("position: ", "U502", "gives no option"),
        ("positon", "U501", "did you mean position"),
        ("position:whch=first", "U502", "did you mean which"),
        ("position:which=up", "U502", "which=up is not one of"),
        ("position:first", "U502", "position has no option 'first'"),
        ("", "U501", "there is no method ''"),
    ],
)
def test_mistakes(text: str, code: str, why: str) -> None:
    with pytest.raises(UsageError, match=re.escape(why)) as raised:
        chosen("methods", text)
    assert raised.value.code == code


def test_a_plan_with_ties_is_a_value_and_no_option() -> None:
    assert read("skip:0-1,2=1,3") == Spelled("skip", lone="0-1,2=1,3")
    assert read("skip:keep=0-1,2=1,length=3") == Spelled("skip", (("keep", "0-1,2=1"), ("length", "3")))


def test_a_lone_value_may_stand_in_front_of_options() -> None:
    assert read("exit:0,A,fill=mask") == Spelled("exit", (("fill", "mask"),), "0,A")
    assert read(":0,A,A=") == Spelled("", (("A", ""),), "0,A")
    assert str(read("exit:8,fill=mask")) == "exit:8,fill=mask"
