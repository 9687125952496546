"""Every change of a block graph, once for all drivers. Each function either ends or puts the guest's own node back.

`base` is the ground: reading, pausing, swapping, cleaning. `epoch` and `tap` are recipes on it; a revert has three
parts: `chain` (what it looks like), `switching` and `retrieval`.
"""

from __future__ import annotations

__all__ = ["base", "epoch", "nodes", "pulse", "survey"]
