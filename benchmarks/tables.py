"""Results as Markdown tables, and the line that says on what they were measured."""

from collections.abc import Iterable, Sequence
from typing import Any

from .models import LANGUAGE_MODELS


def train(result: dict[str, Any]) -> str:
    """The table of a training result: accuracy, time and memory of each method, and how they were measured."""
    columns = ["optimizer", "test accuracy, %", "step, ms", "cost over SGD", "peak memory, MB"]
    rows = []
    for method in result["methods"].values():
        spread = "" if method["test_accuracy_std"] is None else f" ± {method['test_accuracy_std']:.2f}"
        cost = method["time_over_sgd"]
        rows.append(
            [
                method["label"],
                f"{method['test_accuracy_mean']:.2f}{spread}",
                f"{1e3 * method['seconds_per_step']['median']:.1f}",
                f"{100 * (cost['median'] - 1):+.0f} %" if cost else "",
                f"{method['peak_memory_bytes'] / 1e6:.0f}",
            ]
        )
    settings, method = result["settings"], next(iter(result["methods"].values()))
    epochs = f"{method['epochs']} epochs"
    if method["epochs"] < settings["epochs"]:
        epochs = f"stopped by the time budget after {method['epochs']} of {settings['epochs']} epochs"
    seeds = "1 seed" if method["seeds"] == 1 else f"{method['seeds']} seeds (mean ± standard deviation)"
    amp = f", {settings['amp']} autocast" if settings["amp"] else ""
    caption = (
        f"{result['data']}, {settings['model']}, batch {settings['batch_size']}{amp}, {epochs}, "
        f"{seeds}, rho {settings['rho']}, beta {settings['beta']}, gamma {settings['gamma']}. {machine(result)}"
    )
    return f"{table(columns, rows)}\n\n{caption}"


def step_cost(result: dict[str, Any]) -> str:
    """The tables of a step's cost: the methods, the parts of ESAM's step with its floor, and how well bf16 steers."""
    methods = [[method["label"], *_time(method)] for method in result["methods"].values()]
    parts = [[name, *_time(part)] for name, part in result["parts"].items()]
    parts.append(["floor: the passes and the base step alone", *_time(result["floor"])])
    settings, steering = result["settings"], result["steering"]
    findings = (
        f"ESAM's whole step takes {_ratio(result['whole_over_parts'])} times the sum of its parts and "
        f"{_ratio(result['whole_over_floor'])} times its floor. SGD, entered a second time, differs from itself by "
        f"{100 * result['aa_difference']:+.1f} %."
    )
    if steering:
        findings += (
            f" Steered in bf16, the ascent gradient has a cosine of {steering['cosine']:.4f} with float32's, and "
            f"{100 * steering['overlap']:.1f} % of the selected samples are the same."
        )
    width = f" of width {settings['width']}" if settings["width"] else ""
    amp = f", {settings['amp']} autocast" if settings["amp"] else ""
    size = f"{settings['image_size']}x{settings['image_size']} images ({result['data']})"
    if settings["model"] in LANGUAGE_MODELS:
        size = f"sequences of up to {settings['context']} out of {settings['vocabulary']} tokens"
    caption = (
        f"{settings['model']}{width}, batch {settings['batch_size']}{amp}, {size}, medians and quartiles of "
        f"{result['rounds']} interleaved rounds; operators: {result['backend']}. {machine(result)}"
    )
    return "\n\n".join(
        [
            table(["step", "ms", "over SGD"], methods),
            table(["part of ESAM's step", "ms", "over SGD"], parts),
            findings,
            caption,
        ]
    )


def machine(result: dict[str, Any]) -> str:
    """One line on where and with what a result was measured."""
    env = result["environment"]
    units = ", with bf16 matrix units" if env["cpu_bf16_matrix_units"] else ", without bf16 matrix units"
    cpu = f"{env['cpu']}, {env['cpu_cores']} cores{units}"
    device = env["gpu"] if result["settings"]["device"] == "cuda" else cpu
    dirty = " with uncommitted changes" if env["uncommitted_changes"] else ""
    return f"{device}; torch {env['torch']}; commit {env['commit']}{dirty}; {env['date']}."


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with numbers to the right, whose columns also line up as plain text."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(line(cells) for cells in [columns, rule, *rows])


def _time(row: dict[str, Any]) -> list[str]:
    return [_milliseconds(row["seconds"]), _ratio(row["time_over_sgd"])]


def _milliseconds(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['median']:.2f} ({1e3 * seconds['low']:.2f} to {1e3 * seconds['high']:.2f})"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
