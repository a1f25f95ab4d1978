"""Inputs near valid ones: bytes of a seed changed, or values of its JSON changed."""

from __future__ import annotations

import json
import struct
from typing import Any

from hypothesis import strategies as st

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    31,
    300,
    10**6,
    2**31,
    2**63,
    2**70,
    -(2**63),
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "0",
    "../x",
    "/etc/passwd",
    "model.safetensors",
    "full_attention",
    "sliding_attention",
    "\x00",
    "\ud800",
    [],
    {},
    [[]],
    [0],
    [None],
    {"": None},
    ["full_attention"] * 2,
    ["x"] * 300,
)
WORDS = (
    b"[",
    b"{" * 50,
    b"[" * 5000,
    b"\xff",
    b"\x00" * 8,
    b"9" * 30,
    b"9" * 5000,
    b'"',
    b",",
    b"-",
    b"e",
    b"NaN",
    b"&a ",
    b"*a ",
    b"!!",
    b"\n- ",
    b": ",
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        here = todo.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        found += [(here, key) for key in keys]
        todo += [here[key] for key in keys]
    return found


def _changed(value: Any, draw: Any) -> Any:
    """The JSON value with up to 4 of its places changed, taken away or doubled."""
    for _ in range(draw(st.integers(1, 4))):
        places = _places(value)
        if not places:
            return draw(st.sampled_from(ODD))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.integers(0, 4)):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw(st.sampled_from(("", "x", "text_config", "num_hidden_layers", "quantization_config")))] = (
                    holder[key]
                )
            case 2 if isinstance(holder, list):
                holder.insert(key, holder[key])
            case 3:
                other, name = places[draw(st.integers(0, len(places) - 1))]
                if not _holds(other, holder):
                    value_there = (
                        other[name] if name in (other if isinstance(other, dict) else range(len(other))) else None
                    )
                    holder[key] = json.loads(json.dumps(value_there))
            case _:
                holder[key] = json.loads(json.dumps(draw(st.sampled_from(ODD))))
    return value


def _holds(whole: Any, part: Any) -> bool:
    return whole is part


def _bytes(seed: bytes, draw: Any) -> bytes:
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(data))))
        match draw(st.integers(0, 3)):
            case 0:
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                data[place : place + draw(st.integers(1, 30))] = b""
            case 2:
                data[place:place] = draw(st.sampled_from(WORDS))
            case _:
                end = place + draw(st.integers(1, 40))
                data[place:place] = data[place:end]
    return bytes(data)


@st.composite
def near(draw: Any, seeds: tuple[bytes, ...]) -> bytes:
    """Bytes near one of `seeds`."""
    seed = draw(st.sampled_from(seeds))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind > 5:
        return _bytes(seed, draw)
    start, text = b"", seed
    if seed[8:9] == b"{" and not seed.startswith(b"{"):  # a safetensors file: its header is JSON behind 8 bytes
        (length,) = struct.unpack("<Q", seed[:8])
        start, text = seed[8 + length :], seed[8 : 8 + length]
    try:
        made = json.dumps(_changed(json.loads(text), draw)).encode("utf-8", errors="surrogatepass")
    except ValueError:
        return _bytes(seed, draw)
    return struct.pack("<Q", len(made)) + made + start if start or text is not seed else made
