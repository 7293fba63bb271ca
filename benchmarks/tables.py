"""Results as Markdown tables, and the line that says on what they were measured."""

from collections.abc import Iterable, Sequence
from typing import Any


def train(result: dict[str, Any]) -> str:
    """The table of a training result: accuracy, time and memory of each method, and how they were measured."""
    settings = result["settings"]
    columns = ["optimizer", "test accuracy, %", "step, ms", "cost over SGD", "peak memory, MB"]
    has_sharpness = any(method.get("sharpness") for method in result["methods"].values())
    if has_sharpness:
        columns += [f"loss rise at rho {settings['rho']}", "top eigenvalue"]
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
        if has_sharpness:
            rows[-1] += _sharpness(method["sharpness"])
    method = next(iter(result["methods"].values()))
    epochs = f"{method['epochs']} epochs"
    if method["epochs"] < settings["epochs"]:
        epochs = f"stopped by the time budget after {method['epochs']} of {settings['epochs']} epochs"
    amp = f", {settings['amp']} autocast" if settings["amp"] else ""
    caption = (
        f"{result['data']}, {settings['model']}, batch {settings['batch_size']}{amp}, {epochs}, "
        f"{_seeds(method['seeds'])}, rho {settings['rho']}, beta {settings['beta']}, gamma {settings['gamma']}."
    )
    if has_sharpness:
        caption += f" Sharpness of the trained networks, on {settings['sharpness_samples']} training images."
    return f"{table(columns, rows)}\n\n{caption} {machine(result)}"


def frontier(result: dict[str, Any]) -> str:
    """The table of a sweep: what each configuration costs, and its accuracy at equal epochs and at equal time."""
    settings, configurations = result["settings"], result["configurations"]
    columns = ["configuration", "time over SGD", f"accuracy at {settings['epochs']} epochs, %", "Pareto front"]
    columns += ["epochs in SGD's time", "accuracy, %", "time taken over SGD"]
    has_sharpness = any(one["equal_epochs"] and one["equal_epochs"]["sharpness"] for one in configurations.values())
    if has_sharpness:
        columns += [f"loss rise at rho {settings['rho']}", "top eigenvalue"]
    rows = []
    for one in configurations.values():
        by_epochs, by_time, sgd = one["equal_epochs"], one["equal_time"], configurations["sgd"]["equal_time"]
        row = [one["label"], f"{one['training_time_over_sgd']:.2f}", "", "", "", "", ""]
        if by_epochs:
            row[2:4] = [_mean_and_std(by_epochs["test_accuracy"], ".2f"), "yes" if by_epochs["on_front"] else ""]
        if by_time and sgd:
            row[4:6] = [str(by_time["epochs"]), _mean_and_std(by_time["test_accuracy"], ".2f")]
            row[6] = f"{by_time['seconds'] / sgd['seconds']:.2f}"
        rows.append(row + (_sharpness(by_epochs and by_epochs["sharpness"]) if has_sharpness else []))
    amp = f", {settings['amp']} autocast" if settings["amp"] else ""
    by_epochs, by_time = (
        max(row[panel]["seeds"] if row[panel] else 0 for row in configurations.values())
        for panel in ("equal_epochs", "equal_time")
    )
    runs = result["runs"]
    stopped = (
        f" Stopped after {runs['finished']} of {runs['planned']} runs." if runs["finished"] < runs["planned"] else ""
    )
    caption = (
        f"{result['data']}, {settings['model']}, batch {settings['batch_size']}{amp}, rho {settings['rho']}, beta "
        f"{settings['beta']}, gamma {settings['gamma']} unless the row says otherwise; {_seeds(by_epochs)} at equal "
        f"epochs and {_seeds(by_time)} in SGD's time; the learning rate anneals over a run's own epochs. A step's cost "
        f"is the median of {settings['rounds']} interleaved rounds.{stopped} "
        f"{machine(result)}"
    )
    return f"{table(columns, rows)}\n\n{caption}"


def step_cost(result: dict[str, Any]) -> str:
    """The tables of a step's cost: the methods, the parts of ESAM's step, and how well bf16 steers."""
    methods = [
        [method["label"], _milliseconds(method["seconds"]), _ratio(method["time_over_sgd"])]
        for method in result["methods"].values()
    ]
    parts = [
        [name, _milliseconds(part["seconds"]), _ratio(part["time_over_sgd"])] for name, part in result["parts"].items()
    ]
    settings, steering = result["settings"], result["steering"]
    width = f" of width {settings['width']}" if settings["width"] else ""
    whole = f"ESAM's whole step takes {_ratio(result['whole_over_parts'])} times the sum of its parts."
    quality = (
        f"Steered in bf16, the ascent gradient has a cosine of {steering['cosine']:.4f} with float32's, and "
        f"{100 * steering['overlap']:.1f} % of the selected samples are the same."
    )
    caption = (
        f"{settings['model']}{width}, batch {settings['batch_size']}, 32x32 images ({result['data']}), medians and "
        f"quartiles of {settings['rounds']} interleaved rounds. {machine(result)}"
    )
    return "\n\n".join(
        [
            table(["step", "ms", "over SGD"], methods),
            table(["part of ESAM's step", "ms", "over SGD"], parts),
            f"{whole} {quality}",
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


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds (mean ± standard deviation)"


def _sharpness(sharpness: dict[str, Any] | None) -> list[str]:
    """The two cells on a method's sharpness."""
    if not sharpness:
        return ["", ""]
    return [_mean_and_std(sharpness["loss_rise"], ".4f"), _mean_and_std(sharpness["top_eigenvalue"], ".1f")]


def _mean_and_std(values: dict[str, float | None], form: str) -> str:
    """Mean ± standard deviation, the latter only if there are several values."""
    spread = "" if values["std"] is None else f" ± {values['std']:{form}}"
    return f"{values['mean']:{form}}{spread}"


def _milliseconds(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['median']:.2f} ({1e3 * seconds['low']:.2f} to {1e3 * seconds['high']:.2f})"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
