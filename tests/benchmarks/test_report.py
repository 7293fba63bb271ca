"""The report shows every result, needs nothing from elsewhere, and is the same whenever the results are."""

import copy
import html
import json
import re
from html.parser import HTMLParser
from itertools import chain, pairwise

import pytest

from benchmarks import record
from benchmarks.__main__ import COMMANDS
from benchmarks.__main__ import main as dispatch
from benchmarks.commands import frontier, memory, operators, report, rounding, step_cost, train
from benchmarks.report import documents, tables
from benchmarks.training.methods import METHODS

TINY = ["--width", "4", "--device", "cpu"]
VOID = {"meta", "link", "img", "br", "hr", "input"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A result of every kind, measured on next to nothing."""
    folder = tmp_path_factory.mktemp("results")
    output = ["--output", str(folder)]
    training = [*TINY, "--epochs", "1", "--sharpness-samples", "32"]
    train.main([*training, "--seeds", "2", "--optimizers", "sgd", "sam", "esam", *output])
    step_cost.main([*TINY, "--models", "small", "--batch-sizes", "16", "--rounds", "1", *output])
    frontier.main([*training, "--seeds", "1", "--rounds", "1", "--configurations", "sgd", "esam", *output])
    rounding.main([*TINY, "--epochs", "1", "--seeds", "1", *output])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "ROWS", ("sgd", "esam", "esam-element"))
        memory.main(["--device", "cpu", "--models", "tiny", *output])
        patch.setattr(operators, "MODELS", {"ResNet-18": [(3, 4), (5,)]})
        patch.setattr(operators, "_compiled", lambda *_: None)
        patch.setattr(operators.torch, "compile", lambda call: call)
        operators.main(["--device", "cpu", "--repeats", "1", *output])
    return folder


@pytest.fixture
def results(folder):
    return record.load(folder)


class Page(HTMLParser):
    """Elements, ids, references and visible text of a page, whose elements must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def test_the_page_loads_nothing_and_its_links_lead_somewhere(results):
    source = documents.as_page(results)
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [a[name] for _, a in page.elements for name in ("href", "src", "xlink:href") if name in a]
    references += re.findall(r"url\((.*?)\)", source)
    assert {"#train_digits_cpu", "#memory_cpu"} <= set(references)
    assert all(reference.startswith("#") and reference[1:] in ids for reference in references)
    assert "@import" not in source
    assert len(source) < 500_000


def test_the_page_shows_every_result_with_its_tables_plots_and_settings(results):
    page = Page(documents.as_page(results))
    assert {a["id"] for tag, a in page.elements if tag == "article"} == set(results)
    assert sum(tag == "svg" for tag, _ in page.elements) == 4
    for result in results.values():
        kind = documents.KINDS[result["benchmark"]]
        for block in tables.blocks(kind.tables(result)):
            cells = [block] if isinstance(block, str) else chain(block.columns, *block.rows)
            assert all(cell in page.text for cell in cells)
        for value in [*result["settings"].values(), *result["environment"].values()]:
            assert value is None or str(value) in page.text


def test_every_table_has_headers_and_a_caption(results):
    page = Page(documents.as_page(results))
    number = sum(tag == "table" for tag, _ in page.elements)
    assert (
        number == sum(tag == "caption" for tag, _ in page.elements) == sum(tag == "thead" for tag, _ in page.elements)
    )
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.elements if tag == "th")


def test_the_markdown_shows_every_result_and_its_plots(folder, results):
    markdown = documents.as_markdown(results)
    assert all(f"({stem}.json)" in markdown for stem in results)
    documents.write(folder)
    plots = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert plots == [
        "train_digits_cpu_cost.svg",
        "train_digits_cpu_time.svg",
        "train_digits_cpu_sharpness.svg",
        "frontier_digits_cpu.svg",
    ]
    assert all((folder / plot).stat().st_size > 1_000 for plot in plots)


