"""Fleet: request files run by Ray on any number of machines.

The input is cut into parts of equal size, whatever the number of workers. A part is one Ray task and one output file:

    Job.parts -> run.submit -> worker.carry_out (on any machine) -> Place.write

Importing the package raises MissingExtraError where the extra `ray` isn't installed.
"""

import os
from importlib.util import find_spec

from gpt2onnx.errors import MissingExtraError

for _package in ("ray", "pyarrow", "fsspec"):
    if find_spec(_package) is None:
        raise MissingExtraError("The engine ray", _package, "ray")

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report to Ray's makers
os.environ.setdefault("RAY_task_oom_retries", "4")  # as for workers that die otherwise; Ray's default has no end
