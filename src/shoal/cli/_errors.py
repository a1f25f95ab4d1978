"""The last door of the command line: what a library raised and nobody expected, as one sentence with a code."""

from __future__ import annotations

import os

from shoal.errors import ShoalError, UsageError, first_line

TRACEBACK = "SHOAL_TRACEBACK"
"""Set to 1, this variable lets errors of Shoal itself through with their traceback."""


def in_words(error: Exception) -> ShoalError | None:
    """The error to print; None for one that should be seen with its traceback.

    U630 the system refuses a file, U631 memory is full, U632 a package cannot be imported, U639 anything else, which is
    a fault of Shoal.
    """
    if isinstance(error, ShoalError):
        return error
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return UsageError(f"the system says: {place}{error.strerror or first_line(error)}", code="U630")
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return UsageError(
            f"there is not enough memory ({first_line(error)}); take shorter sequences, a smaller batch, another "
            "--dtype or --device, or --stream where there is one",
            code="U631",
        )
    if os.environ.get(TRACEBACK) == "1":
        return None
    if isinstance(error, ImportError):
        return UsageError(f"a package cannot be imported: {first_line(error)}; install it", code="U632")
    return UsageError(
        f"{type(error).__name__}: {first_line(error)}; this is a fault of Shoal, please report it with what "
        f"{TRACEBACK}=1 prints in front of the same command",
        code="U639",
    )
