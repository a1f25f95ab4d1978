"""Branches of a model that is called step after step: computed anew, or as they were a step ago (docs/reuse.md)."""
