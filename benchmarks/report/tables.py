"""Results as Markdown tables, and the line that says on what they were measured."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from esam_kernels.options import count_of

from ..record import mean_and_std
from ..training.catalogue import LANGUAGE_WIDTHS, WIDTHS
from ..training.methods import METHODS

PANELS = ("equal_epochs", "equal_time")  # of a frontier's result


class Table(NamedTuple):
    """A table as it is read back from its Markdown."""

    columns: list[str]
    rows: list[list[str]]


def summary(results: Iterable[dict[str, Any]]) -> str:
    """One table over results of whole methods: what SAM and ESAM cost over SGD, and what ESAM buys."""
    columns = [
        "measured",
        "SAM",
        "ESAM",
        "ESAM, bf16 steering",
        "gain over SGD",
        "gain over SAM",
        "peak memory over SGD",
    ]
    rows = []
    for result in results:
        methods = result["methods"]
        sam = "sam" if "sam" in methods else "sam-own"  # where the package of the first is missing
        costs = [
            _cost(methods[name]["time_over_sgd"]) if name in methods else "" for name in (sam, "esam", "esam-bf16")
        ]
        gains = [_gain(result, "esam", other) for other in ("sgd", sam)]
        peaks = [methods.get(name, {}).get("peak_memory_bytes") for name in ("sgd", "esam")]
        rows.append([subject(result), *costs, *gains, f"{peaks[1] / peaks[0]:.2f}" if all(peaks) else ""])
    return table(columns, rows)


def costs(results: Sequence[dict[str, Any]]) -> str:
    """A sentence on what steps cost more than SGD's: the least and the most over all results that timed them."""
    measured = _costs_over_sgd(results)
    parts = [
        f"{what} {found[0]:+.0f} to {found[-1]:+.0f} %"
        for name, what in (("sam", "SAM"), ("esam", "ESAM"), ("esam-bf16", "ESAM with bf16 steering"))
        if (found := measured.get(name))
    ]
    return f"Time of a step over SGD's, the least and the most of all results: {', '.join(parts)}."


