"""Layers in a checkpoint that are none of the model's: they predict tokens further ahead, and loading leaves them out.

DeepSeek-V3, GLM-4.5, Kimi K2, MiMo and others keep them behind the last layer, under the next number, and a key of
config.json counts them. Nothing here knows their names: what tells is that key, what transformers leaves out when it
loads, and tensors for which no layer of the model has a place.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from shoal.models.depth import depth_of
from shoal.models.renaming import Renamed, renamed, state_shapes

_AHEAD = re.compile(r"nextn|next_n|(^|_)mtp(_|$)|next_token")
_COUNT = re.compile(r"(^|_)(num|n|layers|modules)(_|$)")
_MOST = 16
"""Layers that a key may announce; a larger number is a size."""


def announced(config: Mapping[str, Any]) -> dict[str, int]:
    """{key: number} of the keys of a config, as plain data, that count layers which predict tokens further ahead, such
    as num_nextn_predict_layers, num_mtp_modules or mtp_num_hidden_layers; those that say 0 are left out."""
    return {
        name: value
        for name, value in config.items()
        if type(value) is int and 0 < value <= _MOST and _AHEAD.search(name) and _COUNT.search(name)
    }


def announced_by(config: PreTrainedConfig) -> dict[str, int]:
    """`announced` of a config object: of its text part, else of the whole."""
    text = config.get_text_config(decoder=True)
    return announced(vars(text)) or announced(vars(config))


def beside_layers(
    model: PreTrainedModel, prefix: str, found: Mapping[str, Renamed], depth: int, count: int
) -> tuple[int, ...]:
    """The numbers in the files that are no layers of the model, ascending; always the last ones.

    `model`: of any depth of the family; `prefix`: what stands before a number; `found`: where each tensor of the files
    belongs; `depth`: the layers that the config says; `count`: how many more it announces. Two witnesses have to agree.
    The config says no layer of these numbers, or just as many layers without them; and they hold tensors that have no
    place in any layer, or transformers leaves all of theirs out, or the config announces them.
    """
    by_number: dict[int, list[str]] = defaultdict(list)
    for file in found:
        number = number_of(file, prefix)
        if number is not None:
            by_number[number].append(file)
    numbers = sorted(by_number)
    placeless = _Placeless(model, prefix, found)
    some = _last(numbers, lambda n: any(placeless(file) for file in by_number[n]))
    if some and (len(numbers) - len(some) == depth or min(some) >= depth):
        return some
    silent = _last(numbers, lambda n: n >= depth and all(found[file].ignored for file in by_number[n]))
    if silent:
        return silent
    if count and len(numbers) - count == depth:
        return tuple(numbers[-count:])
    return _last(numbers, lambda n: depth <= n < depth + count)


def _last(numbers: list[int], wanted: Callable[[int], bool]) -> tuple[int, ...]:
    """The numbers at the end that are all `wanted`; none when that would be every number."""
    found = tuple(reversed(list(takewhile(wanted, reversed(numbers)))))
    return found if len(found) < len(numbers) else ()


class _Placeless:
    """Has a tensor of a layer no place in any layer of the model?"""

    def __init__(self, model: PreTrainedModel, prefix: str, found: Mapping[str, Renamed]) -> None:
        self._model, self._prefix, self._found = model, prefix, found
        self._state = state_shapes(model)
        placed = {file for file, one in found.items() if one.name is not None and number_of(file, prefix) is not None}
        self._known = dict.fromkeys((self._tail(file) for file in placed), False)
        text = model.config.get_text_config(decoder=True)
        self._depth = max(1, depth_of(text) or 1)

    def __call__(self, file: str) -> bool:
        if self._found[file].ignored:
            return False
        tail = self._tail(file)
        if tail not in self._known:
            tried = renamed(self._model, [f"{self._prefix}{i}{tail}" for i in range(self._depth)], self._state)
            self._known[tail] = not any(one.name is not None or one.ignored for one in tried.values())
        return self._known[tail]

    def _tail(self, file: str) -> str:
        return file[len(self._prefix) + len(str(number_of(file, self._prefix))) :]


def number_of(file: str, prefix: str) -> int | None:
    """The number behind `prefix` in the name of a tensor."""
    number, dot, _ = file[len(prefix) :].partition(".") if file.startswith(prefix) else ("", "", "")
    plain = dot and number.isascii() and number.isdecimal() and len(number) < 7 and number == str(int(number))
    return int(number) if plain else None