def test_every_plot_says_what_is_seen_in_it(results):
    """Alike in both forms: the numbers of the result itself, and no text that would do for any result."""
    spoken = [attributes["aria-label"] for tag, attributes in Page(documents.as_page(results)).elements if tag == "svg"]
    written = re.findall(r"!\[(.*?)\]\(", documents.as_markdown(results))
    assert spoken == [html.unescape(text) for text in written]
    cost, time, sharpness, frontier = spoken
    trained, swept = results["train_digits_cpu"], results["frontier_digits_cpu"]
    for method in trained["methods"].values():
        accuracy = f"{method['label']} {method['test_accuracy_mean']:.2f} %"
        assert f"{accuracy} at {method['time_over_sgd']['median']:.3g} times SGD's time" in cost
        assert f"{accuracy} after " in time
    seeds = trained["sharpness"]["seeds"]["esam"]
    rise = sum(seed["gradient_rise"][-1] for seed in seeds) / len(seeds)
    assert f"{trained['methods']['esam']['label']} {rise:.3g}" in sharpness
    for one in swept["configurations"].values():
        point = f"{one['label']} ({one['equal_epochs']['test_accuracy']['mean']:.2f} % at "
        assert (point in frontier.partition("Pareto front: ")[2].partition(". At")[0]) == one["equal_epochs"][
            "on_front"
        ]


def test_an_eigenvalue_that_did_not_converge_is_marked(results):
    result = results["train_digits_cpu"]
    for seed, value, converged in zip(result["sharpness"]["seeds"]["esam"], (100.0, 300.0), (True, False), strict=True):
        seed["hessian"] |= {"value": value, "converged": converged}
    _, _, sharpness, about = tables.blocks(tables.train(result))
    row = next(row for row in sharpness.rows if row[0] == result["methods"]["esam"]["label"])
    assert row[sharpness.columns.index("top eigenvalue")] == "200 ± 140, 1 of 2 converged"
    others = [seed for name in ("sgd", "sam") for seed in result["sharpness"]["seeds"][name]]
    assert f"{1 + sum(seed['hessian']['converged'] for seed in others)} of 6 converged" in about


def test_brackets_do_not_end_the_text_of_a_plot(results):
    results["train_digits_cpu"]["methods"]["esam"]["label"] = "ESAM](x) ["
    markdown = documents.as_markdown(results)
    assert re.search(r"!\[Test accuracy [^][]*?ESAM\\\]\(x\) \\\[[^][]*\]\(train_digits_cpu_cost\.svg\)", markdown)


def test_results_without_sharpness_or_divergence_are_shown_too(results):
    """As they were before these were measured."""
    old = results["frontier_digits_cpu"]
    for one in old["configurations"].values():
        for panel in tables.PANELS:
            del one[panel]["diverged_seeds"]
            for run in one[panel]["runs"]:
                run["sharpness"] = None
                del run["diverged"]
    del old["sharpness"]
    table, _ = tables.blocks(tables.frontier(old))
    assert len(table.rows) == 2
    assert "Test accuracy over training time" in documents.as_markdown(results)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "no results are there"),
        ({"x.json": '{"benchmark": "guesses"}'}, "x.json names 'guesses'"),
        ({"x.json": "{"}, "Expecting property name"),
    ],
)
def test_a_folder_that_cannot_be_shown_is_refused(tmp_path, capsys, files, complaint):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        report.main(["--results", str(tmp_path)])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_the_report_is_made_of_the_results_alone(folder):
    def written():
        report.main(["--results", str(folder)])
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = written()
    for path in folder.iterdir():
        if path.suffix not in (".json", ".jsonl"):
            path.write_text("stale")
    assert written() == first


def test_nothing_that_a_result_says_becomes_markup(results):
    evil = '<img src="https://example.org/x"> & | a'
    for result in results.values():
        result["data"] = result["environment"]["cpu"] = evil
    results["train_digits_cpu"]["methods"]["esam"]["label"] = evil
    page = Page(documents.as_page(results))
    assert not any(tag == "img" for tag, _ in page.elements)
    assert page.text.count(evil) >= 3
    markdown = documents.as_markdown(results)
    assert "<img" not in re.sub("`.*?`", "", markdown)  # in code nothing is markup
    rows = [line for line in markdown.splitlines() if line.startswith("| &lt;img")]
    assert len(rows) >= 4  # a method in two tables, and two lines of the summary, in as many parts as these have
    assert all(r"&amp; \| a" in row for row in rows)