def headline(sweeps: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The table of a few methods that a reader sees first, and a line on it.

    Args:
        sweeps: of ``frontier``; each has a column, of accuracy at equal epochs.
        results: of any benchmark, of which those of ``step_cost`` say what a method costs.
        names: the methods, of which those are shown that a sweep has.
    """
    columns = ["method", "time over SGD's", *map(task, sweeps)]
    rows, measured = [], _costs_over_sgd(results)
    for name in names:
        found = [sweep["configurations"].get(name) for sweep in sweeps]
        if any(found):
            accuracies = [_panel_accuracy(one["equal_epochs"]) if one else "" for one in found]
            rows.append([METHODS[name].label, _share_of_time(name, measured), *accuracies])
    about = [
        f"{task(sweep)}: {_network(sweep)}"
        + (f" with {base} in the place of SGD" if (base := _other_base(sweep)) else "")
        + f", {sweep['settings']['epochs']} epochs, {_most_seeds(sweep, 'equal_epochs')} seeds."
        for sweep in sweeps
    ]
    about += ["Accuracy is in %, mean ± standard deviation.", *_places(sweeps)]
    timed = "Time is that of a step, the least and the most of all results: by itself, and before each of these sweeps."
    if any(sweep["settings"].get("choose") for sweep in sweeps):
        timed += " Each method's radius, or rate where it has none, was chosen on other images from other seeds."
    return "\n\n".join([table(columns, rows), " ".join([timed, *about])])


def _network(result: dict[str, Any]) -> str:
    """What is trained on what."""
    settings = result["settings"]
    width = f" of width {settings['width']}" if settings.get("width") else ""
    return f"{result['data']}, {settings['model']}{width}"


def _places(sweeps: Sequence[dict[str, Any]]) -> list[str]:
    """Where and with what they were measured, less the time of day: a machine once, with all its commits and days."""
    found: dict[str, list[list[str]]] = {}
    for sweep in sweeps:
        found.setdefault(_device_and_torch(sweep), []).append([_commit(sweep), sweep["environment"]["date"].split()[0]])
    listed = {where: [", ".join(dict.fromkeys(each)) for each in zip(*pairs)] for where, pairs in found.items()}
    return [f"{where}; commit {commits}; {days}." for where, (commits, days) in listed.items()]


def _other_base(sweep: dict[str, Any]) -> str | None:
    """The base optimizer where it is not SGD."""
    base = sweep["settings"].get("base", "sgd")
    return None if base == "sgd" else str(base)


def task(sweep: dict[str, Any]) -> str:
    """What a sweep is trained on, in few words."""
    settings = sweep["settings"]
    data, model, base = settings["data"], settings["model"], settings.get("base", "sgd")
    parts = [("noisy " if settings["label_noise"] else "") + {"cifar10": "CIFAR-10"}.get(data, data)]
    parts += [model] if model == "vit_s" else []
    parts += [base] if base != ("adamw" if model == "vit_s" else "sgd") else []
    parts += [] if settings.get("augment", True) else ["plain"]
    return ", ".join(parts)


def _share_of_time(name: str, measured: Mapping[str, Sequence[float]]) -> str:
    """The cell on what a method costs; empty where it was not timed."""
    if METHODS[name].share_of_epochs < 1:
        return f"{100 * (METHODS[name].share_of_epochs - 1):+.0f} %"
    found = [f"{cost:+.0f}" for cost in measured.get(name, [])]
    return "" if not found else f"{' to '.join(dict.fromkeys((found[0], found[-1])))} %"


def _costs_over_sgd(results: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """What steps of each method cost more than SGD's in percent, ascending: by themselves, and as sweeps timed them."""
    measured: dict[str, list[float]] = {}
    for result in results:
        methods = {"step_cost": "methods", "frontier": "configurations"}.get(result["benchmark"], "")
        for name, method in result.get(methods, {}).items():
            if method.get("time_over_sgd"):
                measured.setdefault(name, []).append(100 * (method["time_over_sgd"]["median"] - 1))
    return {name: sorted(found) for name, found in measured.items()}


def _gain(result: dict[str, Any], name: str, other: str) -> str:
    """By how much a method's accuracy exceeds another's, over the seeds that both finished without diverging."""
    if not {name, other} <= result.get("curves", {}).keys():
        return ""
    ours, others = sound_curves(result, name), sound_curves(result, other)
    gains = [ours[seed][-1]["test_accuracy"] - others[seed][-1]["test_accuracy"] for seed in ours if seed in others]
    if not gains:
        return ""
    return f"{mean(gains):+.2f}" + (f" ± {stdev(gains):.2f}" if len(gains) > 1 else "")


def sound_curves(result: dict[str, Any], name: str) -> dict[int, list[dict[str, Any]]]:
    """A method's curves of training by their seeds: those that are as long as can be and did not diverge."""
    method = result["methods"][name]
    return {
        seed: curve
        for seed, curve in enumerate(result["curves"][name])
        if len(curve) == method["epochs"] and seed not in method.get("diverged_seeds", ())
    }


def subject(result: dict[str, Any]) -> str:
    """What a result is about, in a few words: its benchmark's data, network, batch and device."""
    settings = result["settings"]
    network = [_network(result)] if "model" in settings else [result["data"]]
    batch = [f"batch {settings['batch_size']}"] if "batch_size" in settings else []
    amp = [f"{settings['amp']} autocast"] if settings.get("amp") else []
    return ", ".join([*network, *batch, *amp, settings["device"].upper()])


def train(result: dict[str, Any]) -> str:
    """The tables of a training result: accuracy, time and memory of each method, and the sharpness of what it found."""
    settings, methods = result["settings"], result["methods"]
    columns = ["optimizer", "test accuracy, %", "step, ms", "cost over SGD", "peak memory, MB"]
    rows = []
    for method in methods.values():
        accuracy = {"mean": method["test_accuracy_mean"], "std": method["test_accuracy_std"]}
        rows.append(
            [
                method["label"],
                _accuracy(accuracy, len(method.get("diverged_seeds", ())), method["seeds"]),
                f"{1e3 * method['seconds_per_step']['median']:.1f}",
                _cost(method["time_over_sgd"]),
                f"{method['peak_memory_bytes'] / 1e6:.0f}",
            ]
        )
    method = next(iter(methods.values()))
    epochs = f"{method['epochs']} epochs"
    if method["epochs"] < settings["epochs"]:
        epochs = f"stopped by the time budget after {method['epochs']} of {settings['epochs']} epochs"
    amp = f", {settings['amp']} autocast" if settings["amp"] else ""
    caption = (
        f"{result['data']}, {settings['model']}, batch {settings['batch_size']}{amp}, {epochs}, "
        f"{_seeds(method['seeds'])}, rho {settings['rho']}, beta {settings['beta']}, gamma {settings['gamma']}. "
        f"{machine(result)}"
    )
    found = {methods[name]["label"]: measured for name, measured in result["sharpness"]["seeds"].items()}
    return "\n\n".join([table(columns, rows), *left_out(result), caption, *sharpness(result, {"": found})])


def frontier(result: dict[str, Any]) -> str:
    """The tables of a sweep: each configuration's cost, accuracy at equal epochs and at equal time, and sharpness."""
    settings, configurations = result["settings"], result["configurations"]
    finished = result["runs"]["finished"] == result["runs"]["planned"]
    columns = ["configuration", "training time over SGD", f"accuracy at {settings['epochs']} epochs, %"]
    chosen, tested = "choose" in settings and settings["choose"], _seeds_of(configurations["sgd"]["equal_epochs"]) > 1
    columns[1:1] = ["rho, or lr"] if chosen else []
    columns += [
        *(["p against SGD"] if tested else []),
        *(["Pareto front"] if finished else []),
        "epochs in SGD's time",
        "accuracy, %",
    ]
    rows = []
    for name, one in configurations.items():
        by_epochs, by_time = one["equal_epochs"], one["equal_time"]
        row = [one["label"], *([_radius_or_rate(result, name)] if chosen else [])]
        row += [f"{one['training_time_over_sgd']:.2f}", _panel_accuracy(by_epochs)]
        row += (
            [_p(by_epochs, configurations["sgd"]["equal_epochs"])]
            if tested and one is not configurations["sgd"]
            else []
        )
        row += [""] if tested and one is configurations["sgd"] else []
        row += ["yes" if by_epochs["on_front"] else ""] if finished else []
        rows.append([*row, str(by_time["epochs"]) if by_time else "", _panel_accuracy(by_time)])
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"": {}, "in SGD's time: ": {}}
    for one in configurations.values():
        for prefix, panel in zip(found, PANELS):
            runs = one[panel]["runs"] if one[panel] else []
            found[prefix][one["label"]] = [run["sharpness"] for run in runs if run["sharpness"]]
    about = [*left_out(result), _about_sweep(result, finished), *_tried(result)]
    return "\n\n".join([table(columns, rows), *about, *sharpness(result, found)])


