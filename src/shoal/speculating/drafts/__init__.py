"""Kinds of draft, one file each: found by their file name, as `shoal ls drafts` shows."""
