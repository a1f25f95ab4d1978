"""Every command and block of Python of README and docs runs as it is written there, on tiny stand-ins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from shoal.cli import app

from ..documented.place import build
from ..documented.run import run_page
from ..documented.standins import COMPLETE, NOT_RUN, REFUSED, SLOW
from ..documented.texts import ROOT, Command, commands, pages, python_blocks, without_fence
from .shares import only

WRITTEN = {page: commands(page) for page in pages()}
SHOWN = [page for page, own in WRITTEN.items() if own or python_blocks(page)]

LONG = (
    "docs/adapters.md", "docs/calibration.md", "docs/data.md", "docs/doctor.md", "docs/dynamic.md", "docs/heal.md",
    "docs/standins.md",
)  # fmt: skip
"""Pages that take longer than all others but the README; they run with -m slow."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("documented"))


@pytest.mark.parametrize("page", only({*SHOWN} - {*LONG}, SHOWN))
def test_what_a_page_shows_runs(page: str, place: Path) -> None:
    outcomes = list(run_page(page, place))
    print("\n".join(map(str, outcomes)))  # noqa: T201 - the list of what ran, shown by pytest -rA
    assert not [str(one) for one in outcomes if not one.right]
    assert outcomes


@pytest.mark.slow
@pytest.mark.timeout(3600)  # README compares all methods
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, when it compiles
@pytest.mark.parametrize("page", SHOWN)
def test_what_takes_long_runs_too(page: str, place: Path) -> None:
    outcomes = list(run_page(page, place, slow=True))
    assert not [str(one) for one in outcomes if not one.right]


def test_a_command_stands_in_a_fence_where_it_is_found() -> None:
    assert {page: found for page in pages() if (found := without_fence(page))} == {}


def test_the_table_speaks_of_commands_that_are_there() -> None:
    """What no page says any more, nobody must keep alive in the table."""
    texts = {one.text for own in WRITTEN.values() for one in own}
    assert {*COMPLETE, *REFUSED, *SLOW} <= texts
    assert all(any(re.match(start, text) for text in texts) for start in NOT_RUN)
    assert sum(text.startswith("shoal ") for text in texts) > 70


def test_every_option_that_a_page_names_is_there() -> None:
    verbs = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {name for verb in verbs for own in verb.params for name in (*own.opts, *own.secondary_opts)} | {"--help"}
    for page in SHOWN:
        if page != "examples":
            text = (ROOT / page).read_text(encoding="utf-8")
            named = {
                found for code in re.findall(r"`(--[^`]+)`", text) for found in re.findall(r"(?<!\S)--[a-z-]+", code)
            }
            assert named <= known | OTHERS, f"{page}: {named - known - OTHERS}"


OTHERS = {"--first", "--seconds", "--no-deps", "--prune-layers", "--lens", "--shape", "--train", "--only", "--rates"}
"""Options of other programs that the pages name."""


def test_a_line_that_a_shell_takes_apart_is_found() -> None:
    assert Command("page", 1, "shoal show '0-3;4'").words == ["shoal", "show", "0-3;4"]
    for text in ("shoal show 0-3;4", "shoal ls | head", "shoal show (7|8)", "shoal ls > file"):
        with pytest.raises(ValueError, match="quote it"):
            _ = Command("page", 1, text).words