def _about_sweep(result: dict[str, Any], finished: bool) -> str:
    """What a reader must know of a sweep to judge its tables."""
    settings, configurations, runs = result["settings"], result["configurations"], result["runs"]
    amp = f", {settings['amp']} autocast" if settings["amp"] else ""
    by_epochs, by_time = (_most_seeds(result, panel) for panel in PANELS)
    sentences = [
        f"{_network(result)}, batch {settings['batch_size']}{amp}; learning rate {settings['lr']:g}, annealed over a "
        f"run's own epochs. ESAM's rows have beta {settings['beta']:g} and gamma {settings['gamma']:g} unless they say "
        "otherwise, all others that perturb have beta 1 and, unless they say otherwise, gamma 1"
        + ("." if settings.get("choose") else f"; rho is {settings['rho']:g}, or what suits the ascent."),
        f"Accuracy is of {_seeds(by_epochs)} at equal epochs and of {_seeds(by_time)} in SGD's time.",
        f"Training time is that at equal epochs, from a step's, the median of {settings['rounds']} interleaved rounds.",
    ]
    sentences += [
        f"{one['label']!r} trains for {one['equal_epochs']['epochs']} of the {settings['epochs']} epochs only, and for "
        "as small a share of SGD's time."
        for one in configurations.values()
        if one["equal_epochs"] and one["equal_epochs"]["epochs"] < settings["epochs"]
    ]
    if base := _other_base(result):
        sentences.append(f"The base optimizer is {base}: rows that name SGD are it alone.")
    if settings.get("choose"):
        sentences.append(
            "A row's rho, or where it has none its learning rate, is one of the usual times "
            f"{', '.join(f'{factor:g}' for factor in settings['choose'])}, chosen on {settings['validation_samples']} "
            f"other images from {_count(settings['choose_seeds'], 'other seed')}."
        )
    if _seeds_of(configurations["sgd"]["equal_epochs"]) > 1:
        sentences.append("p is Welch's, two-sided, of the accuracies at equal epochs, of many comparisons.")
    sentences += [
        f"{one['label']!r}: the first moment and the next step's gradient have a cosine of "
        f"{', '.join(f'{cosine:.2f}' for cosine in found)} in the quarters of training."
        for one in configurations.values()
        if one["equal_epochs"] and (found := _cosines(one["equal_epochs"]["runs"]))
    ]
    tried = len(settings["configurations"])
    sentences.append(
        f"{tried} configurations were tried, on the images that accuracy is of: the best of them is so in part by luck."
    )
    if finished:
        sentences.append(
            "The Pareto front is of all of them, and of means: within their deviations it could be another."
        )
    else:
        sentences.append(f"Stopped after {runs['finished']} of {runs['planned']} runs: there is no Pareto front yet.")
    if any(one[panel] and one[panel].get("diverged_seeds") for one in configurations.values() for panel in PANELS):
        sentences.append("Seeds that diverged have no part in the means, nor their configuration in the front.")
    return " ".join([*sentences, machine(result)])


