"""The commands of README and docs, run as they are written; `python -m tests.documented` prints the list."""
