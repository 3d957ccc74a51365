"""How this process would make a run: versions of Python and packages, and the git state of its working directory."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess


def environment() -> dict[str, object]:
    """Return how this process would make a run: versions, and the git state of its working directory."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {found.name: found.version for found in sorted(importlib.metadata.distributions(), key=_name)},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _name(distribution: importlib.metadata.Distribution) -> str:
    return distribution.name.lower()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
