"""How often parts were begun: Ray repeats what a dead worker left, and what kills every worker must not go on for ever."""

from collections import Counter

import ray

MOST_ATTEMPTS = 5


@ray.remote(num_cpus=0)
class Attempts:
    """Counts for all workers of a job."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, part: str) -> int:
        """Notes that a part, by its name, is begun; returns how often it was."""
        self._begun[part] += 1
        return self._begun[part]
