"""A fleet: files of requests, carried out by Ray on any number of machines.

A thin layer over `runtime.jobs`. The input is cut into parts of so many requests, the same ones whatever the number of
workers. A part is one task of one worker and one file of the output, which is there complete or not at all:

    RequestFiles (reads parts) -> Worker (holds a model) -> Place.write

Needs the extra `ray`; importing the package raises MissingExtraError where that isn't installed.
"""

import os
from importlib.util import find_spec

from gpt2onnx.errors import MissingExtraError

for _package in (
    "ray",
    "pyarrow",
    "fsspec",
):  # found, not imported: each process of Ray would wait seconds for ray.data
    if find_spec(_package) is None:
        raise MissingExtraError("The engine ray", _package, "ray")

# Ray reads these when it is imported: it is to report to nobody, unless the user wants that, and to draw no bars.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
