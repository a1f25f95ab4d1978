"""Tokens in the terminal, coloured by how many layers they took while they are written."""

from __future__ import annotations

from typing import Any

from shoal.errors import UsageError

# from orange (shallow) over grey to blue (all layers): readable on black and on white, and to colour-blind readers
COLOURS = (166, 172, 137, 102, 67, 32, 26)


def require_policy(policy: str | None, wanted: bool) -> None:
    """Raise U608 for a trace of a model on which nothing is decided."""
    if wanted and policy is None:
        raise UsageError(
            "without a policy every token takes the same layers, so there is nothing to trace; add --policy",
            code="U608",
        )


class Painter:
    """Prints each token as it comes. Where there are no colours, the layers of a token that left early stand behind it
    in brackets."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.whole = 0.0

    def __call__(self, one: Any) -> None:
        from rich.text import Text

        self.whole = max(self.whole, one.layers)
        coloured = self.console.color_system is not None
        left = not coloured and one.layers < self.whole
        shown = f"{one.text}[{one.layers:g}]" if left else one.text
        self.console.print(Text(shown, style=self.style(one.layers) if coloured else ""), end="")

    def style(self, layers: float) -> str:
        """The first token runs every layer; half of them or fewer have the first colour."""
        share = 2 * layers / self.whole - 1 if self.whole else 1.0
        place = round(max(0.0, min(1.0, share)) * (len(COLOURS) - 1))
        return f"color({COLOURS[place]})"

    def legend(self) -> None:
        """What the colours mean."""
        from rich.text import Text

        said = Text("\n\n")
        if self.console.color_system is None:
            said.append(f"[n]: the layers of a token that took fewer than {self.whole:g}")
        else:
            said.append("layers: ")
            for layers in dict.fromkeys(round(self.whole * (1 + n / 6) / 2) for n in range(7)):
                said.append(f" {layers} ", style=self.style(layers))
        self.console.print(said)
