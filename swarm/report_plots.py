"""One plot of a run as a PNG, drawn by matplotlib without a display."""

from __future__ import annotations

import io

from swarm.errors import BadData
from swarm.run_report import Plot

_MOST_NAMED = 10
_HOUR = 3600.0


def draw(plot: Plot) -> bytes:
    """The picture, 960 x 420 pixels.

    Raises:
        BadData: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BadData("a report needs matplotlib; pip install 'swarmtune[report]'") from None
    figure = Figure(figsize=(9.6, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(curve.seconds[-1] for curve in plot.curves)
    scale, unit = (_HOUR, "hours") if longest > 2 * _HOUR else (60.0, "minutes") if longest > 120 else (1.0, "seconds")
    for curve in plot.curves:
        axes.plot(
            [at / scale for at in curve.seconds],
            list(curve.values),
            marker="o" if len(curve.values) < 40 else None,
            markersize=3,
            linewidth=1.4,
            drawstyle="steps-post" if plot.steps else "default",
            label=curve.label.replace("$", r"\$"),
        )
    axes.set_title(plot.title)
    axes.set_xlabel(unit)
    axes.set_ylabel(plot.unit)
    axes.grid(visible=True, alpha=0.3)
    if 1 <= len(plot.curves) <= _MOST_NAMED:
        axes.legend(fontsize="small")
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()
