"""GPT-1 slices nothing and keeps plain modules in its list."""

from shoal.models.families import Family

FAMILY = Family(types=("openai-gpt",), stack_path="transformer.h")
