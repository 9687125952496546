"""What doctor says of hosts that are not this one."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.capture.choice import choose
from appliance.capture.protection import Protection
from appliance.cli.app import VERBS
from appliance.config import Home
from appliance.errors import ConnectError, DomainNotFound, NotSupported
from appliance.hypervisor.base import Disk, DomainState, QemuProcess
from appliance.service import Session
from appliance.service.doctor import domains, examine, fix, host, known
from appliance.service.setup import init


class Domain:
    saved = False

    def __init__(self, name="web", version=(10, 0, 2), iothread=False, refusal="", definition="<domain/>", uid=0):
        self.name, self.uuid, self.uri = name, f"uuid-{name}", "test:///"
        self._version, self._definition, self._uid = version, definition, uid
        self._disks = [
            Disk(
                "vda",
                "/images/a.qcow2",
                "qcow2",
                1 << 20,
                bus="virtio",
                persistent=True,
                iothread=iothread,
                refusal=refusal,
            )
        ]

    def state(self):
        return DomainState.RUNNING

    def disks(self):
        return self._disks

    def definition(self):
        return self._definition

    def managed_save(self):
        return self.saved

    def process(self):
        return QemuProcess(1, self._uid, self._uid, self._version)

    def monitor(self):
        return None


class Hypervisor:
    uri = "test:///"

    def __init__(self, *there, versions=None):
        self._there = {one.name: one for one in there}
        self._versions = versions or {"qemu": "10.0.2", "libvirt": "11.3.0"}

    def domains(self):
        return list(self._there)

    def domain(self, name):
        if name not in self._there:
            raise DomainNotFound(domain=name, uri=self.uri)
        return self._there[name]

    def versions(self):
        return self._versions

    def close(self):
        pass


@pytest.fixture
def session(tmp_path, monkeypatch):
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rw") as folder, Session(Home(Path(folder) / "home"), "test:///") as found:
        init(found)
        monkeypatch.setattr("appliance.hypervisor.graph.base.leftovers", lambda _monitor: [])
        found.use = lambda *there, **rest: monkeypatch.setattr(
            found, "hypervisor", lambda _uri=None: Hypervisor(*there, **rest), raising=False
        )
        found.use()
        yield found


def text(checks, status=None):
    return " | ".join(f"{one.finding} -> {one.remedy}" for one in checks if status in (None, one.status))


@pytest.mark.parametrize(
    ("version", "iothread", "words"),
    [
        ((7, 2, 22), True, "aborts the guest when a reader disconnects"),
        ((7, 2, 22), True, "pull-mode backup by another tool"),
        ((7, 2, 22), False, ""),
        ((8, 1, 0), True, "hang"),
        ((8, 2, 5), True, "hang"),
        ((9, 0, 0), True, ""),
        ((10, 0, 13), True, "kills the guest when it is suspended or reset"),
        ((10, 0, 13), False, ""),
        ((10, 1, 0), False, "mirror"),
        ((10, 2, 9), False, "mirror"),
        ((11, 0, 0), True, ""),
    ],
)
def test_builds_that_endanger_guests_are_named(session, version, iothread, words):
    session.use(Domain(version=version, iothread=iothread))
    found = text(domains.check(session, None), "warn")
    assert (words in found) if words else found == "", found


def test_every_defect_has_a_remedy_and_a_span():
    for one in known._DEFECTS:
        assert one.first < one.end and one.what and one.remedy


@pytest.mark.parametrize(
    ("text_", "version"), [("7.2.22", (7, 2, 22)), ("10.0.2-rc1", (10, 0, 2)), ("9", (9,)), ("x", (0,)), ("", (0,))]
)
def test_versions_are_read(text_, version):
    assert known.parse(text_) == version


def test_old_hypervisors_are_failures(session):
    session.use(versions={"qemu": "6.2.0", "libvirt": "8.0.0"})
    assert [one.status for one in host.hypervisor(session)] == ["fail", "fail"]


def test_a_disk_that_cannot_be_protected_is_told_with_the_reason(session):
    session.use(Domain(refusal="virtio-scsi with an iothread cannot be switched"))
    found = text(domains.check(session, None), "warn")
    assert "virtio-scsi with an iothread cannot be switched" in found


def test_a_refused_disk_of_a_domain_that_is_protected_whole_is_a_failure():
    """It is in no point; who named no disk meant all of them."""
    domain, whole = Domain(refusal="it has an iothread"), Protection("web", "uuid", "test:///", (), "id", "t")
    assert [one.status for one in domains._disks("domain web", domain, whole)] == ["fail"]
    assert [one.status for one in domains._disks("domain web", domain, replace(whole, disks=("vdz",)))] == ["warn"]


def test_when_no_disk_is_left_the_reason_is_told():
    domain = Domain(refusal="it has an iothread")
    with pytest.raises(NotSupported, match="it has an iothread"):
        choose(domain, Protection("web", "uuid", "test:///", (), "id", "t"), [])


@pytest.mark.parametrize(("model", "remedy"), [("apparmor", "apparmor.d"), ("selinux", "semanage")])
def test_confinement_is_told_with_what_must_be_allowed(session, model, remedy):
    session.use(Domain(definition=f"<domain><seclabel type='dynamic' model='{model}'/></domain>"))
    assert remedy in text(domains.check(session, None), "warn")


def test_a_folder_that_qemu_cannot_pass_through_is_named(session):
    session.home.path.parent.chmod(0o700)
    session.use(Domain(uid=64055))
    found = list(domains.check(session, None))
    failed = [one for one in found if one.status == "fail"]
    if os.stat(session.home.path.parent).st_uid == 64055:
        pytest.skip("runs as that user")
    assert str(session.home.path.parent) in text(failed)
    assert "chmod" in failed[0].remedy
    session.home.path.parent.chmod(0o755)
    assert not [one for one in domains.check(session, None) if one.status == "fail"]


def test_what_an_interrupted_point_left_is_told(session, monkeypatch):
    monkeypatch.setattr("appliance.hypervisor.graph.base.leftovers", lambda _monitor: ["rw-ep0-cbw"])
    session.use(Domain())
    assert "rw-ep0-cbw" in text(domains.check(session, None), "warn")
    with session.hold("uuid-web", "web", "point web"):
        assert "rw-ep0-cbw" not in text(domains.check(session, None))


def put_revert(home):
    from appliance.restore import intent

    made = intent.Intent(
        id="i", domain="web", uuid="uuid-web", uri="test:///", verb="revert", point="0001abcd00000001",
        safety_point="0003abcd00000003", timeline="t2", instant=True, was="running",
        rate=0, started=0.0, repository="", phase=intent.Phase.SWITCHED,
    )  # fmt: skip
    intent.save(home, made)


@pytest.mark.parametrize("there", [True, False])
def test_a_revert_that_nobody_ends_is_a_failure(session, there):
    """Also of a domain that is gone: its disks alone are neither state."""
    put_revert(session.home)
    session.use(*([Domain(), Domain("db")] if there else [Domain("db")]))
    for only in ("web", None):
        found = [one for one in domains.check(session, only) if "revert" in one.finding]
        assert [(one.name, one.status) for one in found] == [("domain web", "fail")]
        assert "0001abcd00000001" in found[0].finding and found[0].remedy == "`rewind resume web`"
    assert "revert" not in text(domains.check(session, "db"))


def test_saved_memory_is_told(session):
    """It keeps every revert out."""
    session.use(found := Domain())
    found.state, found.saved = lambda: DomainState.SHUTOFF, True
    assert "virsh managedsave-remove web" in text(domains.check(session, "web"), "warn")


def test_a_revert_that_goes_on_by_itself_is_no_failure(session):
    from appliance.restore import intent

    put_revert(session.home)
    session.use(Domain())
    with intent.drive_lock(session.home, "uuid-web"):
        assert text(domains.check(session, "web"), "fail") == ""
        assert "rewind resume web" in text(domains.check(session, "web"), "warn")


def test_an_unknown_domain_is_a_finding_not_an_error(session):
    found = list(examine(session, "nobody"))
    assert [one.status for one in found] == ["fail"]
    assert "nobody" in found[0].finding


def test_a_dead_hypervisor_does_not_hide_the_other_checks(session, monkeypatch):
    def dead(_uri=None):
        raise ConnectError(uri="test:///", reason="nobody there")

    monkeypatch.setattr(session, "hypervisor", dead, raising=False)
    found = list(examine(session))
    assert {"home", "key", "repository", "space", "tools"} <= {one.name for one in found}
    assert "nobody there" in text(found, "fail")


def test_secrets_that_others_can_read_are_told(session):
    session.home.key_file.chmod(0o644)
    session.home.domains.chmod(0o755)
    found = text([*host.key(session), *host.home(session)], "warn")
    assert f"chmod 600 {session.home.key_file}" in found
    assert str(session.home.domains) in found


@pytest.mark.parametrize(("free", "status"), [(100 << 20, "fail"), (1 << 30, "warn"), (1 << 40, "ok")])
def test_space_is_judged(session, monkeypatch, free, status):
    usage = type("Usage", (), {"free": free})()
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _path: usage)
    assert [one.status for one in host.space(session)] == [status]


def test_a_clock_that_was_set_back_is_told(session, monkeypatch):
    from datetime import UTC, datetime, timedelta

    from appliance.timeline.catalogue import Catalogue

    ahead = type("Point", (), {"time": datetime.now(UTC) + timedelta(hours=1)})()
    monkeypatch.setattr(Catalogue, "points", lambda *_, **__: [ahead])
    assert session.repository.points() == []
    assert "set back" in text(host.clock(session), "warn")


def test_a_missing_tool_is_told_with_its_package(session, monkeypatch):
    from appliance.errors import ToolFailed

    def missing(argv, **_):
        raise ToolFailed(tool=argv[0], reason="not found")

    monkeypatch.setattr(host, "run", missing)
    assert "apt install nbdkit" in text(host.tools(session), "fail")


def test_fix_installs_the_hook(session, tmp_path):
    (session.home.path / "rewind.yaml").write_text(f"hook_directory: {tmp_path}/hooks\n")
    assert [one.status for one in host.fence(session)] == ["warn"]
    fix(session)
    assert list((tmp_path / "hooks/qemu.d").iterdir())
    assert "not installed" not in text(host.fence(session))


@pytest.mark.parametrize(
    ("group", "mode", "told"),
    [
        ("0::/system.slice/rewind.service", "control-group", True),
        ("0::/system.slice/rewind.service", "process", False),
        ("0::/user.slice/user-0.slice/session-3.scope", "control-group", False),
    ],
)
def test_a_unit_that_ends_what_outlives_the_daemon_is_told(session, monkeypatch, tmp_path, group, mode, told):
    """What records writes, and what guests read from: systemd kills them with the daemon unless it is told not to."""
    (session.home.path / "daemon.lock").write_text(str(tmp_path / "daemon"))
    (tmp_path / "daemon").mkdir()
    (tmp_path / "daemon/cgroup").write_text(f"{group}\n")
    monkeypatch.setattr(host, "Path", lambda path: Path(path.removeprefix("/proc/")))
    monkeypatch.setattr(host, "run", lambda argv, **_: f"{mode}\n" if argv[-1] == "rewind.service" else "")
    monkeypatch.setattr(Session, "daemon_runs", lambda _: True)
    assert ("systemctl edit rewind.service" in text(host.daemon(session), "warn")) is told


def test_a_schedule_without_a_daemon_is_told(session):
    from appliance.capture import protection
    from appliance.capture.protection import Protection

    assert list(host.daemon(session)) == []
    protection.save(session.home, Protection("web", "u", "test:///", ("vda",), "id", "t", every=60))
    assert "rewind daemon" in text(host.daemon(session), "warn")
    protection.save(session.home, Protection("db", "v", "test:///", ("vda",), "id", "t", continuous=True))
    assert "nobody starts it again for db" in text(host.daemon(session), "warn")


def _texts(tree):
    """What stands in a module as a string, with X for what is filled in; no docstrings."""
    inner = {id(one) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for one in node.values}
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(one.value if isinstance(one, ast.Constant) else "X" for one in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner | told:
            yield node.value


def test_each_command_of_a_remedy_is_marked_as_one():
    """Only such a command is told with the --home that was given: typed without it, it would work in another home."""
    command = re.compile(rf"\brewind (--home|{'|'.join(VERBS)})\b")
    for path in Path(host.__file__).parent.glob("*.py"):
        for text in _texts(ast.parse(path.read_text())):
            assert not command.search(re.sub(r"`[^`]*`", "", text)), (path.name, text)
