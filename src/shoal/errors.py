"""Every error a user can cause: one sentence that names the thing and the remedy, and a code to cite."""

from __future__ import annotations

import warnings


class ShoalError(Exception):
    """Base of all errors that are the user's to mend; the CLI prints the message alone and exits with 1."""

    code = "E000"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.code}: {super().__str__()}"


class NotationError(ShoalError):
    """A depth notation or plan file that cannot be read."""

    code = "N001"


class PlanError(ShoalError):
    """A plan that is not legal for its model (codes P1xx, see `shoal.plan.check`)."""

    code = "P100"


class WriteError(ShoalError):
    """A plan that a stock class cannot express, or a folder that cannot be written (codes W2xx)."""

    code = "W200"


class ModelError(ShoalError):
    """A model that cannot be found, read or understood (codes M3xx)."""

    code = "M300"


class DataError(ShoalError):
    """Text that is missing, empty or too short (codes D4xx)."""

    code = "D400"


class UsageError(ShoalError):
    """An option or a name that does not exist (codes U5xx)."""

    code = "U500"


class ShoalNote(UserWarning):
    """What is worth a word about an input and stops nothing; the CLI prints it on stderr."""


def note(text: str) -> None:
    """Say `text` as a `ShoalNote`."""
    warnings.warn(text, ShoalNote, stacklevel=3)


def first_line(error: Exception, most: int = 200) -> str:
    """The first line of what another library says, for a sentence of ours; its class where it says nothing."""
    said = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
    lines = said.strip().splitlines()
    return lines[0].strip()[:most] if lines else type(error).__name__


_FULL = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "failed to allocate")
"""How torch, its allocators, accelerate and the system say that memory is full."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether another library says that memory is full, of a device or of the machine."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in _FULL)


def out_of_memory(error: Exception) -> UsageError:
    """U631, with what may be done about it."""
    return UsageError(
        f"there is not enough memory ({first_line(error)}); spread the model over devices and disk with --device-map "
        "auto, or leave its layers in their files with --stream, or take shorter sequences, a smaller batch or another "
        "--dtype",
        code="U631",
    )


class ShoalWarning(ShoalNote):
    """Something that was given or done and has no effect, or another than one might think; nothing is refused."""

    code = "U655"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.code}: {super().__str__()}"


def tell_unused(what: str, why: str) -> None:
    """Warn (U655) that `what`, as `--data` or `data=my.txt`, changes nothing, and why."""
    warnings.warn(ShoalWarning(f"{what} has no effect here, as {why}; leave it out", code="U655"), stacklevel=3)
