"""What lies beside a model in its files: layers that predict tokens further ahead, and what loading leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shoal.models.diagnosis.layers import Layers

_SHOWN = 3


def carried_layers(layers: Layers) -> dict[str, str]:
    """{name in a repaired checkpoint: name in the files} of the tensors of layers beside the model's: they follow the
    last layer, as they did."""
    first = len(layers.numbers)
    return {
        f"{layers.prefix}{first + place}{tail}": f"{layers.prefix}{number}{tail}"
        for place, number in enumerate(sorted(layers.beside))
        for tail in layers.beside[number]
    }


def notes_of(layers: Layers, counts: Mapping[str, int], silent: Sequence[str]) -> Iterator[str]:
    """A sentence for the layers beside the model's, and one for what transformers leaves out when it loads.

    `counts`: the keys that announce such layers; `silent`: the files' tensors that are left out without a word.
    """
    beside = [f"{layers.prefix}{number}" for number in sorted(layers.beside)]
    if beside:
        why = ", ".join(f"{name} is {count}" for name, count in counts.items()) or "no layer holds such tensors"
        yield (
            f"{listed(beside)}: beside the model's layers, to predict tokens further ahead ({why}); transformers and a "
            "write leave it out, a repair carries it"
        )
    starts = tuple(f"{one}." for one in beside)
    others = [file for file in silent if not file.startswith(starts)]
    if others:
        yield f"transformers leaves out when it loads: {listed(others)}"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
