"""Caches of transformers' own kind whose rows are compressed after the prefill, and how a plan is fitted to them."""
