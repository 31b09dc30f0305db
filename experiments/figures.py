"""The figures of the experiments: one pair of axes with units, readable at 700 pixels' width.

    with figure("gain.png", "steps", "Frechet distance (digits-cnn)") as axes:
        curve(axes, [1, 2, 4], [20.1, 14.9, 9.7], [0.9, 0.7, 0.5], "student")

Needs matplotlib, which the project needs for nothing else.
"""
import contextlib
from pathlib import Path


@contextlib.contextmanager
def figure(path, xlabel, ylabel):
    """Axes to draw on; afterwards they are saved as the PNG `path`, with a legend of their labels.

    Say the unit in xlabel and ylabel. Raises ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    made = Figure(figsize=(7, 4.2), dpi=100)
    FigureCanvasAgg(made)  # not pyplot: no window, no state that is left behind
    axes = made.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)

    yield axes

    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    made.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path)


def curve(axes, x, mean, error, label):
    """A line through the means with error bars; error: half the height of a bar, or None."""
    axes.errorbar(x, mean, error, label=label, marker="o", markersize=4, capsize=3, linewidth=1.5)
