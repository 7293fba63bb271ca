"""What repeated, interleaved measurements amount to, on timings whose truth is known."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.commands import step_cost
from benchmarks.measuring.clock import ratio, spread, turn

COSTS = {"sgd": 0.2, "sgd-again": 0.2, "sam": 0.4, "esam": 0.35}
PARTS = {"ascend": 0.17, "look": 0.07, "descend": 0.1, "base step": 0.01}


class Machine:
    """A clock on which each piece of work takes its cost, times what the machine makes of it at that time.

    It slows down by half as it gets warm, and is jittery: 3 % each time, and one time in twenty a multiple. What comes
    after SAM finds its caches full, and is 3 % slower.
    """

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.now = 0.0
        self.last = ""

    def run(self, name: str, cost: float) -> float:
        drift = 1.5 - 0.5 * np.exp(-self.now / 60)
        outlier = self.random.uniform(1.5, 5) if self.random.random() < 0.05 else 1.0
        after_sam = 1.03 if self.last == "sam" else 1.0
        seconds = cost * drift * outlier * after_sam * self.random.normal(1, 0.03)
        self.now, self.last = self.now + seconds, name
        return float(seconds)


def rounds(machine: Machine, count: int) -> Iterator[dict[str, float]]:
    names = [*COSTS, *PARTS]
    for number in range(count):
        order = [names[i] for i in turn(len(names), number)]
        yield {name: machine.run(name, (COSTS | PARTS)[name]) for name in order}


def measured(seed: int, count: int = 40) -> dict:
    table = list(rounds(Machine(seed), count))
    return {
        "methods": {name: [row[name] for row in table] for name in COSTS},
        "parts": {name: [row[name] for row in table] for name in PARTS},
        "sums": {name: [sum(row[part] for part in PARTS) for row in table] for name in ("parts", "floor")},
        "agreements": [(0.9, 1.0), (1.0, 0.5)],
    }


@pytest.mark.parametrize("count", [1, 2, 5, 6, 13])
def test_turns_give_every_entry_every_place_and_every_predecessor_equally_often(count):
    turns = [turn(count, number) for number in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in turns)
    places = Counter(place for order in turns for place in enumerate(order))
    assert set(places.values()) == {2}
    after = Counter(pair for order in turns for pair in pairwise(order))
    assert len(after) == count * (count - 1)
    assert set(after.values()) <= {2}


@pytest.mark.parametrize("seed", range(5))
def test_interleaved_ratios_recover_the_truth_that_medians_of_times_miss(seed):
    times = measured(seed, count=400)["methods"]
    assert ratio(times["sam"], times["sgd"]).median == pytest.approx(2, rel=0.01)
    assert ratio(times["esam"], times["sgd"]).median == pytest.approx(1.75, rel=0.01)
    assert spread(times["sgd"]).median > 1.1 * COSTS["sgd"]
    # One method after the other, as if each had been measured by itself, meets the drift.
    machine = Machine(seed)
    alone = {name: [machine.run(name, COSTS[name]) for _ in range(100)] for name in ("sgd", "sam")}
    assert spread(alone["sam"]).median / spread(alone["sgd"]).median != pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_a_summary_finds_no_difference_of_sgd_from_itself_and_no_rest_where_there_is_none(seed):
    times = measured(seed, count=60)
    # The whole step is what its parts are and one hundredth.
    times["methods"]["esam"] = [1.01 * sum(parts) for parts in zip(*times["parts"].values())]
    summary = step_cost.summarize(times)
    assert abs(summary["aa_difference"]) < 0.02
    assert summary["whole_over_parts"]["median"] == pytest.approx(1.01)
    assert summary["whole_over_floor"]["median"] == pytest.approx(1.01)
    left_over, total = (summary["parts"][name]["seconds"]["median"] for name in ("left over", "sum of the parts"))
    assert left_over == pytest.approx(0.01 * total)


@pytest.mark.parametrize("seed", range(5))
def test_parts_that_are_timed_one_by_one_sum_up_to_the_whole(seed):
    summary = step_cost.summarize(measured(seed, count=400))
    assert summary["whole_over_parts"]["median"] == pytest.approx(1, rel=0.03)
    assert summary["methods"]["esam"]["time_over_sgd"]["median"] == pytest.approx(
        summary["parts"]["sum of the parts"]["time_over_sgd"]["median"], rel=0.03
    )


def test_a_summary_says_what_was_measured():
    summary = step_cost.summarize(measured(0, count=7))
    assert summary["rounds"] == 7
    assert summary["steering"] == {"cosine": pytest.approx(0.95), "overlap": 0.75}
    assert summary["methods"]["sgd"]["time_over_sgd"] == {"median": 1, "low": 1, "high": 1}
    assert list(summary["parts"]) == [*PARTS, "sum of the parts", "left over"]
