"""What layers see and make while data passes: states, parts, attention maps."""
