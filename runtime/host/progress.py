"""Progress of long work, as a notebook shows it."""

import sys
from collections.abc import Callable

# Takes what is done so far, and all there is to do.
Progress = Callable[[int, int], None]


def shown(progress: Progress | None, label: str, unit: str | None = None) -> Progress | None:
    """The caller's progress. Where there is none: in a notebook a bar, elsewhere nothing.

    Args:
        progress: the caller's.
        label: of the bar.
        unit: what is counted; None for bytes.
    """
    if progress is not None or not _in_notebook():
        return progress
    from tqdm.auto import tqdm

    bar = tqdm(desc=label, unit="B" if unit is None else f" {unit}", unit_scale=unit is None)

    def move(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return move


def _in_notebook() -> bool:
    # A shell of IPython has a kernel where a notebook's page talks to it; in a terminal it has none.
    interactive = sys.modules.get("IPython")
    return hasattr(interactive.get_ipython(), "kernel") if interactive is not None else False