def _most_seeds(sweep: dict[str, Any], panel: str) -> int:
    return max(_seeds_of(one[panel]) for one in sweep["configurations"].values())


def _seeds_of(panel: dict[str, Any] | None) -> int:
    return panel["seeds"] if panel else 0


def _tried(result: dict[str, Any]) -> list[str]:
    """The table of what each radius or rate was chosen by, and its caption; nothing if there is none."""
    configurations = {name: one for name, one in result["configurations"].items() if one.get("tried")}
    if not configurations:
        return []
    factors = [f"{factor:g}" for factor in result["settings"]["choose"]]
    rows = [
        [one["label"], *(_tried_cell(one["tried"], factor) for factor in factors)] for one in configurations.values()
    ]
    caption = "What was chosen by: accuracy on the validation part, %, at so many times the usual rho or learning rate:"
    return [caption, table(["configuration", *factors], rows)]


def _tried_cell(tried: Mapping[str, float | None], factor: str) -> str:
    """Empty where its runs are not finished."""
    if factor not in tried:
        return ""
    accuracy = tried[factor]
    return "diverged" if accuracy is None else f"{accuracy:.2f}"


def _radius_or_rate(result: dict[str, Any], name: str) -> str:
    """The cell on what was chosen for a configuration: its radius, the late one behind it, or a rate; empty if none."""
    settings, factor = result["settings"], result["configurations"][name]["factor"]
    if factor is None:
        return ""
    if not METHODS[name].has_radius:
        return f"lr {factor * settings['lr']:.3g}"
    return ", then ".join(f"{rho:.3g}" for rho in METHODS[name].radii(settings, settings.get("base", "sgd"), factor))


