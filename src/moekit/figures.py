"""Pictures are drawn by matplotlib, without a window; where it is missing, one line says so."""

from __future__ import annotations

from typing import Any

from moekit.errors import MissingExtraError

__all__ = ["new_figure"]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib `Figure` of so many inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", extra="train") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
