"""The plots of training results, as small SVG files that are the same whenever the result is."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..record import whole
from .tables import PANELS, sound_curves

# Colours that the colour-blind can tell apart (Okabe and Ito, 2008); bf16 shares its method's, in dashes.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#555555", "marker": "o", "linestyle": "-"},
    "sgd-bf16": {"color": "#555555", "marker": "D", "linestyle": (0, (4, 2))},
    "sam": {"color": "#0072B2", "marker": "s", "linestyle": "-"},
    "sam-own": {"color": "#0072B2", "marker": "s", "linestyle": "-"},
    "sam-foreach": {"color": "#0072B2", "marker": "D", "linestyle": (0, (4, 2))},
    "momentum": {"color": "#009E73", "marker": "P", "linestyle": "-"},
    "previous": {"color": "#009E73", "marker": "X", "linestyle": (0, (4, 2))},
    "share-quarter": {"color": "#CC79A7", "marker": "<", "linestyle": "-"},
    "sam-tail0.2": {"color": "#CC79A7", "marker": ">", "linestyle": (0, (4, 2))},
    "nesterov": {"color": "#555555", "marker": "p", "linestyle": (0, (1, 2))},
    "esam": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    "esam-bf16": {"color": "#D55E00", "marker": "v", "linestyle": (0, (4, 2))},
}
OTHERS = STYLES["share-quarter"]  # the style of what has none

STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "esam_kernels",
}


def _style(name: str) -> dict[str, Any]:
    """A configuration's own style, or that of the method that it is a kind of; that of others."""
    return STYLES.get(name) or STYLES.get(name.partition("-")[0]) or OTHERS


def accuracy_over_time(result: dict[str, Any], path: Path) -> None:
    """Test accuracy against seconds of training: mean of the finished seeds, shaded from the lowest to the highest."""
    with _axes(path, f"{_title(result)}: accuracy over training time") as ax:
        final = []
        for name, method in result["methods"].items():
            color, linestyle = STYLES[name]["color"], STYLES[name]["linestyle"]
            style = {"color": color, "linestyle": linestyle, "label": _label(method)}
            curves = list(sound_curves(result, name).values())
            if not curves:
                ax.plot([], [], **style)
                continue
            seconds = np.cumsum([[epoch["seconds"] for epoch in curve] for curve in curves], axis=1).mean(axis=0)
            accuracy = np.array([[epoch["test_accuracy"] for epoch in curve] for curve in curves])
            ax.plot(seconds, accuracy.mean(axis=0), **style)
            ax.fill_between(seconds, accuracy.min(axis=0), accuracy.max(axis=0), color=color, alpha=0.12, linewidth=0)
            final.append(method["test_accuracy_mean"])
        if final:  # the early epochs, far below, would squeeze what matters
            bottom = max(0, min(100 - 5 * (100 - min(final)), max(final) - 1))
            ax.set_ylim(bottom, max(final) + 0.1 * (max(final) - bottom))
        ax.set(xlabel="training time, seconds", ylabel=_accuracy_axis(_seeds(result)))


def describe_accuracy_over_time(result: dict[str, Any]) -> str:
    """What is seen there, for those who cannot see it."""
    ends = []
    for name, method in result["methods"].items():
        seconds = [sum(epoch["seconds"] for epoch in curve) for curve in sound_curves(result, name).values()]
        if seconds:
            ends.append((float(np.mean(seconds)), f"{_label(method)} {method['test_accuracy_mean']:.2f} %"))
        else:
            ends.append((np.inf, _label(method)))
    listed = "; ".join(f"{end} after {seconds:.3g} s" if seconds < np.inf else end for seconds, end in sorted(ends))
    return f"Lines of test accuracy over training time, one for each optimizer. They end, from left to right: {listed}."


def accuracy_over_cost(result: dict[str, Any], path: Path) -> None:
    """Test accuracy against the time of a step: bars span a standard deviation each way, and the quartiles."""
    with _axes(path, f"{_title(result)}: what a step costs and buys") as ax:
        for name, method in result["methods"].items():
            style = {**STYLES[name], "linestyle": "none", "label": _label(method), "markersize": 9}
            style["markerfacecolor"] = "white" if name.endswith("bf16") else style["color"]
            ax.plot([], [], **style)  # for the legend, where bars would hide the marker
            if method["test_accuracy_mean"] is None:
                continue
            cost = method["time_over_sgd"] or method["seconds_per_step"]
            ax.errorbar(
                cost["median"],
                method["test_accuracy_mean"],
                xerr=[[cost["median"] - cost["low"]], [cost["high"] - cost["median"]]],
                yerr=method["test_accuracy_std"],
                capsize=3,
                **{**style, "label": None},
            )
        unit = "times SGD's" if "sgd" in result["methods"] else "seconds"
        ax.set(xlabel=f"time of a step, {unit}", ylabel=_accuracy_axis(_seeds(result)))


