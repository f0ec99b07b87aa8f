"""`fflfast bench train`: how fast a cohort trains here, beside a naive loop and beside its networks alone."""

from __future__ import annotations

from .measure import Result, Row, measure
from .variants import Variant

__all__ = ["Result", "Row", "Variant", "measure"]
