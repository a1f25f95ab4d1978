"""A live model that runs a plan: the executor, its KV cache, and the model's way back to what it was."""