def describe_accuracy_over_cost(result: dict[str, Any]) -> str:
    """What is seen there, for those who cannot see it."""
    points = []
    for method in result["methods"].values():
        relative = method["time_over_sgd"]
        cost = (relative or method["seconds_per_step"])["median"]
        accuracy = "" if method["test_accuracy_mean"] is None else f" {method['test_accuracy_mean']:.2f} %"
        unit = "times SGD's time" if relative else "seconds"
        points.append((cost, f"{_label(method)}{accuracy} at {cost:.3g} {unit}"))
    listed = "; ".join(point for _, point in sorted(points))
    return f"Test accuracy over the time of a step, one point for each optimizer. From left to right: {listed}."


DIRECTIONS = {"gradient_rise": "up the gradient", "random_rise": "random directions"}


def loss_around_minimum(result: dict[str, Any], path: Path) -> None:
    """The loss's rise around the trained weights, up the gradient and along random directions, mean of the seeds."""
    distances = [0.0, *result["sharpness"]["distances"]]
    with _panels(path, f"{_title(result)}: training loss around the trained weights", DIRECTIONS.values()) as axes:
        for ax, direction in zip(axes, DIRECTIONS):
            for name, rises in _mean_rises(result, direction).items():
                ax.plot(distances, [0.0, *rises], label=_label(result["methods"][name]), **STYLES[name])
            ax.set(xlabel="distance from the weights", ylabel=f"rise of the loss, {_mean_of(_seeds(result))}")
            ax.ticklabel_format(axis="y", scilimits=(-3, 4))


def describe_loss_around_minimum(result: dict[str, Any]) -> str:
    """What is seen there, for those who cannot see it."""
    distances, rho = result["sharpness"]["distances"], result["settings"]["rho"]
    near, far = distances.index(rho), len(distances) - 1
    panels = []
    for direction, name in DIRECTIONS.items():
        rises = _mean_rises(result, direction)
        for i in (near, far):
            order = sorted(rises, key=lambda who: -rises[who][i])
            listed = "; ".join(f"{result['methods'][who]['label']} {rises[who][i]:.3g}" for who in order)
            panels.append(
                f"{name.capitalize()}, at distance {distances[i]:.3g}, from the steepest to the flattest: {listed}."
            )
    return " ".join(
        ["Lines of the training loss's rise over the distance from the trained weights, in two panels.", *panels]
    )


def _mean_rises(result: dict[str, Any], direction: str) -> dict[str, list[float]]:
    """For each method whose sharpness was measured, the mean of its seeds at each distance."""
    return {
        name: np.mean([seed[direction] for seed in seeds], axis=0).tolist()
        for name, seeds in result["sharpness"]["seeds"].items()
        if seeds
    }


def frontier(result: dict[str, Any], path: Path) -> None:
    """Test accuracy against the cost of training, at equal epochs with the Pareto front, and at equal time.

    What falls far below SGD would squeeze the rest: it stands at the lower edge, with its accuracy.
    """
    configurations = result["configurations"]
    front = _front(result)
    panels = {"equal_epochs": "equal epochs" + (", with the Pareto front" if front else "")}
    panels["equal_time"] = "equal training time"
    with _panels(path, f"{_title(result)}: what accuracy costs", panels.values()) as axes:
        for ax, panel in zip(axes, panels):
            accuracy = _panel_means(result, panel)
            cost = {name: configurations[name]["training_time_over_sgd"] for name in accuracy}
            bottom = 0.0
            if "sgd" in accuracy:
                ax.axhline(accuracy["sgd"], color=STYLES["sgd"]["color"], linewidth=0.8, linestyle=":")
                bottom = accuracy["sgd"] - max(1.0, max(accuracy.values()) - accuracy["sgd"])
            for number, (name, one) in enumerate(configurations.items(), 1):
                if not one[panel]:
                    continue
                color = _style(name)["color"]
                marker: dict[str, Any] = {
                    "marker": f"${number}$",
                    "markersize": 5 if number < 10 else 9,
                    "linestyle": "none",
                    "color": color,
                    "label": _label(one, one[panel]),
                }
                if name not in accuracy:
                    ax.plot([], [], **marker)
                    continue
                height = max(accuracy[name], bottom)
                ax.plot(cost[name], height, clip_on=False, **marker)
                if accuracy[name] >= bottom:
                    deviation = one[panel]["test_accuracy"]["std"]
                    ax.errorbar(cost[name], height, yerr=deviation, color=color, alpha=0.3, capsize=2)
                else:
                    place: dict[str, Any] = {"rotation": 90, "ha": "center", "transform": ax.get_xaxis_transform()}
                    ax.text(cost[name], 0.04, f"{accuracy[name]:.0f} %", color=color, **place)
            if front and panel == "equal_epochs":
                steps = [(cost[name], accuracy[name]) for name in front]
                ax.step(*zip(*steps), where="post", color="#009E73", linewidth=1.2, zorder=0)
            if bottom > 0:
                ax.set_ylim(bottom=bottom)
            seeds = max((one[panel]["seeds"] for one in configurations.values() if one[panel]), default=0)
            ax.set(xlabel="training time at equal epochs, times SGD's", ylabel=_accuracy_axis(seeds))


