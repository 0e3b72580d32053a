"""The look that all charts and pictures share."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, RULE, LINE = "#1f2933", "#52606d", "#d9dee4", "#0072b2"  # the blue of Okabe and Ito
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "flowalign",  # ids, and so the file, depend on the content alone
}


def svg(figure: "Figure") -> str:
    """The picture, the same bytes for the same content."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
