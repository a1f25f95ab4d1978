"""`python -m shoal` is the command line, for starters that take a module: `torchrun -m shoal heal ...`."""

from shoal.cli import main

main()
