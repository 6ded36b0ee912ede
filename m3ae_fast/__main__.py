"""python -m m3ae_fast: the command line."""

from m3ae_fast.cli import main

raise SystemExit(main())
