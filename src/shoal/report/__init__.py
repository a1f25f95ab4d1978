"""Plain data in, one self-contained HTML page out. Imports nothing of Shoal but `shoal.plan` and `shoal.errors`."""

from shoal.report.comparison import render_comparison
from shoal.report.page import render

__all__ = ["render", "render_comparison"]
