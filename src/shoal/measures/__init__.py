"""Importance measures, one file each: (model, data) -> Scores; the lowest is removable."""
