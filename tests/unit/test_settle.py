"""The steps of a client after its first start on new hardware, each run in a root of its own."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from appliance.errors import ImageError
from appliance.service.image.settling import outcomes
from images.model import Generator
from images.settle.choice import After, with_steps
from images.settle.lay import lay
from images.settle.step import steps, validated
from tests.support import settled_disk
from tests.support.settling import INITRD, RELEASE, Root, plan


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    with Root(folder) as found:
        yield found


# --- what a step is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(steps()))
def test_a_step_has_a_schema_a_description_and_a_script(name):
    """A new step is a module and a script."""
    one = steps()[name]
    assert one.name == name and one.description and one.script.startswith("#!/bin/sh")
    assert one.schema.model_config["extra"] == "forbid"
    with pytest.raises(ImageError, match=f"step '{name}'"):
        validated(name, {"nonsense": 1})
    for field in one.schema.model_fields.values():
        assert field.description or not any(hasattr(it, "pattern") for it in field.metadata)


def test_an_unknown_step_is_refused():
    with pytest.raises(ImageError, match="there is no step 'magic'") as caught:
        validated("magic", {})
    assert "host-name" in caught.value.hint


def test_without_a_choice_nothing_is_laid():
    """P6-24: the same host name, keys and addresses unless others are asked for."""
    found, settings = with_steps(plan(), After(), "seed")
    assert found == plan() and dict(settings.run) == {}


def test_a_choice_becomes_files_for_run_and_words():
    """Equal for equal arguments; units for the phases that are used and no others."""
    first = with_steps(plan(), After(identity="new"), "seed")
    assert first == with_steps(plan(), After(identity="new"), "seed")
    other = with_steps(plan(), After(identity="new"), "seed2")
    assert first[0].command_line != other[0].command_line
    names = set(first[1].run)
    assert "systemd/system/rewind-identity.service" in names
    assert not any("rewind-settle" in name for name in names)
    assert {name.rpartition("/")[2] for name in names if "/steps/" in name} == {
        "02-cloud-init", "03-cards", "10-host-name", "20-machine-id", "30-ssh-keys", "40-addresses",
    }  # fmt: skip
    settled = with_steps(plan(), After(settle=True), "seed")
    assert settled[0] == plan() and "systemd/system/multi-user.target.d/rewind-settle.conf" in settled[1].run


@pytest.mark.parametrize("name", ["-x", "a b", "x" * 64, "a;reboot", "", "ä"])
def test_a_host_name_that_is_none_is_refused(name):
    with pytest.raises(ImageError, match="host-name") as told:
        lay(plan(), {"host-name": {"name": name}}, "s")
    assert "it has to be letters, digits and `-`" in str(told.value) and "[A-Za-z" not in str(told.value)


# --- the runner -----------------------------------------------------------------------------------------------------


def test_a_phase_is_done_once_for_an_image(root):
    """The boot volume may stay attached: nobody changes the host's name back at the next start."""
    choice = {"host-name": {"name": "twin"}}
    root.write("/etc/hostname", "ledger\n")
    assert root.run(plan(), choice, "identity").code == 0
    root.write("/etc/hostname", "renamed-by-hand\n")
    again = root.run(plan(), choice, "identity")
    assert again.code == 0 and "done before" in again.report[0]
    assert root.read("/etc/hostname") == "renamed-by-hand\n"
    assert root.run(plan(), choice, "identity", seed="another image").code == 0
    assert root.read("/etc/hostname") == "twin\n"


def test_a_step_that_fails_does_not_hold_up_the_others(root):
    """And is tried again at the next start."""
    root.write("/etc/ssh/ssh_host_ed25519_key", "old")
    root.program("ssh-keygen", "echo no entropy >&2; exit 1")
    root.write("/etc/hostname", "ledger\n")
    choice = {"host-name": {"name": "twin"}, "ssh-keys": {}, "addresses": {}}
    done = root.run(plan(), choice, "identity")
    assert done.code == 1 and "ssh-keys: failed (1)" in done.report and "addresses: nothing to do" in done.report
    assert any("no entropy" in line for line in done.report)
    assert root.read("/etc/hostname") == "twin\n"
    assert root.read("/etc/ssh/ssh_host_ed25519_key") == "old"
    (kept,) = root.path("/var/lib/rewind").glob("identity-*.failed")
    assert kept.read_text().splitlines() == done.report
    root.path("/usr/local/sbin/ssh-keygen").unlink()
    assert root.run(plan(), choice, "identity").code == 0
    assert not kept.exists()
    assert root.read("/etc/ssh/ssh_host_ed25519_key") != "old"


