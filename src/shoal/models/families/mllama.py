"""Mllama: layers that attend to a picture stand among the decoder's, and are called only when there is one."""

from shoal.models.families import Family

FAMILY = Family(
    types=("mllama_text_model",),
    refused="its cross-attention layers run only with a picture, so text says nothing of them, and its loop looks for "
    "what they keep in rows of the KV cache that a plan would move",
)
