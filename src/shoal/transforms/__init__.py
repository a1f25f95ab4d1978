"""What stands in for removed layers, and what merges them: one file each, found by its name."""