def test_what_failed_of_the_identity_is_told_until_it_is_done(root):
    """P6-19: the report that `rewind image settle` reads tells of both phases; the next start makes it anew."""
    root.write("/etc/ssh/ssh_host_ed25519_key", "old")
    root.write("/run/systemd/network/10-rewind-ens3.link", "[Link]\nName=ens3\n")
    root.program("ssh-keygen", "exit 1")
    choice = {"ssh-keys": {}, "nics": {}}
    first = root.run(plan(), choice, "identity", "settle")
    assert first.code == 1 and "nics: done" in first.report and "ssh-keys: failed (1)" in first.report, first
    (report,) = root.path("/var/lib/rewind").glob("settle-*.failed")
    root.path("/usr/local/sbin/ssh-keygen").unlink()
    assert root.run(plan(), choice, "identity", "settle").code == 0
    assert not report.exists()
    told = {one.name: one.outcome for one in outcomes(report.with_suffix("").read_text())}
    assert told == {"ssh-keys": "done", "nics": "done"}


def test_a_step_of_a_start_that_was_cut_off_is_told_again(root):
    """`rewind image settle` knows by the report alone whether the disk starts by itself."""
    root.write("/run/systemd/network/10-rewind-ens3.link", "[Link]\nName=ens3\n")
    root.program("sync", f'case "$*" in */settle-{"?" * 16}.new) kill -KILL $PPID ;; esac', "bash")
    root.cut(plan(), {"nics": {}}, "settle", 1 << 20)
    root.program("sync", "")
    assert [path.name[-6:] for path in root.path("/var/lib/rewind").glob("settle-*.steps")] == [".steps"]
    done = root.run(plan(), {"nics": {}}, "settle")
    (told,) = outcomes("\n".join(done.report))
    assert told.outcome == "done" and "the names are kept: ens3" in told.said, done
    again = root.path("/var/lib/rewind").glob("settle-*")
    assert [outcomes(path.read_text()) for path in again] == [(told,)]


@pytest.mark.parametrize(("program", "what"), [("mv", "*.steps"), ("cat", "*.steps"), ("cp", "*/report*")])
def test_what_cannot_be_kept_is_not_taken_for_done(root, program, what):
    """A full disk: the report is all that `rewind image settle` has, and the next start goes by what is kept."""
    made = "$3/etc/ssh/ssh_host_rsa_key"
    root.program("ssh-keygen", f"mkdir -p $3/etc/ssh; echo new >{made}; echo new >{made}.pub")
    root.write("/etc/ssh/ssh_host_rsa_key", "old")
    choice = {"ssh-keys": {}, "addresses": {}, "cards": {}}
    root.program(program, f'case "$*" in {what}) echo full >&2; exit 1 ;; esac; exec /bin/{program} "$@"')
    done = root.run(plan(), choice, "identity")
    assert done.code == 1 and "cannot be written" in "\n".join(done.report), done
    assert "tried again" in done.report[-1] and "identity: done" not in done.report
    (root.path("/usr/local/sbin") / program).unlink()
    again = root.run(plan(), choice, "identity")
    assert again.code == 0 and again.report.count("ssh-keys: done") == 1, again
    assert len(list(root.path("/var/lib/rewind").glob("identity-*"))) == 1


def test_a_shutdown_waits_for_the_step_that_runs(root):
    """And no other one begins; systemd sends its signal to the runner alone (`KillMode=mixed`)."""
    root.write("/etc/ssh/ssh_host_ed25519_key", "old")
    make = "mkdir -p $3/etc/ssh; for end in '' .pub; do echo new >$3/etc/ssh/ssh_host_ed25519_key$end; done"
    root.program("ssh-keygen", f"kill -TERM $(cut -d' ' -f4 /proc/$PPID/stat); {make}")
    choice = {"ssh-keys": {}, "addresses": {}}
    root.cut(plan(), choice, "identity", 1 << 20)
    report = root.read("/run/rewind/settle/report").splitlines()
    assert report[-2] == "ssh-keys: done" and "the system goes down" in report[-1], report
    assert root.read("/etc/ssh/ssh_host_ed25519_key") == "new\n"
    done = root.run(plan(), choice, "identity")
    assert done.code == 0 and "addresses: nothing to do" in done.report, done


