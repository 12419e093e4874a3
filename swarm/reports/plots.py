"""One plot of a run as a PNG, drawn by matplotlib without a display."""

from __future__ import annotations

import io

from swarm.errors import BadData
from swarm.reports.run_report import Plot

_MOST_NAMED = 10
_HOUR = 3600.0
_FEW = 40  # points that are shown one by one


def draw(plot: Plot) -> bytes:
    """The picture, 960 x 420 pixels.

    Raises:
        BadData: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise BadData("a report needs matplotlib; pip install 'swarmtune[report]'") from None
    figure = Figure(figsize=(9.6, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(curve.seconds[-1] for curve in plot.curves)
    scale, unit = (_HOUR, "hours") if longest > 2 * _HOUR else (60.0, "minutes") if longest > 120 else (1.0, "seconds")
    for curve in plot.curves:
        is_dense = len(curve.values) > _FEW
        axes.plot(
            [at / scale for at in curve.seconds],
            list(curve.values),
            marker=None if is_dense else "o",
            markersize=3,
            linewidth=0.8 if is_dense else 1.6,
            alpha=0.6 if is_dense else 1.0,
            zorder=2 if is_dense else 3,
            drawstyle="steps-post" if plot.steps else "default",
            label=curve.label.replace("$", r"\$"),
        )
    axes.set_title(plot.title)
    axes.set_xlabel(unit)
    axes.set_ylabel(plot.unit)
    if plot.steps:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, alpha=0.3)
    if 1 <= len(plot.curves) <= _MOST_NAMED:
        axes.legend(fontsize="small")
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()