def test_a_result_of_an_unknown_kind_is_named(results):
    with pytest.raises(ValueError, match=r"other\.json names 'guesses' as its benchmark"):
        documents.as_page(results | {"other": {"benchmark": "guesses"}})


def test_the_summary_has_costs_and_gains_of_known_results():
    def curve(*accuracies):
        return [{"test_accuracy": accuracy} for accuracy in accuracies]

    methods = {
        name: {"time_over_sgd": {"median": cost}, "peak_memory_bytes": peak, "epochs": 2}
        for name, cost, peak in (("sgd", 1.0, 100), ("sam", 2.0, 130), ("esam", 1.75, 110))
    }
    curves = {
        "sgd": [curve(50.0, 90.0), curve(50.0, 92.0), curve(99.0)],  # the last was not finished
        "sam": [curve(50.0, 95.0), curve(50.0, 95.0), curve(99.0)],
        "esam": [curve(50.0, 94.0), curve(50.0, 94.0), curve(10.0)],
    }
    settings = {"model": "small", "batch_size": 8, "device": "cpu"}
    trained = {"data": "noise", "settings": settings, "methods": methods, "curves": curves}
    timed = {"data": "noise", "settings": settings, "methods": {name: methods[name] for name in ("sgd", "esam")}}
    (table,) = tables.blocks(tables.summary([trained, timed]))
    assert table.rows[0] == [
        "noise, small, batch 8, CPU",
        "+100 %",
        "+75 %",
        "",
        "+3.00 ± 1.41",
        "-1.00 ± 0.00",
        "1.10",
    ]
    assert table.rows[1][:6] == ["noise, small, batch 8, CPU", "", "+75 %", "", "", ""]


def test_a_document_is_rewritten_between_its_markers(results):
    shown = documents.sections(results, "plots")
    empty = "Title\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\ntext\n" for name in shown)
    once = documents.update(empty, shown)
    assert "old" not in once
    assert once.startswith("Title\n<!-- options -->\n")
    assert once.endswith("text\n")
    assert all(text in once for text in shown.values())
    assert "](plots/frontier_digits_cpu.svg)" in once
    assert "](plots/frontier_digits_cpu_headline.svg)" in once
    assert documents.update(once, shown) == once


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("no markers", "no section to make is in it: <!-- options -->, or another of"),
        ("<!-- options -->", "<!-- options --> needs <!-- /options --> after it"),
        ("<!-- guesses --><!-- /guesses -->", "needs <!-- /guesses --> after it, and to be one of options"),
    ],
)
def test_a_document_that_cannot_be_rewritten_is_refused(results, document, complaint):
    with pytest.raises(ValueError, match=complaint):
        documents.update(document, documents.sections(results, "plots"))


def test_what_the_readme_shows_first_is_that_of_the_results(results):
    result = results["frontier_digits_cpu"]
    shown = tables.headline([result], list(results.values()), ("sgd", "esam", "sam"))
    (rows,) = (block.rows for block in tables.blocks(shown) if block[0] == [
        "method", "time over SGD's", "noisy digits"
    ])  # fmt: skip
    assert [row[0] for row in rows] == ["SGD", "ESAM"]  # SAM was not measured
    esam = result["configurations"]["esam"]
    assert rows[1][2] == f"{esam['equal_epochs']['test_accuracy']['mean']:.2f}"
    step, cheaper = results["step_cost_cpu_small_b16"], copy.deepcopy(result)
    cost = 100 * (step["methods"]["esam"]["time_over_sgd"]["median"] - 1)
    cheaper["configurations"]["esam"]["time_over_sgd"]["median"] = cost / 100 + 0.5
    shown = tables.headline([cheaper], [step, cheaper], ("esam",))
    (rows,) = (block.rows for block in tables.blocks(shown) if isinstance(block, tables.Table))
    assert rows[0][1] == f"{cost - 50:+.0f} to {cost:+.0f} %"
    dearer = copy.deepcopy(step)
    dearer["methods"]["esam"]["time_over_sgd"]["median"] += 1
    assert f"ESAM {cost:+.0f} to {cost + 100:+.0f} %" in tables.costs([step, dearer])


