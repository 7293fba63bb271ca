"""From the settings and a step's number: whether the step is sharp, what passes it makes, and how far it goes uphill.

Pure functions: nothing here imports torch.
"""

from .options import GroupSettings, Settings


def is_sharp(settings: Settings, number: int) -> bool:
    """Whether the step of this number is a sharpness-aware one, if there is anything to perturb."""
    return number >= settings.start and (number - settings.start) % settings.interval == 0


def passes(settings: Settings, sizes_known: bool = True) -> tuple[str, ...]:
    """The passes of a sharpness-aware step, each a forward of the micro-batches.

    ===========  =========================  ======================================
    ``survey``   at w, all rows             losses, without a graph
    ``ascend``   at w, ``ascent_share``     losses and the drawn weights' gradient
    ``look``     at w + e, all rows         losses, without a graph
    ``descend``  at w + e, the selected     losses and all weights' gradient
    ===========  =========================  ======================================

    Args:
        settings: those of the step.
        sizes_known: whether it is known without a forward how many rows each micro-batch has.
    """
    ascends = settings.ascent == "gradient"
    selects = settings.gamma < 1
    looks = selects and settings.selection == "increase"
    if ascends and settings.ascent_share == 1:
        surveys = False  # the ascent finds all losses itself
    else:
        needs_losses = selects and settings.selection != "random"
        needs_sizes = selects or ascends
        surveys = needs_losses or (needs_sizes and not sizes_known)
    runs = {"survey": surveys, "ascend": ascends, "look": looks, "descend": True}
    return tuple(name for name, run in runs.items() if run)


def draws_rows(settings: Settings) -> bool:
    """Whether a sharpness-aware step runs on some rows alone, for which losses have to be those of rows."""
    return settings.gamma < 1 or (settings.ascent == "gradient" and settings.ascent_share < 1)


def coefficient(settings: Settings, own: GroupSettings) -> float:
    """The radius of a group's weights, divided by beta as in ESAM's code; negative to go against what is climbed along.

    A first moment adds gradients up, and steps go against it: uphill is where they came from. The sign is that of
    MSAM's authors (arXiv 2401.12033); many other implementations have the other one, which diverges.
    """
    sign = -1.0 if settings.ascent == "momentum" else 1.0
    return sign * own.rho / settings.beta