def _p(panel: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """The cell on whether two accuracies differ; empty where one has fewer than two seeds."""
    samples = [
        [run["test_accuracy"] for run in one["runs"] if not run.get("diverged")] if one else []
        for one in (panel, other)
    ]
    return "" if min(map(len, samples)) < 2 else f"{welch(*samples):.2g}"


def _cosines(runs: Sequence[dict[str, Any]]) -> list[float]:
    """The mean cosine of first moment and next gradient in each quarter of training; nothing if it was not watched."""
    curves = [curve for run in runs if (curve := run.get("cosines")) and None not in curve]
    if not curves:
        return []
    return [float(np.mean([np.mean(part) for curve in curves if (part := quarter(curve, i))])) for i in range(4)]


def quarter(curve: Sequence[float], i: int) -> Sequence[float]:
    """The part of a curve that is in a quarter, at least one value."""
    begin, end = i * len(curve) // 4, (i + 1) * len(curve) // 4
    return curve[begin : max(end, begin + 1)]


def welch(these: Sequence[float], those: Sequence[float]) -> float:
    """The two-sided p of Welch's t-test that two samples, of two or more values each, have the same mean."""
    errors = [np.var(sample, ddof=1) / len(sample) for sample in (these, those)]
    difference = abs(np.mean(these) - np.mean(those))
    if sum(errors) == 0:
        return float(difference == 0)
    freedom = sum(errors) ** 2 / sum(e**2 / (len(sample) - 1) for e, sample in zip(errors, (these, those)))
    # With t = sqrt(freedom) * tan(angle), the density of t is that of angle, cos(angle)^(freedom - 1).
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    density[-1] = 0.0 if freedom > 1 else 1.0
    beyond = np.arctan(difference / np.sqrt(sum(errors) * freedom))
    tail = np.linspace(beyond, np.pi / 2, 20_001)
    tails = np.cos(tail) ** (freedom - 1)
    tails[-1] = density[-1]
    return float(np.trapezoid(tails, tail) / np.trapezoid(density, angles))


def sharpness(result: dict[str, Any], found: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]) -> list[str]:
    """The table of how sharp what was found is, and its caption; nothing if that was not measured.

    Args:
        result: of networks that were trained.
        found: for each group of columns, by what their names begin with, the measurements at each row, one a seed. The
            first group has all radii, the others only that of the settings.
    """
    measured = [one for group in found.values() for seeds in group.values() for one in seeds]
    measured = [one for i, one in enumerate(measured) if one not in measured[:i]]  # a run may be in two groups
    if not measured:
        return []
    distances, rho = result["sharpness"]["distances"], result["settings"]["rho"]
    tolerance = result["sharpness"].get("tolerance", 0.05)  # which results did not say at first
    columns, rows = (
        ["network trained by", "norm of the weights"],
        {label: [label] for label in next(iter(found.values()))},
    )
    for prefix, group in found.items():
        radii = [i for i, distance in enumerate(distances) if distance == rho or not prefix]
        columns += [f"{prefix}top eigenvalue", *(f"{prefix}loss rise at {distances[i]:.3g}" for i in radii)]
        for label, seeds in group.items():
            rows[label] += [] if prefix else [_over_seeds([one["weight_norm"] for one in seeds], 3)]
            rows[label].append(_eigenvalue([one["hessian"] for one in seeds]))
            rows[label] += [_over_seeds([one["gradient_rise"][i] for one in seeds]) for i in radii]
    converged = sum(one["hessian"]["converged"] for one in measured)
    caption = (
        f"Sharpness is of the loss over {result['settings']['sharpness_samples']} training images, without "
        "augmentation. Loss rise: from the weights to the point at that distance straight up the gradient, a lower "
        "bound of the largest rise in the ball of that radius. Top eigenvalue of the Hessian, by power iteration, "
        f"which comes from below: {converged} of {len(measured)} converged, to a residual of {100 * tolerance:g} %."
    )
    return [table(columns, rows.values()), caption]


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
        by_chance = count_of(settings["gamma"], settings["batch_size"]) / settings["batch_size"]
        findings += (
            f" Steered in bf16, the ascent gradient has a cosine of {steering['cosine']:.4f} with float32's, and "
            f"{100 * steering['overlap']:.1f} % of the selected samples are the same, where "
            f"{100 * by_chance:.1f} % would be so by chance."
        )
    published = WIDTHS[settings["model"]]
    width = f" of width {settings['width']}" if settings["width"] else ""
    if settings["width"] and settings["width"] < published:
        width += f" (a scaled-down stand-in: the published one's is {published})"
    amp = f", {settings['amp']} autocast" if settings["amp"] else ""
    size = f"{settings['image_size']}x{settings['image_size']} images ({result['data']})"
    if settings["model"] in LANGUAGE_WIDTHS:
        size = f"sequences of up to {settings['context']} out of {settings['vocabulary']} tokens"
    caption = (
        f"{settings['model']}{width}, batch {settings['batch_size']}{amp}, {size}, medians and quartiles of "
        f"{result['rounds']} interleaved rounds; operators: {result['backend']}. {machine(result)}"
    )
    return "\n\n".join(
        [
            table(["step", "ms", "over SGD"], methods),
            *left_out(result),
            table(["part of ESAM's step", "ms", "over SGD"], parts),
            findings,
            caption,
        ]
    )


