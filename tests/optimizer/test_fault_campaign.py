"""The fault campaign in short: whatever lands in a step, at any instant and again in the rollback, nothing is lost.

``make attack`` runs it for ten minutes. What is under fire, how exceptions land and what is compared is in attack.py.
"""

import pytest
from attack import WARM_UP, WAYS, Cell, besiege, cells, table


def tries(cell: Cell) -> int:
    if cell.backend == "triton":
        return 1  # in the interpreter each takes a second
    if (cell.configuration, cell.phase) == ("default", "backward") and cell.backend == "native":
        return WARM_UP + 24  # enough to see a leak
    return 16 if cell.phase == "restore" else 3  # which is short, and has few instants


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost(way: str) -> None:
    results = [besiege(cell, tries(cell)) for cell in cells() if cell.way == way]
    landed = sum(result.counts["landed"] for result in results)
    lost = [result for result in results if result.counts["lost"] or result.counts["leak"]]
    assert not lost, "\n".join(
        [
            "",
            table(results, lambda cell: f"{cell.backend}, {cell.configuration}, {cell.phase}", way),
            *(f"{result.cell}: {example}" for result in lost for example in result.examples[:2]),
        ]
    )
    assert landed > len(results)
