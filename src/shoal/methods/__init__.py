"""Published systems, one file each, as compositions of a measure and a search."""
