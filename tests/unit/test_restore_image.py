"""How qemu-img writes a restored image: past the host's page cache where the file system takes that."""

from __future__ import annotations

import errno

import pytest

from appliance.restore import image


@pytest.fixture
def new(tmp_path):
    (path := tmp_path / "disk").touch()
    return path


def test_a_file_system_that_refuses_a_direct_write_is_seen_on_a_new_file(new, monkeypatch):
    """Nothing can be read in a new file, so that a read succeeds says nothing of it."""
    def refuses(*_):
        raise OSError(errno.EINVAL, "no direct writes here")

    monkeypatch.setattr(image.os, "pwritev", refuses)
    assert image._cache(new, 1 << 20) == ["-t", "writeback"]


def test_a_size_of_no_whole_blocks_goes_through_the_page_cache(new):
    """On sectors of 4 KiB the file would get longer."""
    assert image._cache(new, (1 << 20) + 512) == ["-t", "writeback"]
    assert new.stat().st_size == 0
