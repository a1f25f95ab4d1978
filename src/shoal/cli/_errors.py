"""The last door of the command line: what a library raised and nobody expected, as one sentence with a code."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError, UsageError, first_line, is_out_of_memory, out_of_memory

TRACEBACK = "SHOAL_TRACEBACK"
"""Set to 1, this variable lets errors of Shoal itself through with their traceback."""


def refuse_nul(options: Mapping[str, Any]) -> None:
    """Raise U645 for a value with a NUL character, which no system takes in a name and a config file can hold."""
    for name, value in options.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, str | Path) and "\0" in str(one):
                option = name.rstrip("_").replace("_", "-")
                raise UsageError(
                    f"{option} is {str(one)!r:.200}, with a NUL character, which no name has; leave it out",
                    code="U645",
                )


def shortened(text: str) -> str:
    """The sentence with its longest words, which are names of files that no system takes, cut in their middle."""
    return re.sub(r"\S{300,}", lambda word: f"{word[0][:160]}...{word[0][-20:]}", text)


def in_words(error: Exception) -> ShoalError | None:
    """The error to print; None for one that should be seen with its traceback.

    U630 the system refuses a file, U631 memory is full, U632 a package cannot be imported, U646 the home of a user who
    is not there, U639 anything else, which is a fault of Shoal.
    """
    if isinstance(error, ShoalError):
        return error
    if is_out_of_memory(error):
        return out_of_memory(error)
    if isinstance(error, OSError):
        place = f"{str(error.filename)[:200]}: " if error.filename else ""
        return UsageError(f"the system says: {place}{error.strerror or first_line(error)}", code="U630")
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return UsageError("a name begins with ~ and a user who is not known here; give the full path", code="U646")
    if os.environ.get(TRACEBACK) == "1":
        return None
    if isinstance(error, ImportError):
        return UsageError(f"a package cannot be imported: {first_line(error)}; install it", code="U632")
    return UsageError(
        f"{type(error).__name__}: {first_line(error)}; this is a fault of Shoal, please report it with what "
        f"{TRACEBACK}=1 prints in front of the same command",
        code="U639",
    )
