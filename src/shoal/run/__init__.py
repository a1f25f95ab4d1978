"""Running: the conductor, the cache's slots, a live plan, one observing pass."""
