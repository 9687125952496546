"""What killed processes have left in the cache goes."""

from __future__ import annotations

import os
import time

from appliance.capture.collect import sweep


def test_folders_of_fetched_segments_that_nobody_reads_any_more_go(tmp_path):
    """P5-31: each may be as large as the journal; one that is in use is young."""
    for name in ("journal-old", "journal-young", "chunks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "segment").write_bytes(b"x")
    past = time.time() - 2 * 86400
    for name in ("journal-old", "chunks"):
        os.utime(tmp_path / name, (past, past))
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["chunks", "journal-young"]
