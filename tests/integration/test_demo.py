"""The demo is the first thing a person sees of the appliance, so it is a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_demo(*options: str, timeout: float) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo", "--json", *options], cwd=ROOT, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert done.stdout.strip(), done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, f"{result}\n{done.stderr}"
    assert result["type"] == "demo"
    assert result["ok"] is True
    assert all(result["verified"].values())
    for key in ("disk_bytes", "changed_bytes", "moved_bytes", "points", "pause_ms", "answer_seconds"):
        assert result[key] > 0, key
    assert result["moved_bytes"] < result["disk_bytes"] / 4
    return result


@pytest.mark.timeout(300)
def test_tiny_demo(libvirt_uri):
    """P5-01 P5-23: recorded, damaged, brought back to the write before, undone, forward again."""
    result = run_demo("--tiny", timeout=1200)
    assert result["verified"]["every_write_is_recorded"]


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_tiny_demo_by_points(libvirt_uri):
    """P5-02: the same with a point every few seconds."""
    run_demo("--tiny", "--epochs", timeout=280)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_debian_demo(libvirt_uri):
    """The same with systemd, PostgreSQL and ssh in the guest."""
    result = run_demo(timeout=880)
    assert result["verified"]["rows"]