def test_every_configuration_of_a_sweep_can_be_plotted(results, tmp_path):
    result = results["frontier_digits_cpu"]
    esam = result["configurations"]["esam"]
    result["configurations"] = dict.fromkeys(METHODS, esam)
    for figure in (documents.KINDS["frontier"].figures[""], documents.HEADLINE):
        figure.draw(result, tmp_path / "plot.svg")
        assert (tmp_path / "plot.svg").stat().st_size > 1_000
    for name in documents.HEADLINES:
        assert name in METHODS


def test_a_wide_table_becomes_several_that_fit():
    columns = ["name", *(f"column {i}" for i in range(9))]
    rows = [["one", *(f"{i} ± 0.{i}23456789" for i in range(9))], ["two", *["1"] * 4, *[""] * 5]]
    wide = tables.table(columns, rows)
    parts = list(tables.blocks(tables.narrow(f"above\n\n{wide}")))
    assert parts.pop(0) == "above"
    assert len(parts) > 1
    assert [column for part in parts for column in part.columns[1:]] == columns[1:]
    assert all(part.columns[0] == "name" for part in parts)
    assert [cell for part in parts for cell in part.rows[0][1:]] == rows[0][1:]
    assert max(len(line) for part in parts for line in tables.table(*part).splitlines()) <= tables.PAGE_WIDTH + 10
    assert [row[0] for row in parts[-1].rows] == ["one"]  # of the other there is nothing in it
    narrow = tables.table(*parts[0])
    assert tables.narrow(narrow) == narrow


def test_the_committed_report_is_that_of_the_committed_results():
    """If this fails: ``python -m benchmarks report``. How plots are drawn in detail is matplotlib's, and may change."""

    def without_plots(page):
        return re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL)

    results = record.load(record.RESULTS)
    assert without_plots((record.RESULTS / "report.html").read_text()) == without_plots(documents.as_page(results))
    assert (record.RESULTS / "report.md").read_text() == documents.as_markdown(results)
    for document, plots in report.DOCUMENTS.items():
        assert document.read_text() == documents.update(document.read_text(), documents.sections(results, plots))


def test_tables_line_up_and_are_read_back():
    columns, rows = ["name", "value"], [["a | b", "1"], ["longer", ""]]
    markdown = tables.table(columns, rows)
    lines = markdown.splitlines()
    assert all(len(a) == len(b) for a, b in pairwise(lines))
    assert lines[1] == "| ------ | ----: |"
    assert list(tables.blocks(f"above\n\n{markdown}\n\nbelow")) == ["above", (columns, rows), "below"]


def test_one_command_line_for_all(capsys):
    with pytest.raises(SystemExit) as stopped:
        dispatch(["report", "--help"])
    assert stopped.value.code == 0
    assert "--results FOLDER" in capsys.readouterr().out
    dispatch(["--help"])
    assert "  report " in capsys.readouterr().out
    for arguments, complaint in ([], "a command is needed"), (["guess"], "no such command: guess"):
        with pytest.raises(SystemExit, match=complaint) as stopped:
            dispatch(arguments)
        assert all(f"  {command} " in stopped.value.code for command in COMMANDS)


def test_operators_with_their_rivals(results):
    result = results["operators_cpu"]
    weights, samples, caption = tables.blocks(tables.operators(result))
    assert [tuple(row[:2]) for row in weights.rows] == [
        ("squared_norm", "ResNet-18"),
        ("perturb", "ResNet-18"),
        ("norm_and_perturb", "ResNet-18"),
        ("perturb_masked", "ResNet-18"),
        ("restore", "ResNet-18"),
        ("norm_and_perturb", "ResNet-18, 1 thread"),
    ]
    assert {row[0] for row in samples.rows} == {"select_top"}
    rivals = result["operators"][1]["rivals"]
    expected = rivals["foreach"]["us"] / rivals["esam_kernels"]["us"]
    assert weights.rows[1][weights.columns.index("foreach")] == f"{expected:.2f}"
    assert "backend" in caption
    assert json.dumps(result["settings"]["models"]) == '["ResNet-18"]'


def test_results_from_where_there_is_no_git_are_shown_too(results):
    for result in results.values():
        result["environment"] |= {"commit": None, "uncommitted_changes": False}
    assert "commit unknown; " in documents.as_markdown(results)
