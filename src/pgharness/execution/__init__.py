"""Running items: load a slice, ask the models, record what came of it.

The promise: an item's outcome is durable before its slice is acknowledged; no connection is held while a model is
asked; a place is free for the next call before the last one's outcome is written; a cancelled run's calls are aborted.
Running a slice twice does only what is missing.
"""

from pgharness.execution.batches import Batches
from pgharness.execution.engine import Engine
from pgharness.execution.slices import HandedBack, Slice

__all__ = ["Batches", "Engine", "HandedBack", "Slice"]
