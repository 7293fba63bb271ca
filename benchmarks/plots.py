"""The two plots of a training result, as small SVG files that are the same whenever the result is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart (Okabe and Ito, 2008); bf16 shares its method's, in dashes.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#555555", "marker": "o", "linestyle": "-"},
    "sgd-bf16": {"color": "#555555", "marker": "D", "linestyle": (0, (4, 2))},
    "sam": {"color": "#0072B2", "marker": "s", "linestyle": "-"},
    "esam": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    "esam-bf16": {"color": "#D55E00", "marker": "v", "linestyle": (0, (4, 2))},
}


def accuracy_over_time(result: dict[str, Any], path: Path) -> None:
    """Test accuracy against seconds of training: mean of the finished seeds, shaded from the lowest to the highest."""
    with _axes(path, f"{_title(result)}: accuracy over training time") as ax:
        for name, method in result["methods"].items():
            curves = [curve for curve in result["curves"][name] if len(curve) == method["epochs"]]
            seconds = np.cumsum([[epoch["seconds"] for epoch in curve] for curve in curves], axis=1).mean(axis=0)
            accuracy = np.array([[epoch["test_accuracy"] for epoch in curve] for curve in curves])
            color, linestyle = STYLES[name]["color"], STYLES[name]["linestyle"]
            ax.plot(seconds, accuracy.mean(axis=0), color=color, linestyle=linestyle, label=method["label"])
            ax.fill_between(seconds, accuracy.min(axis=0), accuracy.max(axis=0), color=color, alpha=0.12, linewidth=0)
        # The early epochs, far below, would squeeze what matters.
        final = [method["test_accuracy_mean"] for method in result["methods"].values()]
        bottom = max(0, min(100 - 5 * (100 - min(final)), max(final) - 1))
        ax.set_ylim(bottom, max(final) + 0.1 * (max(final) - bottom))
        ax.set(xlabel="training time, seconds", ylabel="test accuracy, %")


def accuracy_over_cost(result: dict[str, Any], path: Path) -> None:
    """Test accuracy against the time of a step: bars span a standard deviation each way, and the quartiles."""
    with _axes(path, f"{_title(result)}: what a step costs and buys") as ax:
        for name, method in result["methods"].items():
            cost = method["time_over_sgd"] or method["seconds_per_step"]
            style = {**STYLES[name], "linestyle": "none"}
            ax.errorbar(
                cost["median"],
                method["test_accuracy_mean"],
                xerr=[[cost["median"] - cost["low"]], [cost["high"] - cost["median"]]],
                yerr=method["test_accuracy_std"],
                label=method["label"],
                markersize=9,
                markerfacecolor="white" if name.endswith("bf16") else style["color"],
                capsize=3,
                **style,
            )
        unit = "times SGD's" if "sgd" in result["methods"] else "seconds"
        ax.set(xlabel=f"time of a step, {unit}", ylabel="test accuracy, %")


def _title(result: dict[str, Any]) -> str:
    return f"{result['data']}, {result['settings']['model']}"


@contextmanager
def _axes(path: Path, title: str) -> Iterator[Axes]:
    """Axes of a new figure, which is written to ``path`` at the end."""
    style: Any = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "svg.hashsalt": "esam_kernels",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        ax = figure.subplots()
        ax.set_title(title, loc="left")
        yield ax
        figure.legend(loc="outside lower center", ncols=3)
        figure.savefig(path, metadata={"Date": None})
