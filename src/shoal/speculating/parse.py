"""exit:8, skip:0-11,14-29, swift:fraction=0.4,window=24, lookup+exit:8+tree:3x2: drafts as a person types them."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import UsageError
from shoal.plan import Spec, format_steps
from shoal.plan.steps import Step
from shoal.speculating.chooser import Chooser, Finder
from shoal.speculating.masked_draft import Masked
from shoal.speculating.token_tree import TreeShape
from shoal.spelling import chosen


@dataclass(frozen=True)
class ParsedDraft:
    """What drafts: layers, a look into the text, or the second before the first; layers may draft a tree."""

    text: str
    chooser: Chooser | None = None
    finder: Finder | None = None
    tree: TreeShape | None = None

    def says(self, steps: tuple[Step, ...]) -> str:
        """The draft that was used at last: lookup, the steps in depth notation, the tree, or several of them."""
        lookup = ["lookup"] if self.finder is not None else []
        tree = [f"tree:{self.tree.text}"] if self.tree is not None else []
        return "+".join([*lookup, *([format_steps(steps)] if steps else []), *tree])


def parse_draft(text: str, spec: Spec) -> ParsedDraft:
    """KIND, KIND:FIRST-OPTION or KIND:name=value,name=value, joined by + to one of layers, one of lookup and one tree.

    Raises U501 for an unknown kind, U502 for a bad option, U617 for two of one sort, U704 for a tree without layers,
    P1xx for a plan that the model cannot run.
    """
    made: dict[str, Chooser | Finder | TreeShape] = {}
    for piece in text.split("+"):
        one = _made(piece.strip(), spec)
        sort = "tree" if isinstance(one, TreeShape) else "chooser" if isinstance(one, Chooser) else "finder"
        if sort in made:
            raise UsageError(f"{text} drafts twice in the same way; join one kind of layers with lookup", code="U617")
        made[sort] = one
    if "tree" in made and "chooser" not in made:
        raise UsageError(
            f"{text} names a tree and no layers that draft its tokens; join it with a draft of layers, as in "
            "exit:8+tree:3x2",
            code="U704",
        )
    if "tree" in made and isinstance(made["chooser"], Masked):
        raise UsageError(
            f"{text} drafts all its tokens in one pass, so none of them is known when the next is drafted, as a tree "
            "needs it; leave out tree",
            code="U704",
        )
    return ParsedDraft(text, **made)  # type: ignore[arg-type]


def _made(piece: str, spec: Spec) -> Chooser | Finder | TreeShape:
    entry, options = chosen("drafts", piece, lone=True)
    return entry.load()(spec=spec, **options)


Recipe = ParsedDraft
"""The former name, which files of users may import."""
