"""On which file systems a repository is lost with its host."""

from __future__ import annotations

import pytest

from appliance.store.backend.place import file_system, on_this_host

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/far\\040away rw,relatime shared:2 - {kind} server:/export rw
31 30 8:2 / /mnt/far\\040away/back rw,relatime - xfs /dev/sdb1 rw
32 22 0:41 / /srv rw - autofs systemd-1 rw
33 32 0:42 / /srv rw - cifs //server/share rw
34 22 8:3 / /mnt/farther rw - btrfs /dev/sdc1 rw
broken line
"""


@pytest.fixture
def mounts(tmp_path):
    def made(kind="nfs4"):
        path = tmp_path / "mountinfo"
        path.write_text(MOUNTS.format(kind=kind))
        return path

    return made


@pytest.mark.parametrize(
    ("url", "kind"),
    [("/var/lib/rewind/repository", "ext4"), ("/mnt/far away/web", "nfs4"), ("/mnt/far away/back/web", "xfs"),
     ("file:///mnt/far%20away/web", "nfs4"), ("/mnt/farther", "btrfs"), ("/srv/web", "cifs"), ("/", "ext4")],
)  # fmt: skip
def test_a_folder_lies_on_the_mount_that_is_nearest(mounts, url, kind):
    assert file_system(url, mounts()) == kind


@pytest.mark.parametrize("url", ["s3://bucket/prefix?endpoint=http://h", "memory://x"])
def test_what_is_no_folder_lies_on_no_file_system(mounts, url):
    assert file_system(url, mounts()) == on_this_host(url, mounts()) == ""


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "ceph", "fuse", "fuse.glusterfs", "fuse.sshfs", "9p", "virtiofs", "lustre"]
)
def test_a_network_keeps_what_a_host_loses(mounts, kind):
    assert on_this_host("/mnt/far away/web", mounts(kind)) == ""


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", "never-heard-of"])
def test_what_is_not_known_to_be_far_is_here(mounts, kind):
    """Promise 2: a file system of which nothing is known does not make a promise."""
    assert on_this_host("/mnt/far away/web", mounts(kind)) == kind


def test_without_a_list_of_mounts_nothing_is_promised(tmp_path):
    assert on_this_host("/var/lib/rewind/repository", tmp_path / "none") == "unknown file system"
