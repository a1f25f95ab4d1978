"""The verbs that compose several rooms: measure, prune, evaluate, bench."""
