"""Other tools' files that say which layers stay, one file a format: each reads to a plan and writes from one.

A format is known by its file's name: `shoal.registry.get("exchange", "mergekit").load()()` is its `Format`.
"""
