"""The process in which an analysis is made: `python -m pgharness.analysis`, started by a worker."""

from __future__ import annotations

import json
from typing import Any

from pgharness import database, desk
from pgharness.analysis.kinds import analyse, library_versions
from pgharness.database import Row


def make(url: str, row: Row) -> dict[str, Any]:
    """Return what finish_analysis keeps of one that was asked for, with the digest of what was read."""
    with database.snapshot(url) as connection:
        digest = database.call(connection, "analysis_digest", run_ids=row["run_ids"])[0]["analysis_digest"]
        found = analyse(connection, row["kind"], row["run_ids"], row["options"])
    result = json.dumps(found.as_dict(), allow_nan=False)
    return {"inputs_digest": digest or "", "library_versions": library_versions(), "result": result}


if __name__ == "__main__":
    desk.serve("analysis", make)
