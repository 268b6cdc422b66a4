"""Marks for tests that need a certain system."""

import sys

import pytest

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals, limits, locks or forks")
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has it: /proc, /dev/full, an exchange of folders"
)
# A regular file that anyone may open, and that no one, not even root, can read from its beginning. On Linux.
UNREADABLE = "/proc/self/mem"
