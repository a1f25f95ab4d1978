"""What stand-ins and merges share: both streams of states side by side, least squares from sums, exact folds."""
