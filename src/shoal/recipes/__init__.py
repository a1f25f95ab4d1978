"""Healing recipes, one composition of stages a file; found by the file name."""
