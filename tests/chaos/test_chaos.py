"""The short storm: two minutes of what `make chaos` does for thirty."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MINUTES = 2


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_nothing_is_lost_stuck_or_leaked_in_a_short_storm() -> None:
    """Its output says how to repeat it (the seed), and where the logs and the database are when it fails."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--minutes", str(MINUTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate()
        finally:
            process.terminate()  # it leaves nothing behind
    print(said)
    assert process.returncode == 0, "its output says what is wrong"
