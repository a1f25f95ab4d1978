"""Policies, and the executor that asks them while the model runs: gates, exits, and what the KV cache is given."""
