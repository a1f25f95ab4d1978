"""`python -m tests.documented [--quick] [PAGE ...]`: every command and block of the pages, and what became of it."""

from .run import main

raise SystemExit(main())
