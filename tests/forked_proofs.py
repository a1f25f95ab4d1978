"""The processes that prove folders, forked from one that has imported torch and transformers already.

Each proof in the suite asks for a fresh Python, and its imports take longer than all that a tiny model is asked. Here
one process for each worker imports them once, with the command and environment that the first proof gave, and forks for
every proof: the same file answers, in a process of its own that has never seen Shoal. Tests of `tests/real` and
`tests/slow`, and those with the marker `fresh`, start their processes as users do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_run = subprocess.run

PARENT = """
import importlib.util, json, os, sys
import safetensors.torch, transformers.generation
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
spec = importlib.util.spec_from_file_location("proof_child", sys.argv[1])
proof_child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(proof_child)
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    request, scratch, errors, environment = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(scratch)
        nothing, file = os.open(os.devnull, os.O_RDWR), os.open(errors, os.O_WRONLY | os.O_CREAT)
        for number, new in ((0, nothing), (1, nothing), (2, file)):
            os.dup2(new, number)
        code = 1
        try:
            proof_child.main(request)
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
"""


READ_BY_IMPORTS = ("ATEN_", "HF_", "HUGGINGFACE", "LD_", "MKL_", "OMP_", "PYTHON", "TRANSFORMERS_")
"""Beginnings of the names of variables that libraries look at when they are imported; a proof with other values gets a
Python of its own. All other variables are set in the fork."""


class ForkedProofs:
    """Stands in for `subprocess.run`; every other command goes on to it."""

    def __init__(self) -> None:
        self._parent: subprocess.Popen[str] | None = None
        self._read: dict[str, str] | None = None
        self.fresh = False
        """Whether the proofs of the test that is running start a Python of their own."""

    def run(self, command: Sequence[Any], *args: Any, **options: Any) -> Any:
        """What `subprocess.run` returns."""
        mine = hasattr(os, "fork") and len(command) == 4 and str(command[2]).endswith("proof_child.py")
        if self.fresh or not mine:
            return _run(command, *args, **options)
        read = {key: value for key, value in options["env"].items() if key.startswith(READ_BY_IMPORTS)}
        if self._read not in (None, read):
            return _run(command, *args, **options)
        script, request = map(str, command[2:])
        if self._parent is None:
            self._read = read
            self._parent = subprocess.Popen(
                [sys.executable, "-P", "-c", PARENT, script],
                env=options["env"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        errors = Path(options["cwd"]) / "stderr.txt"
        line = json.dumps([request, str(options["cwd"]), str(errors), options["env"]])
        print(line, file=self._parent.stdin, flush=True)
        code = int(self._parent.stdout.readline())
        return subprocess.CompletedProcess(command, code, None, errors.read_bytes())

    def close(self) -> None:
        """End the process that forks."""
        if self._parent is not None:
            self._parent.communicate()


FORKED = ForkedProofs()
