"""Many images at once, by the command line: each is what it is when it is built alone."""

from __future__ import annotations

import shutil
from contextlib import ExitStack

import pytest

from tests.guests import clients
from tests.support import world
from tests.support.imagebatch import at_once, build, contents, jobs
from tests.support.imagery import Imagery


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_eight_builds_at_once_equal_their_single_builds(libvirt_uri, tmp_path):
    """P6-05, P6-29, I6: two clients, two instants, two targets, all together; to the last byte of every file."""
    images = world.images_folder("at-once")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, images, ignore_errors=True)
        wanted = jobs(stack.enter_context(Imagery(images, clients.build(name))) for name in ("mbr", "dracut"))
        assert len(wanted) == 8
        together, alone = tmp_path / "together", tmp_path / "alone"
        at_once(wanted, together)
        for job in wanted:
            build(job, alone)
            assert contents(together / job.name) == contents(alone / job.name), job.name
        # Their media are of eight kinds: a build that took another's files would have been equal, too.
        media = [contents(alone / job.name) for job in wanted]
        assert len({one.get("rewind.iso") or one["rewind.esp.img"] for one in media}) == 8
        assert sorted(one.name for one in together.iterdir()) == sorted(job.name for job in wanted)
