"""The process in which a report is made: `python -m pgharness.report`, started by a worker."""

from __future__ import annotations

import base64
import json
from typing import Any

from pgharness import __version__, database, desk
from pgharness.database import Row
from pgharness.report.files import files_of
from pgharness.report.gathering import gather


def make(url: str, row: Row) -> dict[str, Any]:
    """Return what finish_report keeps of one that was asked for: its files."""
    with database.snapshot(url) as connection:
        report = gather(connection, [str(run) for run in row["run_ids"]], alpha=row["alpha"])
    files = [
        {"path": f.path, "media_type": f.media_type, "content": base64.b64encode(f.content).decode()}
        for f in files_of(report, row["formats"])
    ]
    return {"title": report.title, "version": __version__, "files": json.dumps(files)}


if __name__ == "__main__":
    desk.serve("report", make)