def left_out(result: dict[str, Any]) -> list[str]:
    """The sentence on what was not measured, and why; nothing if all was, or if the result is from before."""
    missing = "; ".join(f"{METHODS[name].label}: {why}" for name, why in result.get("left_out", {}).items())
    return [f"Left out: {missing}."] if missing else []


def rounding(result: dict[str, Any]) -> str:
    """The table of what rounding the perturbation of bf16 weights does."""
    columns = ["method, weights, rounding of e", "test accuracy, %", "projection on e", "length over e's"]
    rows = [
        [
            label,
            _accuracy(row.get("test_accuracy"), row.get("diverged", 0), result["settings"]["seeds"]),
            *(f"{row[name]['mean']:.3f}" if name in row else "" for name in ("projection", "length")),
        ]
        for label, row in result["rows"].items()
    ]
    settings = result["settings"]
    caption = (
        f"{result['data']}, perceptron with two hidden layers of {settings['width']}, batch {settings['batch_size']}, "
        f"{settings['epochs']} epochs, {_seeds(settings['seeds'])}, beta {settings['beta']}, "
        f"gamma {settings['gamma']}. Projection and length are those of the weights' real move at the end of training. "
        f"{machine(result)}"
    )
    return f"{table(columns, rows)}\n\n{caption}"


def memory(result: dict[str, Any]) -> str:
    """The tables of peak memory: for each model every option of ESAM, with its backup and the floor under it."""
    parts = []
    for case in result["cases"].values():
        sgd = case["rows"]["SGD"]["peak_bytes"]
        rows = []
        for label, row in case["rows"].items():
            peak, copies = row["peak_bytes"], (row["backup_bytes"], row["floor_bytes"])
            cells = [_megabytes(peak), f"{peak / sgd:.3f}", f"{(peak - sgd) / 1e6:+.1f}", *map(_megabytes, copies)]
            rows.append([label, *cells])
        columns = ["optimizer", "peak, MB", "over SGD", "more than SGD, MB", "backup, MB", "floor, MB"]
        about = f"{case['label']}, {_megabytes(case['weight_bytes'])} MB of weights, batch {case['batch_size']}."
        parts += [about, table(columns, rows)]
    settings = result["settings"]
    caption = (
        f"Peak of {settings['steps']} steps, SGD having momentum, beta {settings['beta']}, gamma {settings['gamma']} "
        "where nothing else is said: weights, gradients, momentum, activations, the batch and what a step makes "
        "besides. Backup: what ESAM copies before it perturbs. Floor: one copy of the weights that are perturbed. "
        f"{machine(result)}"
    )
    return "\n\n".join([*parts, *left_out(result), caption])


