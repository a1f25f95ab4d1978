"""Unlimited OCR: a KV cache that keeps the prompt and a window over what was written, in tensors of its own."""

from shoal.models.families import Family

FAMILY = Family(
    types=("unlimited_ocr_text",),
    refused="its layers keep the prompt beside a window over what was written, in tensors that no other cache has",
)
