"""Every filter has a manual page that renders."""

import shutil
import subprocess
from pathlib import Path

import pytest

FILTERS = Path(__file__).parents[2] / "filters"


@pytest.mark.parametrize("plugin", sorted(path.parent.name for path in FILTERS.glob("*/plugin.py")))
def test_the_manual_is_there_and_renders(plugin):
    if shutil.which("podchecker") is None:
        pytest.skip("needs podchecker (package perl)")
    page = FILTERS / plugin / f"nbdkit-rewind-{plugin}-plugin.pod"
    done = subprocess.run(["podchecker", "-warnings", page], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
