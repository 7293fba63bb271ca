"""The documents made of results: the HTML page, the Markdown, and sections of the README and the docs."""

import html
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esam_kernels.options import OPTIONS

from ..record import load
from ..record import write as write_whole
from . import page, plots, tables

# The README's rows of the frontier, of which it shows those that were measured.
HEADLINES = (
    "sgd", "sgd-short", "nesterov", "momentum", "previous", "momentum-then-sam", "sam-tail0.2", "sam-tail0.5", "sam",
    "esam",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A plot of a result.

    Attributes:
        draw: writes it as an SVG file.
        describe: says what is seen, for those who cannot see it.
        shown: whether a result has what it shows.
    """

    draw: Callable[[dict[str, Any], Path], None]
    describe: Callable[[dict[str, Any]], str]
    shown: Callable[[dict[str, Any]], bool] = lambda _: True


@dataclass(frozen=True)
class Kind:
    """How the results of one benchmark are shown.

    Attributes:
        title: of its section.
        introduction: what is measured, for a reader who knows only what SGD is.
        tables: makes the Markdown of a result.
        figures: its plots, by what their files' names end with.
        summarized: whether its results have ``methods`` with costs over SGD, as ``tables.summary`` needs.
    """

    title: str
    introduction: str
    tables: Callable[[dict[str, Any]], str]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    summarized: bool = False

    def plots(self, result: dict[str, Any]) -> list[tuple[str, Figure]]:
        """The figures that a result has, and what their files' names end with."""
        return [(name, figure) for name, figure in self.figures.items() if figure.shown(result)]


# By what results name as their benchmark, in the order in which they are shown.
KINDS = {
    "train": Kind(
        "Training",
        "One network is trained to the end by each optimizer, from the same weights, on the same batches, in turns. "
        "Accuracy is the last epoch's, on images that were not trained on; cost is the time of a step over SGD's.",
        tables.train,
        {
            "_cost": Figure(plots.accuracy_over_cost, plots.describe_accuracy_over_cost),
            "_time": Figure(plots.accuracy_over_time, plots.describe_accuracy_over_time),
            "_sharpness": Figure(
                plots.loss_around_minimum,
                plots.describe_loss_around_minimum,
                lambda result: any(result["sharpness"]["seeds"].values()),
            ),
        },
        summarized=True,
    ),
    "frontier": Kind(
        "Accuracy against cost",
        "The same training with many options of ESAM, with SAM and with controls, for as many epochs as SGD and for as "
        "much time.",
        tables.frontier,
        {"": Figure(plots.frontier, plots.describe_frontier)},
    ),
    "step_cost": Kind(
        "One step",
        "The time of one step of each optimizer, in turns on the same batches, and that of the passes which ESAM's "
        "step is made of, each timed by itself.",
        tables.step_cost,
        summarized=True,
    ),
    "memory": Kind(
        "Peak memory",
        "The most bytes that a step's tensors occupy at once, for each option of ESAM. ESAM must keep a copy of the "
        "weights that it perturbs; its last pass needs the activations of the selected samples alone. For convolutions "
        "activations count most, for wide linear layers weights do.",
        tables.memory,
    ),
    "host_time": Kind(
        "Host time",
        "What the host does in a step beside the passes and the base optimizer's step: on a GPU it is hidden where the "
        "passes take longer than their launches, and adds to a step where they do not.",
        tables.host_time,
    ),
    "rounding": Kind(
        "Weights in bf16",
        "A perturbation is smaller than what bf16 tells from zero beside a weight: rounded to nearest, part of it is "
        "lost. ESAM rounds it stochastically, so that on average all of it arrives, with noise.",
        tables.rounding,
    ),
    "operators": Kind(
        "Operators",
        "What ESAM does to the weights between its passes, over the weights of real models, beside the same in torch's "
        "foreach functions and in torch.compile.",
        tables.operators,
    ),
}

HEADLINE = Figure(
    lambda result, path: plots.headline(result, HEADLINES, path),
    lambda result: plots.describe_headline(result, HEADLINES),
)

SUMMARY = (
    "SAM, ESAM: what a step of each costs more than SGD's, in time. Gain: by how many percentage points of test "
    "accuracy ESAM exceeds the other, mean ± standard deviation over the seeds, from each of which all begin alike. "
    "Peak memory is ESAM's."
)

Results = dict[str, dict[str, Any]]  # by the names of their files, less the suffix


def by_kind(results: Results) -> Iterator[tuple[Kind, Results]]:
    """The kinds that have results, with these.

    Raises:
        ValueError: if a result is of no kind that is known, and would be left out silently.
    """
    for stem, result in results.items():
        if result.get("benchmark") not in KINDS:
            raise ValueError(
                f"{stem}.json names {result.get('benchmark')!r} as its benchmark, and the report knows only "
                f"{', '.join(KINDS)}: measure it anew, or remove it"
            )
    for name, kind in KINDS.items():
        if members := {stem: result for stem, result in results.items() if result["benchmark"] == name}:
            yield kind, members


def summary(results: Results) -> str:
    """The table over all results of what ESAM costs and buys."""
    return tables.summary(
        [result for kind, members in by_kind(results) if kind.summarized for result in members.values()]
    )


def as_markdown(results: Results) -> str:
    """All results as Markdown; the plots are files beside it."""
    parts = ["# Results", "What follows is made by `python -m benchmarks report` from the JSON files beside it."]
    parts += ["## Summary", SUMMARY, _escape(tables.narrow(summary(results)))]
    for kind, members in by_kind(results):
        parts += [f"## {kind.title}", kind.introduction]
        for stem, result in members.items():
            parts += [f"### {_escape(tables.subject(result))}", _escape(tables.narrow(kind.tables(result)))]
            parts += [_image(figure, result, f"{stem}{name}.svg") for name, figure in kind.plots(result)]
            for part in ("settings", "environment"):
                parts.append(f"{part.capitalize()} of [{stem}.json]({stem}.json): {_listed(result[part])}.")
    return "\n\n".join(parts) + "\n"


def as_page(results: Results) -> str:
    """All results as an HTML page that needs nothing from elsewhere."""
    sections = [
        {
            "title": kind.title,
            "introduction": kind.introduction,
            "results": [
                {
                    "id": stem,
                    "title": tables.subject(result),
                    "blocks": list(tables.blocks(kind.tables(result))),
                    "figures": [
                        page.inline_svg(figure.draw, result, f"{stem}{name}", figure.describe(result))
                        for name, figure in kind.plots(result)
                    ],
                    "details": {part.capitalize(): result[part] for part in ("settings", "environment")},
                }
                for stem, result in members.items()
            ],
        }
        for kind, members in by_kind(results)
    ]
    return page.render(introduction=SUMMARY, summary=list(tables.blocks(summary(results))), sections=sections)


def sections(results: Results, folder: str) -> dict[str, str]:
    """What documents may show between ``<!-- name -->`` and ``<!-- /name -->``, by that name.

    Args:
        results: of which they are made.
        folder: where the plots are, seen from the document.
    """
    swept = {stem: result for stem, result in results.items() if result["benchmark"] == "frontier"}
    costs = tables.costs(list(results.values()))
    headline, about = tables.headline(list(swept.values()), list(results.values()), HEADLINES).split("\n\n")
    first = [_image(HEADLINE, result, f"{folder}/{stem}_headline.svg") for stem, result in swept.items()][:1]
    headlines = [_escape(headline), *map(_filled, first), _escape(_filled(about))]
    frontiers = []
    for stem, result in swept.items():
        table, *about_it = tables.frontier(result).split("\n\n")
        image = _image(KINDS["frontier"].figures[""], result, f"{folder}/{stem}.svg")
        (sentences,) = [text for text in about_it if text.startswith(result["data"])]
        frontiers += [f"### {tables.task(result)}", _escape(tables.narrow(table)), _escape(sentences), image]
    return {
        "options": options_table(),
        "options:names": option_names(),
        "results:headline": "\n\n".join(headlines),
        "results:frontier": "\n\n".join(frontiers),
        "results:costs": "\n\n".join([_escape(costs), SUMMARY, _escape(tables.narrow(summary(results)))]),
    }


def update(document: str, shown: Mapping[str, str]) -> str:
    """A document with each section that it has markers of made anew.

    Args:
        document: its text.
        shown: the sections, by their names.

    Raises:
        ValueError: if it has none, or a marker of none that there is, or without its end.
    """
    names = re.findall(r"<!-- ([a-z:]+) -->", document)
    if not names:
        raise ValueError(f"no section to make is in it: <!-- {next(iter(shown))} -->, or another of {', '.join(shown)}")
    for name in names:
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = document.partition(begin)
        _, found, after = rest.partition(end)
        if name not in shown or not found:
            raise ValueError(f"{begin} needs {end} after it, and to be one of {', '.join(shown)}")
        document = "\n\n".join([before + begin, shown[name], end + after])
    return document


def option_names() -> str:
    """ESAM's options with their defaults, as a paragraph of lines that are not long."""
    text = ", ".join(f"`{option.name}={option.default!r}`" for option in OPTIONS.values())
    return _filled(text.replace("'", '"'))


def options_table() -> str:
    """ESAM's options with what they mean as a table in Markdown, not lined up, as its cells are sentences."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in OPTIONS.values():
        default = f'`"{option.default}"`' if isinstance(option.default, str) else option.default
        meaning = option.meaning + ("; may differ between parameter groups" if option.per_group else "")
        cells = (f"`{option.name}`", str(default), _escape(meaning).replace("|", r"\|"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write the page, the Markdown and its plots beside the results in ``folder``."""
    results = load(folder)
    write_whole(folder / "report.html", as_page(results))
    write_whole(folder / "report.md", as_markdown(results))
    for kind, members in by_kind(results):
        for stem, result in members.items():
            for name, figure in kind.plots(result):
                figure.draw(result, folder / f"{stem}{name}.svg")
            if kind is KINDS["frontier"]:
                HEADLINE.draw(result, folder / f"{stem}_headline.svg")


def _image(figure: Figure, result: dict[str, Any], file: str) -> str:
    """A plot in Markdown, with what is seen in it; brackets there would end the text."""
    text = re.sub(r"([][])", r"\\\1", _escape(figure.describe(result)))
    return f"![{text}]({file})"


def _filled(text: str) -> str:
    """A paragraph in lines that a text editor shows whole."""
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def _escape(text: str) -> str:
    """Text whose < and & are shown, and not taken for HTML in Markdown."""
    return html.escape(text, quote=False)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} `{str(value).replace('`', '')}`" for name, value in values.items() if value is not None)
