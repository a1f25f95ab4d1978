"""Side by side: the same layers dropped from the same checkpoints by mergekit, optipfair, economize and Shoal."""
