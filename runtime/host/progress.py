"""Progress of long work, as a notebook shows it."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

_SECONDS = 1.0  # after which a bar shows
# Takes what is done so far, and all there is to do.
Progress = Callable[[int, int], None]


def or_notebook_bar(progress: Progress | None, label: str, unit: str | None = None) -> Progress | None:
    """The caller's progress. Where there is none: in a notebook a bar, if it takes longer than a second; elsewhere nothing.

    Args:
        unit: what is counted; None for bytes.
    """
    if progress is not None or not _in_notebook():
        return progress
    # Without ipywidgets, tqdm's own choice of a bar prints a warning.
    kind = "notebook" if find_spec("ipywidgets") else "std"
    unit_of_bar = "B" if unit is None else f" {unit}"
    bar = import_module(f"tqdm.{kind}").tqdm(
        desc=label, unit=unit_of_bar, unit_scale=unit is None, delay=_SECONDS, leave=False
    )

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
