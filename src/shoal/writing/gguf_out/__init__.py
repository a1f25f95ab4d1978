"""A plan as one GGUF file: copied from another GGUF file block by block, or converted from a transformers model."""
