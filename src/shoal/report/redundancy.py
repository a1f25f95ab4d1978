"""The page of `shoal inspect --redundancy`: for each yardstick a map of how far apart every two layers are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.report.formatting import esc, finite, number
from shoal.report.heat_map import alike, heat_map
from shoal.report.page import document
from shoal.report.sections import facts_list, section

Data = Mapping[str, Any]
_MEANS = {
    "Weights": "The share of one layer's matrices that is left when the other's, each times its best factor, are taken "
    "away. What is far from 0 everywhere has no matrices that could be tied as they are.",
    "Hidden states": "One minus the centred kernel alignment of the states in front of the layers (the last is the "
    "output). A square of strong colour on the diagonal is a span that changes little but for a rotation.",
    "Keys and values": "One minus the cosine of what the cache holds of the same token, mean of keys and values. Pairs "
    "near 0 could share one slot.",
    "Attention maps": "The divergence of the maps, heads averaged. A square of strong colour is a span whose layers "
    "look at the same tokens and could take over one map.",
}


def render_redundancy(data: Data) -> str:
    """One self-contained HTML page of `Redundancy.to_dict()` with title, created, command, version (text) and facts
    ({name: text}) added. Every text is escaped."""
    head = (
        f'<header><p class="eyebrow">Shoal redundancy · {esc(data.get("created", ""))}</p>'
        f"<h1>{esc(data['title'])}</h1>"
        '<p class="lede">Each cell is two layers: the stronger the colour, the nearer they are. Each map has a scale '
        "of its own, from 0 to its largest distance. That two layers are alike says what could be shared, not that one "
        "can go.</p></header>"
    )
    maps = f'<div class="pairs">{"".join(map(_map, data["maps"]))}</div>'
    facts = {esc(name): esc(value) for name, value in data.get("facts", {}).items()}
    made = facts_list(facts | {"Command": f"<code>{esc(data.get('command', ''))}</code>"})
    return document(
        str(data["title"]),
        head,
        section("Every two layers", maps) + section("How this was made", made),
        data.get("version"),
    )


def _map(one: Data) -> str:
    name = str(one["name"])
    said = f"<h3>{esc(name)}</h3>"
    if not one["matrix"]:
        return f'<figure>{said}<p class="soft">Not compared: {esc(one["why_not"])}</p></figure>'
    apart = [
        known
        for i, row in enumerate(one["matrix"])
        for j, v in enumerate(row)
        if i != j and (known := finite(v)) is not None
    ]
    title = f"{name}: how far apart every two layers are ({one['unit']})"
    drawn = heat_map(one["matrix"], alike(max(apart, default=1.0)), title=title, unit=str(one["unit"]))
    pairs = ", ".join(f"{i} and {j} ({number(value, 5)})" for i, j, value in one["nearest"])
    return f"<figure>{said}{drawn}<figcaption>{esc(_MEANS.get(name, ''))} Nearest: {esc(pairs)}.</figcaption></figure>"
