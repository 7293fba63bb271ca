"""The plots of training results, as small SVG files that are the same whenever the result is."""

from collections.abc import Collection, Iterator
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


def loss_around_minimum(result: dict[str, Any], path: Path) -> None:
    """The loss's rise around the trained weights, up the gradient and along random directions, mean of the seeds."""
    distances = [0.0, *result["sharpness"]["distances"]]
    directions = {"gradient_rise": "up the gradient", "random_rise": "random directions"}
    with _panels(path, f"{_title(result)}: training loss around the trained weights", directions.values()) as axes:
        for ax, rise in zip(axes, directions):
            for name, seeds in result["sharpness"]["seeds"].items():
                if seeds:
                    rises = np.mean([[0.0, *seed[rise]] for seed in seeds], axis=0)
                    ax.plot(distances, rises, label=result["methods"][name]["label"], **STYLES[name])
            ax.set(xlabel="distance from the weights", ylabel="rise of the loss")
            ax.ticklabel_format(axis="y", scilimits=(-3, 4))


def frontier(result: dict[str, Any], path: Path) -> None:
    """Test accuracy against the cost of training, at equal epochs with the Pareto front, and at equal time.

    What falls far below SGD would squeeze the rest: it stands at the lower edge, with its accuracy.
    """
    configurations = result["configurations"]
    panels = {"equal_epochs": "equal epochs, with the Pareto front", "equal_time": "equal training time"}
    with _panels(path, f"{_title(result)}: what accuracy costs", panels.values()) as axes:
        for ax, panel in zip(axes, panels):
            shown = {name: one[panel] for name, one in configurations.items() if one[panel]}
            accuracy = {name: runs["test_accuracy"]["mean"] for name, runs in shown.items()}
            cost = {name: configurations[name]["training_time_over_sgd"] for name in shown}
            bottom = 0.0
            if "sgd" in shown:
                ax.axhline(accuracy["sgd"], color=STYLES["sgd"]["color"], linewidth=0.8, linestyle=":")
                bottom = accuracy["sgd"] - max(1.0, max(accuracy.values()) - accuracy["sgd"])
            for number, (name, one) in enumerate(configurations.items(), 1):
                if name not in shown:
                    continue
                color = STYLES[name.partition("-")[0]]["color"]
                marker: dict[str, Any] = {
                    "marker": f"${number}$",
                    "markersize": 5 if number < 10 else 9,
                    "linestyle": "none",
                }
                height = max(accuracy[name], bottom)
                ax.plot(cost[name], height, color=color, label=one["label"], clip_on=False, **marker)
                if accuracy[name] >= bottom:
                    deviation = shown[name]["test_accuracy"]["std"]
                    ax.errorbar(cost[name], height, yerr=deviation, color=color, alpha=0.3, capsize=2)
                else:
                    place: dict[str, Any] = {"rotation": 90, "ha": "center", "transform": ax.get_xaxis_transform()}
                    ax.text(cost[name], 0.04, f"{accuracy[name]:.0f} %", color=color, **place)
            front = sorted((cost[name], accuracy[name]) for name, runs in shown.items() if runs.get("on_front"))
            if front:
                ax.step(*zip(*front), where="post", color="#009E73", linewidth=1.2, zorder=0)
            if bottom > 0:
                ax.set_ylim(bottom=bottom)
            ax.set(xlabel="training time at equal epochs, times SGD's", ylabel="test accuracy, %")


def _title(result: dict[str, Any]) -> str:
    return f"{result['data']}, {result['settings']['model']}"


@contextmanager
def _axes(path: Path, title: str) -> Iterator[Axes]:
    """Axes of a new figure, which is written to ``path`` at the end."""
    with _panels(path, title, [""]) as (ax,):
        yield ax


@contextmanager
def _panels(path: Path, title: str, names: Collection[str]) -> Iterator[list[Axes]]:
    """Axes side by side in a new figure with one legend for all, which is written to ``path`` at the end."""
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
        figure = Figure(figsize=(6.4, 4) if len(names) == 1 else (5 * len(names), 5), layout="constrained")
        axes = list(figure.subplots(1, len(names), squeeze=False)[0])
        for ax, name in zip(axes, names):
            ax.set_title(name, loc="left", fontsize="medium")
        if len(names) == 1:
            axes[0].set_title(title, loc="left")
        else:
            figure.suptitle(title, x=0.01, horizontalalignment="left")
        yield axes
        entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=3)
        figure.savefig(path, metadata={"Date": None})
