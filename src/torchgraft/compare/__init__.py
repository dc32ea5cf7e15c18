"""Methods side by side on one task: equal budgets, several seeds, the spread beside the mean."""

from __future__ import annotations

from torchgraft.compare.record import Cell, Comparison, Row
from torchgraft.compare.run import Moment, try_

__all__ = ["Cell", "Comparison", "Moment", "Row", "try_"]
