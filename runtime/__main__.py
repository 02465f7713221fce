"""``python -m stylemuse``: the command line."""

from .cli import main

raise SystemExit(main())
