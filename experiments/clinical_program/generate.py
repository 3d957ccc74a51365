#!/usr/bin/env python3
"""A note writer that is a program: a consultation as JSON on standard input, a note as JSON on standard output.

It listens as a scribe would, some turns at a time (a cycle), and remembers the last part of the cycle before (the
overlap). Patients' words become the history, a clinician's statements the findings, and what begins like an
instruction the plan. It stands for any program of yours: what it reads and prints is all that pgharness needs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

PATIENT_SIDE = {"patient", "parent", "carer"}
TURNS_PER_CYCLE = 5
SHORT_ANSWER = 60  # characters below which an answer says little without its question
INSTRUCTION = re.compile(
    r"\b(suggest|advise|prescri\w+|refer\w*|start|stop|use|keep|repeat|review|come back|bring|call|paracetamol)\b",
    re.IGNORECASE,
)

Turn = dict[str, Any]


def cycles(turns: list[Turn], overlap: int) -> Iterator[tuple[list[Turn], list[Turn]]]:
    """Yield what is remembered and what is new, cycle by cycle; overlap is a percentage of the cycle before."""
    remembered: list[Turn] = []
    for start in range(0, len(turns), TURNS_PER_CYCLE):
        new = turns[start : start + TURNS_PER_CYCLE]
        yield remembered, new
        kept = len(new) * min(overlap, 100) // 100
        remembered = new[len(new) - kept :]


def write_note(turns: list[Turn], overlap: int) -> dict[str, list[str]]:
    """Return the note's sections."""
    note: dict[str, list[str]] = {"history": [], "findings": [], "plan": []}
    for remembered, new in cycles(turns, overlap):
        question = next((turn["text"] for turn in reversed(remembered) if turn["text"].endswith("?")), "")
        for turn in new:
            text = str(turn["text"]).strip()
            if text.endswith("?"):
                question = text
            elif str(turn.get("speaker", "")).lower() in PATIENT_SIDE:
                note["history"].append(f"{question} {text}" if len(text) < SHORT_ANSWER and question else text)
            else:
                note["plan" if INSTRUCTION.search(text) else "findings"].append(text)
    return note


def main() -> None:
    case = json.load(sys.stdin)["case"]
    consultation = case["input"]
    turns = consultation["transcript"] if isinstance(consultation, dict) else consultation
    note = write_note(turns, int(os.environ.get("PGHARNESS_OVERLAP", "100")))
    if os.environ.get("PGHARNESS_MODEL") == "brief":
        note = {section: lines[:3] for section, lines in note.items()}
    print(f"{case['name']}: {sum(map(len, note.values()))} lines", file=sys.stderr)
    json.dump(note, sys.stdout)


if __name__ == "__main__":
    main()
