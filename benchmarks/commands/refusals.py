"""How a command says what it cannot do."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Let a ValueError inside the block, which says what in the command line cannot be, end it as one of argparse's."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