def host_time(result: dict[str, Any]) -> str:
    """The tables of the host's part of a step: what each method adds, in time and in calls, and ESAM's parts."""
    cases = result["cases"]
    labels = {name: row["label"] for case in cases.values() for name, row in case["rows"].items()}
    added, calls = [], []
    for case, found in cases.items():
        rows = found["rows"]
        milliseconds = [f"{1e3 * rows[name]['added_seconds']['median']:.2f}" for name in labels if name != "sgd"]
        added.append([case, str(found["tensors"]), f"{1e3 * rows['sgd']['seconds']['median']:.2f}", *milliseconds])
        calls.append([case, *(str(rows[name]["calls"]) for name in labels)])
    others = [label for name, label in labels.items() if name != "sgd"]
    parts = {name: None for found in cases.values() for name in found["parts"]}
    by_part = [
        [case, *(f"{1e3 * part['median']:.2f}" if (part := found["parts"].get(name)) else "" for name in parts)]
        for case, found in cases.items()
    ]
    caption = (
        f"Medians of {result['settings']['rounds']} interleaved rounds on one thread, with networks as deep as those "
        f"named and next to nothing to compute. {machine(result)}"
    )
    return "\n\n".join(
        [
            "What each method adds to its passes and the base optimizer's step, in ms beside the whole of SGD's step:",
            table(["network", "tensors", "SGD, ms", *others], added),
            "Operators called in a step:",
            table(["network", *labels.values()], calls),
            "ESAM's own parts, ms:",
            table(["network", *parts], by_part),
            *left_out(result),
            caption,
        ]
    )


def operators(result: dict[str, Any]) -> str:
    """The tables of the operators: those over lists of weights, and the selection of samples."""
    rows = result["operators"]
    over_weights = [row for row in rows if row["operator"] != "select_top"]
    over_samples = [row for row in rows if row["operator"] == "select_top"]
    settings = result["settings"]
    caption = (
        f"Medians of {settings['repeats']} interleaved rounds, backend {result['backend']}. A rival's column has its "
        "time over that of esam_kernels: above 1, it is slower. A share of a copy is that of the bandwidth of one "
        f"large copy in the same rounds; what fits in a cache exceeds it. {machine(result)}"
    )
    return "\n\n".join([*(_operators(group) for group in (over_weights, over_samples) if group), caption])


def _operators(rows: list[dict[str, Any]]) -> str:
    rivals = list(dict.fromkeys(who for row in rows for who in row["rivals"] if who != "esam_kernels"))
    on_gpu = rows[0]["rivals"]["esam_kernels"]["launches"] is not None
    columns = [
        "operator",
        "over",
        "µs",
        *(["µs of the host", "launches"] if on_gpu else []),
        "share of a copy",
        *rivals,
    ]
    lines = []
    for row in rows:
        ours = row["rivals"]["esam_kernels"]
        host = [f"{ours['host_us']:.1f}", str(ours["launches"])] if on_gpu else []
        over = [f"{row['rivals'][who]['us'] / ours['us']:.2f}" if who in row["rivals"] else "" for who in rivals]
        cells = [f"{ours['us']:.1f}", *host, f"{ours['share_of_copy_bandwidth']:.0%}", *over]
        lines.append([row["operator"], row["on"], *cells])
    return table(columns, lines)


def machine(result: dict[str, Any]) -> str:
    """One line on where and with what a result was measured."""
    return f"{_device_and_torch(result)}; commit {_commit(result)}; {result['environment']['date']}."


def _commit(result: dict[str, Any]) -> str:
    env = result["environment"]
    return (env["commit"] or "unknown") + (" with uncommitted changes" if env["uncommitted_changes"] else "")


def _device_and_torch(result: dict[str, Any]) -> str:
    env = result["environment"]
    cpu = f"{env['cpu']}, {env['cpu_cores']} cores{_bf16_units(env)}"
    device = env["gpu"] if result["settings"]["device"] == "cuda" else cpu
    if result["settings"]["device"] == "cuda":
        matmul, convolution = ("with" if env[f"tf32_{what}"] else "without" for what in ("matmul", "convolution"))
        device += f", matrix products {matmul} TF32, convolutions {convolution}"
    return f"{device}; torch {env['torch']}"


