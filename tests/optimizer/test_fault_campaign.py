"""The fault campaign in short: whatever lands in a step, at any instant and again in the rollback, nothing is lost.

``make attack`` runs it for ten minutes. What is under fire, how exceptions land and what is compared is in attack.py.
"""

import pytest
from attack import WARM_UP, WAYS, besiege, cells, table

SHORT = 4  # tries in each cell
LONG = WARM_UP + 30  # in one of each way's, to see leaks


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost(way: str) -> None:
    sieges = [
        besiege(cell, LONG if i == 0 else SHORT) for i, cell in enumerate(cell for cell in cells() if cell.way == way)
    ]
    landed = sum(siege.counts["landed"] for siege in sieges)
    lost = [siege for siege in sieges if siege.counts["lost"] or siege.counts["leak"]]
    assert not lost, "\n".join(
        [
            "",
            table(sieges, lambda cell: f"{cell.backend}, {cell.configuration}, {cell.phase}", way),
            *(f"{siege.cell}: {example}" for siege in lost for example in siege.examples[:2]),
        ]
    )
    assert landed > len(sieges)