def test_a_shutdown_is_seen_where_a_step_was_done_before(root):
    """The next step would begin, and have to be waited for."""
    root.write("/etc/ssh/ssh_host_ed25519_key", "old")
    choice = {"host-name": {"name": "twin"}, "ssh-keys": {}}
    root.program("ssh-keygen", "kill -KILL -1")
    root.cut(plan(), choice, "identity", 1 << 20)
    root.program("ssh-keygen", "echo x >/begun")
    # The runner's own, and no one's else: it looks for what is done.
    root.program("grep", 'case "$*" in -Eqsx*host-name*) kill -TERM $PPID ;; esac; exec /bin/grep "$@"')
    done = root.run(plan(), choice, "identity")
    assert done.code == 1 and "the system goes down" in done.report[-1], done
    assert not root.path("/begun").exists()


def test_what_is_said_reaches_the_console(root):
    root.write("/etc/hostname", "ledger\n")
    done = root.run(plan(), {"host-name": {"name": "twin"}}, "identity")
    # Here it is a file, and has the last word only.
    assert root.read("/dev/console") == "rewind: identity: done\n"
    assert "host-name: it was called ledger and is called twin" in done.said


def test_the_last_words_tell_how_many_steps_came_to_nothing(root):
    """A bare "done" was said also where the steps had come to nothing."""
    root.write("/etc/network/interfaces", "iface ens3 inet static\n  address 10.0.0.2/24\n")
    root.hide("dhclient", "dhcpcd", "dhcpcd5", "udhcpc", "pump")
    done = root.run(plan(), {"host-name": {"name": "twin"}, "addresses": {}}, "identity")
    words = "identity: 1 of 2 steps are done; the others left things as they were"
    assert done.report[-2:] == [words, "identity: done"]


# --- the names of network cards -------------------------------------------------------------------------------------


def test_names_that_the_image_gave_stay(root):
    """P6-24: started by itself the disk has no image to name its cards by."""
    text = "[Match]\nMACAddress=52:54:00:00:00:01\n\n[Link]\nName=ens3\n"
    root.write("/run/systemd/network/10-rewind-ens3.link", text)
    done = root.run(plan(), {"nics": {}}, "settle")
    assert done.code == 0 and root.read("/etc/systemd/network/10-rewind-ens3.link") == text, done
    assert "nics: the names are kept: ens3" in done.report
    again = root.run(plan(), {"nics": {}}, "settle", seed="another image")
    assert "nics: nothing to do" in again.report


# --- the initramfs --------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(root):
    return settled_disk.machine(root)


MAKES = f"""echo "$*" >>/calls
echo usr/lib/modules/x/kernel/drivers/ata/ahci.ko.xz >{INITRD}
echo usr/lib/modules/x/kernel/drivers/scsi/sd-mod.ko >>{INITRD}"""
# As one that finds no hardware by itself: only what its configuration names goes in.
TAKES_NAMED = f"echo x >>/calls; sed 's|^|kernel/|; s|$|.ko|' /etc/initramfs-tools/modules >{INITRD}"


def settled(root, **changes):
    return root.run(replace(plan(), **changes), {"initramfs": {}}, "settle")


def test_the_initramfs_is_made_by_the_clients_own_tool(machine):
    """P6-19: on the hardware that it is for, where `MODULES=dep` finds what this disk needs."""
    machine.program("update-initramfs", MAKES)
    done = settled(machine)
    assert done.code == 0 and "initramfs: done" in done.report, done
    assert machine.read("/calls") == f"-u -k {RELEASE}\n"
    assert "the disk needs ahci sd_mod" in done.report[0]
    assert not machine.path(f"{INITRD}.rewind-before").exists()
    assert machine.read("/etc/initramfs-tools/modules") == "# none\n"


def test_a_driver_that_it_leaves_out_is_named_for_it(machine):
    machine.program("update-initramfs", TAKES_NAMED)
    done = settled(machine)
    assert done.code == 0, done
    assert machine.read("/calls") == "x\nx\n"
    assert machine.read("/etc/initramfs-tools/modules") == "# none\nahci\nsd_mod\n"


@pytest.mark.parametrize(
    "program",
    [f"echo rubbish >{INITRD}; exit 1", f"echo kernel/other.ko >{INITRD}", f": >{INITRD}"],
    ids=["fails", "lacks the driver", "makes nothing"],
)
def test_an_initramfs_that_is_of_no_use_is_not_kept(machine, program):
    """P6-19: the disk is never less bootable than it was."""
    before = machine.read(INITRD)
    machine.program("update-initramfs", program)
    done = settled(machine)
    assert done.code == 1 and machine.read(INITRD) == before, done
    assert any("the old initramfs is back" in line for line in done.report)
    assert not machine.path(f"{INITRD}.rewind-before").exists()