def _bf16_units(env: Mapping[str, Any]) -> str:
    """Whether the CPU has units for bf16: of any kind, or for matrices, which is what results from before say."""
    kind, there = "bf16", env.get("cpu_bf16_units")
    if "cpu_bf16_matrix_units" in env:
        kind, there = "bf16 matrix", env["cpu_bf16_matrix_units"]
    return "" if there is None else f", {'with' if there else 'without'} {kind} units"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with numbers to the right, whose columns also line up as plain text."""
    columns, *rows = [[cell.replace("|", r"\|") for cell in cells] for cells in [columns, *rows]]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(line(cells) for cells in [columns, rule, *rows])


PAGE_WIDTH = 100  # in characters, of what a page of the docs has room for beside its navigation


def narrow(markdown: str) -> str:
    """The same with tables that are too wide for a page as several, each with the first column and some of the others.

    Rows of which a table has nothing but the name are left out of it.
    """
    parts = []
    for block in blocks(markdown):
        parts += [block] if isinstance(block, str) else [table(*part) for part in _split(block)]
    return "\n\n".join(parts)


def _split(whole: Table) -> Iterator[Table]:
    """In as few parts as fit, of about as many columns each."""

    def width(i: int) -> int:  # a header may wrap between words
        return 3 + max(len(text) for text in (*whole.columns[i].split(), *(row[i] for row in whole.rows)))

    others = list(range(1, len(whole.columns)))
    for number in range(1, len(others) + 1):
        size = math.ceil(len(others) / number)
        parts = [[0, *others[i : i + size]] for i in range(0, len(others), size)]
        if all(sum(map(width, part)) <= PAGE_WIDTH for part in parts):
            break
    for part in parts:
        rows = [[row[i] for i in part] for row in whole.rows]
        yield Table([whole.columns[i] for i in part], [row for row in rows if len(parts) == 1 or any(row[1:])])


def blocks(markdown: str) -> Iterator[str | Table]:
    """The paragraphs and tables of Markdown that is made of ``table`` and of plain paragraphs."""
    for block in markdown.split("\n\n"):
        if block.startswith("| "):
            columns, _, *rows = [
                [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                for line in block.splitlines()
            ]
            yield Table(columns, rows)
        else:
            yield block


def _cost(time_over_sgd: dict[str, float] | None) -> str:
    return f"{100 * (time_over_sgd['median'] - 1):+.0f} %" if time_over_sgd else ""


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _time(row: dict[str, Any]) -> list[str]:
    return [_milliseconds(row["seconds"]), _ratio(row["time_over_sgd"])]


def _seeds(number: int) -> str:
    return _count(number, "seed") + (" (mean ± standard deviation)" if number != 1 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _panel_accuracy(panel: dict[str, Any] | None) -> str:
    """The cell on a configuration's accuracy in a panel of the frontier."""
    return _accuracy(panel["test_accuracy"], len(panel.get("diverged_seeds", ())), panel["seeds"]) if panel else ""


def _accuracy(values: dict[str, float | None] | None, diverged: int, seeds: int) -> str:
    """Accuracy over the seeds that did not diverge, and how many did."""
    if values is None or values["mean"] is None:
        return "diverged"
    return _mean_and_std(values, ".2f") + (f", {diverged} of {seeds} diverged" if diverged else "")


def _eigenvalue(found: Sequence[dict[str, Any]]) -> str:
    """The cell on the top eigenvalue, which says how many converged if not all did."""
    converged = sum(one["converged"] for one in found)
    suffix = f", {converged} of {len(found)} converged" if converged < len(found) else ""
    return _over_seeds([one["value"] for one in found]) + suffix


def _over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation of what was measured from each seed, to significant digits; nothing of nothing."""
    found = mean_and_std(values)
    if found is None:
        return ""
    # Rounded first, then written without an exponent where that is short.
    parts = [f"{float(f'{value:.{digits}g}'):g}" for value in found.values() if value is not None]
    return " ± ".join(parts)


def _mean_and_std(values: dict[str, float | None], form: str) -> str:
    """Mean ± standard deviation, the latter only if there are several values."""
    spread = "" if values["std"] is None else f" ± {values['std']:{form}}"
    return f"{values['mean']:{form}}{spread}"


def _milliseconds(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['median']:.2f} ({1e3 * seconds['low']:.2f} to {1e3 * seconds['high']:.2f})"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
