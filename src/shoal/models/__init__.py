"""Models: loaded, found, probed and described; the exceptions of families are data."""
