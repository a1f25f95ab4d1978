"""Caches that compress rows, one file each: (job) -> the rows of one cache, empty and in the plan's order."""
