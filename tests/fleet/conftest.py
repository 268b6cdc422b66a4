"""Ray takes seconds to import, so these tests are looked at only where tests of the system run."""

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leaves the folder out of all other runs."""
    return True if "not system" in config.option.markexpr else None
