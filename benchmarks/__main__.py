"""``python -m benchmarks COMMAND ...`` runs ``benchmarks.commands.COMMAND``."""

import sys
from importlib import import_module

from .record import UnwritableError

# Imported only when asked for: each brings libraries of its own.
COMMANDS = {
    "bench": "what SGD, SAM and ESAM cost and buy here, in minutes, with a table and a page",
    "train": "accuracy, time and memory of SGD, SAM and ESAM on a whole training",
    "step_cost": "the time of one step and of its passes",
    "frontier": "accuracy against cost over ESAM's options",
    "operators": "the operators by themselves, beside foreach and torch.compile",
    "memory": "peak memory for each option of ESAM",
    "host_time": "the host's part of a step, and the operators that it calls",
    "rounding": "what stochastic rounding of the perturbation does to weights in bf16",
    "gpu": "all that a GPU is needed for, within ten minutes, and what is left in the next",
    "unpack": "a pack of JPEG files as arrays, for machines without pillow",
    "report": "the results of all of these as a page, as Markdown, and in README and docs",
}


def main(argv: list[str]) -> None:
    """Run the command, or say which there are."""
    if argv and argv[0] in COMMANDS:
        try:
            import_module(f"benchmarks.commands.{argv[0]}").main(argv[1:])
        except UnwritableError as error:
            sys.exit(f"python -m benchmarks {argv[0]}: {error}")
        except KeyboardInterrupt:
            print(f"\npython -m benchmarks {argv[0]}: stopped; what it has saved is whole", file=sys.stderr)
            sys.exit(130)
        return
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    usage = "\n".join(["usage: python -m benchmarks COMMAND [--help]", "", *lines])
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
    else:
        sys.exit(f"{usage}\n\n{f'no such command: {argv[0]}' if argv else 'a command is needed'}")


if __name__ == "__main__":
    sys.argv[0] = " ".join(["python -m benchmarks", *sys.argv[1:2]])  # what argparse shows as the command
    main(sys.argv[1:])
