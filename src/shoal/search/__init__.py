"""Searches, one file each: scores or an objective -> a plan within a budget."""
