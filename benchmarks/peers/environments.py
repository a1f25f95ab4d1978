"""A virtual environment for each peer, with the newest versions that pip resolves beside the torch of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

PEERS = ("mergekit", "optipfair", "economize")
_VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True)
class Environment:
    """Where a tool runs."""

    python: Path
    versions: dict[str, str] = field(default_factory=dict)
    """Of the tool, torch and transformers."""
    error: str = ""
    """Why the tool could not be installed, in pip's words."""


def built(folder: Path, peer: str) -> Environment:
    """The environment of `peer` under `folder`, made when it is not there. Nothing is upgraded in one that is."""
    home = folder / peer
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    if python.exists():
        with suppress(subprocess.CalledProcessError):
            return Environment(python, versions_in(python, peer))
    venv.create(home, with_pip=True)
    pins = folder / "constraints.txt"
    pins.write_text(f"torch=={version('torch').partition('+')[0]}\n", encoding="utf-8")
    # torch first: a peer's own requirement could choose a larger build of it
    for what in ("torch", peer):
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", what, "-c", str(pins)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return Environment(python, error=lines[-1] if lines else f"pip ended with {done.returncode}")
    return Environment(python, versions_in(python, peer))


def own() -> Environment:
    """The environment that runs this, which holds Shoal and judges."""
    from shoal import __version__

    found = {"shoal": __version__, "torch": version("torch"), "transformers": version("transformers")}
    return Environment(Path(sys.executable), found)


def versions_in(python: Path, tool: str) -> dict[str, str]:
    """Of the tool, torch and transformers."""
    command = [str(python), "-c", _VERSIONS, tool, "torch", "transformers"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    found: dict[str, str] = json.loads(done.stdout)
    return found
