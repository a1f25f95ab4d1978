"""A measure, method, policy, ... in a Python file of the user's own, named as `./mine.py`.

The file `mine.py` defines the function `mine`, which keeps to the contract of its kind. It is run as a module of its
own, under a name that holds the hash of its text, so that an edited file is another module. Results name the file and
the hash.

U516 no such file                    U517 no function of that name, or one that cannot be called as its kind is
U518 not a Python program            U519 raises an error while it is imported
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from shoal.errors import UsageError

SUFFIX = ".py"


@dataclass(frozen=True, slots=True)
class UserFile:
    """A file as it was read; what it says later is another file."""

    name: str
    """As the user typed it."""
    path: str
    """In full."""
    text: str = field(repr=False)

    @property
    def sha256(self) -> str:
        """Of its text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def function(self) -> str:
        """The function that it must define."""
        return Path(self.path).stem.replace("-", "_")

    @property
    def module(self) -> str:
        """The name under which it is imported."""
        return f"shoal_user_file_{self.sha256[:16]}_{self.function}"

    def to_dict(self) -> dict[str, str]:
        """What a record says of it."""
        return {"path": self.name, "sha256": self.sha256}


_sent: dict[str, UserFile] = {}
"""In a process that works for another one: the files of that process, by name."""
_used: dict[str, UserFile] = {}
"""Those that were asked for since `forget_used`, by name, as they were read last."""


def is_file(name: str) -> bool:
    """Whether `name` is that of a Python file, and not a registered one."""
    return name.endswith(SUFFIX)


def read_user_file(name: str) -> UserFile:
    """The file of that name, its text read anew. Raises U516 when there is none, U518 when it is no UTF-8 text."""
    found = _sent.get(name)
    if found is None:
        path = Path(name).expanduser()
        try:
            found = UserFile(name, str(path.resolve()), path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"cannot read the file {name!r:.80}: {error.strerror}; give a {SUFFIX} file that defines the function "
                f"{path.stem.replace('-', '_')}, or a name that shoal ls lists",
                code="U516",
            ) from None
        except UnicodeDecodeError:
            raise UsageError(f"{name} is not UTF-8 text; save it as such", code="U518") from None
    _used[name] = found
    return found


def used_files() -> tuple[dict[str, str], ...]:
    """Path and sha256 of every file that was asked for since `forget_used`."""
    return tuple(file.to_dict() for file in _used.values())


def forget_used() -> None:
    """Begin a new list of used files: a command names its own only."""
    _used.clear()


def known_files() -> tuple[UserFile, ...]:
    """The files to hand to a process that works for this one; see `adopt`."""
    return tuple((_sent | _used).values())


def adopt(files: Iterable[UserFile]) -> None:
    """Take these for what their names mean, whatever this machine's disk holds, and import them."""
    for file in files:
        _sent[file.name] = file
        imported(file)


def docstring(file: UserFile) -> str:
    """That of its function, else its own. Raises U518 for what is no Python, with the line; U517 without the
    function."""
    try:
        tree = ast.parse(file.text, file.name)
    except (SyntaxError, ValueError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(f"{file.name}{line} is not Python: {said}; correct it", code="U518") from None
    named = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if file.function not in named:
        others = f"; it defines {', '.join(named)}" if named else ""
        raise UsageError(
            f"{file.name} defines no function {file.function}{others}; give the function the file's name", code="U517"
        )
    return ast.get_docstring(named[file.function]) or ast.get_docstring(tree) or ""


def imported(file: UserFile) -> ModuleType:
    """The file as a module, run once. Raises U519 when it raises, with the line in it."""
    if file.module in sys.modules:
        return sys.modules[file.module]
    module = ModuleType(file.module)
    module.__file__ = file.path
    sys.modules[file.module] = module  # before it runs: dataclasses look their module up
    try:
        exec(compile(file.text, file.path, "exec"), module.__dict__)  # noqa: S102 - the user named the file to be run
    except Exception as error:
        del sys.modules[file.module]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file.path]
        where = f" in line {lines[-1]}" if lines else ""
        message = f"{file.name} cannot be imported: {type(error).__name__}{where}: {error}; correct it"
        raise UsageError(message, code="U519") from error
    return module


def require_call(file: UserFile, kind: str, values: tuple[str, ...], keywords: tuple[str, ...]) -> None:
    """Raise U517 unless its function takes these positional values and keywords, and needs nothing else but options."""
    form = f"{file.function}({', '.join([*values, '*', *(f'{name}=...' for name in keywords)]).removesuffix(', *')})"
    function = getattr(imported(file), file.function)
    try:
        bound = inspect.signature(function).bind_partial(*values, **dict.fromkeys(keywords))
    except TypeError as error:
        raise _unfit(file, kind, form, str(error)) from None
    for name, parameter in inspect.signature(function).parameters.items():
        if _needed(parameter) and name not in bound.arguments:
            raise _unfit(file, kind, form, f"its parameter {name} would have no value")


def _needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind in (
        parameter.POSITIONAL_ONLY,
        parameter.POSITIONAL_OR_KEYWORD,
    )


def _unfit(file: UserFile, kind: str, form: str, why: Any) -> UsageError:
    return UsageError(
        f"{file.function} in {file.name} is no {kind}, which is called as {form}: {why}; change its parameters",
        code="U517",
    )
