"""What every row has in common that holds less than it was given."""

from __future__ import annotations

from typing import NoReturn

from transformers.cache_utils import DynamicLayer

from shoal.errors import PlanError


class CompressedRow(DynamicLayer):
    """A row of a KV cache, which transformers sees as one that grows."""

    is_croppable = False
    supports_early_init = False
    tokens: int
    """Tokens that were written, held or not."""
    token_size = 0
    """Numbers that one token brought, all sequences together."""

    @property
    def whole(self) -> int:
        """Numbers that a plain row would hold."""
        return self.tokens * self.token_size

    def get_seq_length(self) -> int:
        return self.tokens

    def crop(self, tokens_to_remove: int) -> NoReturn:
        refuse_crop()


def refuse_crop() -> NoReturn:
    """Raise P161: whoever takes tokens back writes others in their place."""
    raise PlanError(
        "tokens cannot be taken back out of a compressing KV cache; generate without a draft or an assistant",
        code="P161",
    )