def describe_frontier(result: dict[str, Any]) -> str:
    """What is seen there, for those who cannot see it."""
    configurations = result["configurations"]

    def point(name: str, accuracy: dict[str, float]) -> str:
        one = configurations[name]
        return f"{one['label']} ({accuracy[name]:.2f} % at {one['training_time_over_sgd']:.3g} times SGD's time)"

    sentences = []
    for panel, title in zip(PANELS, ("At equal epochs", "At equal training time")):
        accuracy = _panel_means(result, panel)
        if not accuracy:
            sentences.append(f"{title}: nothing yet.")
            continue
        order = sorted(accuracy, key=lambda name: -accuracy[name])
        extremes = [f"highest {point(order[0], accuracy)}", f"lowest {point(order[-1], accuracy)}"]
        extremes += [f"SGD {accuracy['sgd']:.2f} %"] if "sgd" in accuracy else []
        sentences.append(f"{title}: {', '.join(extremes)}.")
        if panel == "equal_epochs" and (front := _front(result)):
            sentences.append(f"Its Pareto front: {', '.join(point(name, accuracy) for name in front)}.")
    lost = [one["label"] for one in configurations.values() if any(_diverged(one[panel]) for panel in PANELS)]
    sentences += [f"From some seeds diverged: {', '.join(lost)}."] if lost else []
    number = len(configurations)
    return " ".join([f"Test accuracy over training time in two panels, {number} numbered points in each.", *sentences])


def headline(result: dict[str, Any], names: Collection[str], path: Path) -> None:
    """A few configurations, one a row: what training costs, and what accuracy it buys at equal epochs."""
    shown = _headline_points(result, names)
    labels = [result["configurations"][name]["label"] for name in shown]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.32 * len(shown)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.4))
        for row, (name, (cost, accuracy, deviation)) in enumerate(shown.items()):
            style = _style(name)
            left.barh(row, cost, height=0.6, color=style["color"])
            about = {"color": style["color"], "marker": style["marker"], "markersize": 7}
            right.errorbar(accuracy, row, xerr=deviation, capsize=3, linestyle="none", **about)
        left.set_yticks(range(len(shown)), labels)
        left.invert_yaxis()
        left.set_title("training time, times SGD's", loc="left", fontsize="medium")
        right.set_title(_accuracy_axis(result["settings"]["seeds"]), loc="left", fontsize="medium")
        for ax in (left, right):
            ax.grid(visible=False, axis="y")
            ax.tick_params(axis="y", length=0)
        right.spines["left"].set_visible(False)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write the figure as SVG, always the same, whole or not at all."""
    with whole(path) as new:
        figure.savefig(new, format="svg", metadata={"Date": None})


def describe_headline(result: dict[str, Any], names: Collection[str]) -> str:
    """What is seen there, for those who cannot see it."""
    listed = "; ".join(
        f"{result['configurations'][name]['label']} {accuracy:.1f} % at {cost:.2f}"
        for name, (cost, accuracy, _) in _headline_points(result, names).items()
    )
    return f"Bars of test accuracy, and of training time in times SGD's: {listed}."


def _headline_points(result: dict[str, Any], names: Collection[str]) -> dict[str, tuple[float, float, float | None]]:
    """Cost, mean accuracy at equal epochs and its deviation, of those that have them."""
    configurations, means = result["configurations"], _panel_means(result, "equal_epochs")
    return {
        name: (
            configurations[name]["training_time_over_sgd"],
            means[name],
            configurations[name]["equal_epochs"]["test_accuracy"]["std"],
        )
        for name in names
        if name in means
    }


def _panel_means(result: dict[str, Any], panel: str) -> dict[str, float]:
    """The mean accuracy of each configuration that has one."""
    shown = {name: one[panel] for name, one in result["configurations"].items() if one[panel]}
    return {name: runs["test_accuracy"]["mean"] for name, runs in shown.items() if runs["test_accuracy"]}


def _front(result: dict[str, Any]) -> list[str]:
    """The configurations on the Pareto front, from the cheapest on; none while the sweep is not finished."""
    configurations = result["configurations"]
    front = [name for name, one in configurations.items() if (one["equal_epochs"] or {}).get("on_front")]
    return sorted(front, key=lambda name: configurations[name]["training_time_over_sgd"])


def _diverged(part: dict[str, Any] | None) -> int:
    """From how many seeds training diverged; older results do not say, as none did."""
    return len((part or {}).get("diverged_seeds", ()))


def _label(one: dict[str, Any], runs: dict[str, Any] | None = None) -> str:
    """A label for the legend, which says of how many seeds there is nothing to see; ``runs``: what has its seeds."""
    runs = runs or one
    diverged = _diverged(runs)
    return one["label"] + (f" ({diverged} of {runs['seeds']} diverged)" if diverged else "")


def _seeds(result: dict[str, Any]) -> int:
    return max(method["seeds"] for method in result["methods"].values())


def _mean_of(seeds: int) -> str:
    return f"mean of {seeds} seeds" if seeds > 1 else "1 seed"


def _accuracy_axis(seeds: int) -> str:
    return f"test accuracy, %, {_mean_of(seeds)}"


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
    with mpl.rc_context(STYLE):
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
        _save(figure, path)