def test_dracut(machine):
    machine.program("dracut", 'echo "$*" >/calls; printf "kernel/ahci.ko\\nkernel/sd_mod.ko\\n" >"$2"')
    machine.program("lsinitrd", "cat $1")
    done = machine.run(plan(Generator.DRACUT), {"initramfs": {}}, "settle")
    assert done.code == 0 and machine.read("/calls") == f"--force {INITRD}.rewind-new {RELEASE}\n", done
    assert machine.read(INITRD) == "kernel/ahci.ko\nkernel/sd_mod.ko\n"


def test_another_kernel_than_the_images_own_is_left_alone(machine):
    machine.program("update-initramfs", MAKES)
    done = settled(machine, client=replace(plan().client, release="5.10.0-1"))
    assert done.code == 0 and "initramfs: left as it was" in done.report
    assert not machine.path("/calls").exists()


# --- a larger disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def larger(root):
    """sda is 128 MiB, the table of the 64 that it had is a GPT, and sda1, the root, the first 10 of them."""
    settled_disk.disk(root)
    settled_disk.table(root, "label: gpt\nstart=2048, size=20480\n", mib=128, made_with=64)
    root.program("findmnt", 'case "$*" in *FSTYPE*) echo ext4 ;; *) echo /dev/sda1 ;; esac')
    root.program("resize2fs", "echo $* >/calls")
    return root


def grown(root):
    return root.run(plan(), {"grow": {}}, "settle")


def test_the_root_takes_the_room_of_a_larger_disk(larger):
    """P6-18: of a GPT too, whose second table lies where the smaller disk ended."""
    done = grown(larger)
    assert done.code == 0 and larger.read("/calls") == "/dev/sda1\n", done
    assert int(larger.read("/sys/class/block/sda1/size")) > 250_000
    assert any("MiB more" in line for line in done.report)
    subprocess.run(["sfdisk", "-q", "--verify", larger.path("/dev/sda")], check=True)


def test_a_table_that_the_kernel_does_not_take_is_put_back(larger):
    larger.program("partx", "exit 1")
    before = subprocess.run(["sfdisk", "-d", larger.path("/dev/sda")], capture_output=True, check=True).stdout
    done = grown(larger)
    assert done.code == 1 and "the partition table of /dev/sda is as before" in done.report[0], done
    after = subprocess.run(["sfdisk", "-d", larger.path("/dev/sda")], capture_output=True, check=True).stdout
    assert [line for line in after.splitlines() if b"start=" in line] == [
        line for line in before.splitlines() if b"start=" in line
    ]
    assert not larger.path("/calls").exists()


@pytest.mark.parametrize("program", ["resize2fs", "sfdisk"])
def test_the_table_that_is_kept_is_the_one_before(larger, program):
    """P6-18: whatever start is cut off, after the table was written or while it is kept."""
    before = larger.inside("sfdisk", "-d", "/dev/sda")
    when = '[ "$1" != -d ] || ' if program == "sfdisk" else ""
    larger.program(program, f'{when}{{ echo half; kill -KILL -1; }}; exec /sbin/{program} "$@"')
    larger.cut(plan(), {"grow": {}}, "settle", 1 << 20)
    kept = larger.path("/var/lib/rewind/before/sda.grow")
    assert kept.exists() == (program == "resize2fs")
    larger.path(f"/usr/local/sbin/{program}").unlink()
    larger.program("resize2fs", "")
    assert grown(larger).code == 0 and kept.read_text() == before


def test_a_volume_takes_what_has_come_to_its_group(larger):
    """P6-18: a start that was cut off while LVM was asked has left nothing that the next one takes for an answer."""
    lsblk = larger.read("/usr/local/sbin/lsblk").replace("TYPE*) echo sda1", "TYPE*) echo vg-root lvm; echo sda1")
    larger.write("/usr/local/sbin/lsblk", lsblk.replace("TYPE*) echo part", "TYPE*) echo lvm; echo part"), 0o755)
    larger.program("lvs", "kill -KILL -1")
    larger.cut(plan(), {"grow": {}}, "settle", 1 << 20)
    larger.program("lvs", "[ -e /resized ] && echo 9 || echo 3")
    larger.program("pvresize", "echo x >/resized")
    larger.program("lvextend", 'echo "$3" >/extended')
    done = grown(larger)
    assert done.code == 0 and larger.read("/extended") == "+6\n", done


def test_a_disk_that_is_full_has_no_room(larger):
    larger.write("/sys/class/block/sda/size", "30000\n")
    done = grown(larger)
    assert done.code == 0 and "grow: nothing to do" in done.report


def test_a_root_grows_as_far_as_the_next_partition(larger):
    larger.write("/sys/class/block/sda/sda2/start", "24000\n")
    done = grown(larger)
    assert done.code == 0 and "grow: nothing to do" in done.report, done
    assert not larger.path("/calls").exists()
