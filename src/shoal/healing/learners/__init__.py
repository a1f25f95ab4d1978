"""Which tensors move, one selection a file; found by the file name."""
