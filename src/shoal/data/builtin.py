"""The text that needs no download: the language reference that Python ships as `pydoc_data.topics`, split by topic."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping

from shoal.errors import DataError

# Test first: where topics quote each other, the text stays in the split that must not have been seen before.
SPLITS = {"test": range(80, 100), "tune": range(60, 80), "calibrate": range(60)}


def builtin_text(split: str) -> str:
    """The paragraphs of one split (`calibrate`, `tune`, `test`, or `whole` for all three), joined by blank lines.

    Raises `DataError` D402 where the interpreter was installed without its documentation data.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python has no pydoc_data, the built-in text; name a text file", code="D402") from None
    parts = split_topics(topics)
    return "\n\n".join(parts[name] for name in reversed(SPLITS)) if split == "whole" else parts[split]


def builtin_name() -> str:
    """The source name, with the Python version because each version ships another text."""
    return f"builtin (Python {'.'.join(platform.python_version_tuple()[:2])})"


def split_topics(topics: Mapping[str, str]) -> dict[str, str]:
    """Cut `topics` into three texts by a hash of the topic's name: 60 % calibrate, 20 % tune, 20 % test of the names.

    Topics quote each other (`compound` holds `if`, `for`, `try` in full), so a paragraph is kept only where it occurs
    first, in the order test, tune, calibrate; otherwise two fifths of the tune text would be calibration text.
    """
    seen: set[str] = set()
    texts = {}
    for split, buckets in SPLITS.items():
        kept = []
        for topic in sorted(topics):
            if _bucket(topic) in buckets:
                kept += _fresh(topics[topic], seen)
        texts[split] = "\n\n".join(kept)
    return texts


def _bucket(topic: str) -> int:
    return int.from_bytes(hashlib.sha256(topic.encode()).digest()[:8], "big") % 100


def _fresh(text: str, seen: set[str]) -> list[str]:
    """The paragraphs of `text` that are not in `seen` yet, which grows by them."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = paragraph.strip()
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph.strip("\n"))
    return kept
