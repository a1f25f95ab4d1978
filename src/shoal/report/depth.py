"""The page of a depth trace: the text that was written, each token shaded by the layers that it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.report.formatting import esc, number, percent
from shoal.report.page import document
from shoal.report.sections import facts_list, section
from shoal.report.tables import cell, numeric, table

Data = Mapping[str, Any]
SHADES = 7
"""Steps of the shade: more could not be told apart."""

# the deepest shade leaves the text a contrast of more than 4.5 on it, in both colour schemes
_CSS = "<style>" + "".join(
    f".k{n}{{background:color-mix(in srgb,var(--kept) {round(55 * n / (SHADES - 1))}%,var(--back));"
    f"border-bottom:{1 + 0.75 * n:g}px solid var(--kept)}}"
    for n in range(SHADES)
) + """
.written{font-size:1.12rem;line-height:2.3;max-width:54rem;overflow-wrap:anywhere;white-space:pre-wrap}
.written span{color:var(--text);border-radius:3px 3px 0 0;padding:.12em 0 .06em;box-decoration-break:clone;
-webkit-box-decoration-break:clone;margin-right:1px}
.written span:hover{outline:2px solid var(--removed)}
.written .given{color:var(--soft);border:0}
.shades{list-style:none;display:flex;flex-wrap:wrap;gap:.5rem 1rem;padding:0;margin:.8rem 0}
.shades b{font-weight:400;padding:.1em .7em;margin-right:.4em}
label.numbers{cursor:pointer}.given::after{content:" \\21e8  ";color:var(--removed)}
#numbers:checked~.written span[data-n]::after{content:attr(data-n);font-size:.62em;vertical-align:super;
margin-left:.1em;font-variant-numeric:tabular-nums}
@media print{.written span[data-n]::after{content:attr(data-n);font-size:.62em;vertical-align:super}}
</style>"""  # fmt: skip


def render_depth(data: Data) -> str:
    """The trace as one self-contained HTML page.

    title, command, version, policy, prompt: text. layers: the layers of the plan. written: [{text, layers,
    confidence}], one for each generated token, confidence None where it is not known. facts: {name: text}. Every text
    is escaped; depth is said by shade, by the thickness of the line under a token, by numbers on demand and by a table.
    """
    written: Sequence[Data] = data["written"]
    whole = float(data["layers"])
    mean = sum(one["layers"] for one in written) / len(written) if written else whole
    tiles = (
        _tile("Layers per token", f"{mean:.2f}", f"of {whole:g}, {percent(whole, mean)}")
        + _tile("Tokens written", number(len(written)), f"{sum(one['layers'] < whole for one in written)} left early")
    )  # fmt: skip
    head = (
        f'<header><p class="eyebrow">Shoal depth trace</p><h1>{esc(data["title"])}</h1>'
        f'<p class="subtitle"><code>{esc(data.get("policy", ""))}</code></p><dl class="tiles">{tiles}</dl></header>'
    )
    shallow = min([one["layers"] for one in written], default=whole)
    facts = {esc(name): esc(value) for name, value in data.get("facts", {}).items()}
    parts = [
        _CSS,
        section("What was written, and how deep", _text(data, written, shallow, whole)),
        section("How many tokens took how many layers", _counts(written)),
        section("Every token", f"<details><summary>As a table</summary>{_table(written)}</details>"),
        section("How this was made", facts_list(facts | {"Command": f"<code>{esc(data.get('command', ''))}</code>"})),
    ]
    return document(str(data["title"]), head, "".join(parts), data.get("version"))


def shade(layers: float, shallow: float, whole: float) -> int:
    """0 for the shallowest token, SHADES - 1 for one that ran every layer."""
    if whole <= shallow:
        return SHADES - 1
    return round((SHADES - 1) * (layers - shallow) / (whole - shallow))


def _tile(label: str, big: str, line: str) -> str:
    return f'<div class="tile"><dt>{label}</dt><dd class="big">{big}</dd><dd>{line}</dd></div>'


def _text(data: Data, written: Sequence[Data], shallow: float, whole: float) -> str:
    given = f'<span class="given">{esc(data.get("prompt", ""))}</span>'
    tokens = "".join(_token(one, shallow, whole) for one in written)
    note = (
        '<p class="soft">The stronger the shade of a token and the thicker its line, the more layers ran to write it; '
        "point at a token for its figures.</p>"
    )
    return (
        f'{note}{_legend(shallow, whole)}<label class="numbers" for="numbers">Show the number of layers at each token: '
        f'</label><input type="checkbox" id="numbers"><div class="written">{given}{tokens}</div>'
    )


def _token(one: Data, shallow: float, whole: float) -> str:
    shown = one["text"] or "\N{MIDDLE DOT}"
    sure = "" if one.get("confidence") is None else f", confidence {one['confidence']:.2f}"
    part = "" if one["text"] else ", part of the next character"
    layers = f"{one['layers']:g}"
    return (
        f'<span class="k{shade(one["layers"], shallow, whole)}" data-n="{layers}" '
        f'title="{layers} of {whole:g} layers{sure}{part}">{esc(shown)}</span>'
    )


def _legend(shallow: float, whole: float) -> str:
    steps = SHADES if whole > shallow else 1
    places = [shallow + (whole - shallow) * n / max(steps - 1, 1) for n in range(steps)]
    shown = dict.fromkeys(round(place) for place in places)
    items = "".join(f'<li><b class="k{shade(place, shallow, whole)}">Aa</b>{place} layers</li>' for place in shown)
    return f'<ul class="shades" aria-label="Legend">{items}</ul>'


def _counts(written: Sequence[Data]) -> str:
    found = Counter(one["layers"] for one in written)
    top = max(found.values(), default=1)
    rows = [
        numeric(_whole(layers))
        + numeric(count)
        + cell(
            f'<svg class="bars" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect y="1" width="{100 * count / top:.1f}" height="10" style="fill:var(--kept)"/></svg>'
        )
        for layers, count in sorted(found.items())
    ]
    return table(["layers", "tokens", ""], rows, right=(0, 1))


def _whole(layers: float) -> float:
    """Layers without decimals, unless a half was left out."""
    return int(layers) if layers == int(layers) else layers


def _table(written: Sequence[Data]) -> str:
    rows = [
        numeric(place)
        + cell(f"<code>{esc(one['text'])}</code>")
        + numeric(_whole(one["layers"]))
        + numeric(one.get("confidence"))
        for place, one in enumerate(written, 1)
    ]
    return table(["token", "text", "layers", "confidence"], rows, right=(0, 2, 3), sortable=True)
