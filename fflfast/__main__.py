"""python -m fflfast."""

from __future__ import annotations

from fflfast.cli import main

raise SystemExit(main())
