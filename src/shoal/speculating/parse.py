"""exit:8, skip:0-11,14-29, swift:fraction=0.4,window=24, lookup+exit:8: drafts as a person types them."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import UsageError
from shoal.plan import Spec, format_steps
from shoal.plan.steps import Step
from shoal.speculating.chooser import Chooser, Finder
from shoal.spelling import chosen


@dataclass(frozen=True)
class ParsedDraft:
    """What drafts: layers, a look into the text, or the second before the first."""

    text: str
    chooser: Chooser | None = None
    finder: Finder | None = None

    def says(self, steps: tuple[Step, ...]) -> str:
        """The draft that was used at last: lookup, the steps in depth notation, or both."""
        return "+".join([*(["lookup"] if self.finder is not None else []), *([format_steps(steps)] if steps else [])])


def parse_draft(text: str, spec: Spec) -> ParsedDraft:
    """KIND, KIND:FIRST-OPTION or KIND:name=value,name=value, joined by + to one of layers and one of lookup.

    Raises U501 for an unknown kind, U502 for a bad option, U617 for two of one sort, P1xx for a plan that the model
    cannot run.
    """
    chooser: Chooser | None = None
    finder: Finder | None = None
    for piece in text.split("+"):
        made = _made(piece.strip(), spec)
        if (chooser if isinstance(made, Chooser) else finder) is not None:
            raise UsageError(f"{text} drafts twice in the same way; join one kind of layers with lookup", code="U617")
        if isinstance(made, Chooser):
            chooser = made
        else:
            finder = made
    return ParsedDraft(text, chooser, finder)


def _made(piece: str, spec: Spec) -> Chooser | Finder:
    entry, options = chosen("drafts", piece, lone=True)
    return entry.load()(spec=spec, **options)


Recipe = ParsedDraft
"""The former name, which files of users may import."""
