"""Plans with the real tables of two Debian kernels, and the driver store with their real modules.

The `cloud` kernel has few drivers and NVMe built in; the `generic` one has all. They are of one version and of two
releases, so a module of one is none for the other.
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from appliance.errors import DriversMissing, GuestUnreadable
from images.drivers import modinfo
from images.drivers.closure import close
from images.drivers.plan import Options, make_plan, refuse_if_missing
from images.drivers.report import document, rows, summary
from images.drivers.store import DriversRefused, DriverStore, NoSuchDrivers
from images.drivers.tables import FILES, Tables, parse, tables_from_folder
from images.model import Client, Device, Firmware, Generator, Inventory, Layer, Nic, Role, Root, Verdict
from tests.guests import packages

pytestmark = pytest.mark.timeout(180)

_FLAVOURS = {"generic": "amd64", "cloud": "cloud-amd64"}
_KEPT = ("megaraid_sas.ko*", "8139too.ko*", "mii.ko*", "ext4.ko*")

MEGASAS = "pci:v00001000d00000060sv00001000sd00001001bc01sc04i00"
NVME = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"
AHCI = "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01"
LSI = "pci:v00001000d00000012sv00000000sd00001000bc01sc00i00"
IDE = "pci:v00008086d00007010sv00001AF4sd00001100bc01sc01i80"
VIRTIO_DISK = "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00"
VIRTIO_SCSI = "pci:v00001AF4d00001048sv00001AF4sd00001100bc01sc00i00"
VIRTIO_NIC = "pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00"
E1000E = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00"
RTL8139 = "pci:v000010ECd00008139sv00001AF4sd00001100bc02sc00i00"
XHCI = "pci:v00001B36d0000000Dsv00001AF4sd00001100bc0Csc03i30"
SOUND = "pci:v00008086d00002668sv00001AF4sd00001100bc04sc03i00"


def _build(folder: Path) -> None:
    """FLAVOUR/RELEASE with the tables, as depmod makes them, and a few modules. Debian's packages have no tables."""
    for flavour, name in _FLAVOURS.items():
        unpacked = folder / "unpacked"
        packages.unpack(packages.kernel_package(name), unpacked)
        (modules,) = [one for one in unpacked.glob("**/lib/modules/*") if one.is_dir()]
        subprocess.run(["depmod", "-b", str(modules.parents[2]), modules.name], check=True, capture_output=True)
        kept = folder / flavour / "lib" / "modules" / modules.name
        for pattern in (*FILES, *_KEPT):
            for file in modules.glob(pattern if pattern in FILES else f"**/{pattern}"):
                target = kept / file.relative_to(modules)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        shutil.rmtree(unpacked)


@pytest.fixture(scope="module")
def kernels():
    """Flavour → folder lib/modules/RELEASE."""
    names = [packages.kernel_package(name) for name in _FLAVOURS.values()]
    folder = packages.cached(f"drivers-{packages.sources_digest([], 'form 1', *names)}", _build)
    return {flavour: next((folder / flavour / "lib" / "modules").iterdir()) for flavour in _FLAVOURS}


@pytest.fixture(scope="module")
def generic(kernels) -> Tables:
    return tables_from_folder(kernels["generic"])


@pytest.fixture(scope="module")
def cloud(kernels) -> Tables:
    return tables_from_folder(kernels["cloud"])


def client_of(tables: Tables, **changes) -> Client:
    root = Root("UUID=11-22", "ext4", "11-22", ("vda",), (Layer.PARTITION,), 1 << 20, 1 << 30)
    client = Client(
        host="web1", os_id="debian", os_name="Debian", release=tables.release, kernel="/boot/vmlinuz",
        initrd="/boot/initrd.img", modules=f"/usr/lib/modules/{tables.release}",
        command_line="root=UUID=11-22 ro quiet client.setting=42", root=root, generator=Generator.INITRAMFS_TOOLS,
        firmware=Firmware.BIOS, nics={"ens3": ""}, origin=(VIRTIO_DISK, VIRTIO_NIC),
    )  # fmt: skip
    return replace(client, **changes)


def target_of(disk: str, nic: str = "", *others: str, **changes) -> Inventory:
    devices = [Device(modalias=disk, slot="0000:02:00.0", carries=("vda",))]
    devices += [Device(modalias=one, slot=f"0000:03:0{n}.0") for n, one in enumerate(others)]
    nics = ()
    if nic:
        devices.append(Device(modalias=nic, slot="0000:01:00.0"))
        nics = (Nic(modalias=nic, mac="52:54:00:00:00:01", slot="0000:01:00.0"),)
    fields = {"name": "t1", "source": "qemu", "firmware": Firmware.BIOS, "devices": tuple(devices), "nics": nics}
    return Inventory(**{**fields, **changes})


def by_module(plan):
    return {one.module: one for one in plan.decisions}


def working(tables: Tables, name: str) -> Verdict:
    """What the verdict of a driver is that must work: kernels differ in what they have built in."""
    return Verdict.BUILT_IN if name in tables.builtin else Verdict.IN


def without(tables: Tables, *names: str) -> Tables:
    """The same kernel, from which modules were taken away."""
    def kept(line: bytes) -> bool:
        words = line.replace(b"-", b"_").replace(b":", b" ").split()
        return not any(name in (word.split(b"/")[-1].split(b".")[0], word) for name in gone for word in words[:3])

    gone = [name.encode() for name in names]
    files = dict(tables.files)
    for file in ("modules.dep", "modules.alias"):
        files[file] = b"".join(line for line in files[file].splitlines(keepends=True) if kept(line))
    return parse(tables.release, files)


# --- what goes in, out, stays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disk", "inside"),
    [
        (AHCI, {"ahci", "libahci", "libata", "scsi_mod", "sd_mod"}),
        (MEGASAS, {"megaraid_sas", "scsi_mod", "sd_mod"}),
        (NVME, {"nvme", "nvme_core"}),
        (IDE, {"ata_piix", "libata", "scsi_mod", "sd_mod"}),
        (VIRTIO_DISK, {"virtio_pci", "virtio_blk", "virtio", "virtio_ring"}),
        (VIRTIO_SCSI, {"virtio_pci", "virtio_scsi", "scsi_mod", "sd_mod"}),
        (XHCI, {"xhci_pci", "xhci_hcd", "usbcore", "usb_storage", "uas", "scsi_mod", "sd_mod"}),
    ],
)
def test_the_controller_and_what_is_above_it_go_in(generic, cloud, disk, inside):
    """P6-09, P6-11: of the target's hardware, from the client's own modules; with the root's file system."""
    plan = make_plan(client_of(generic), generic, target_of(disk), cloud)
    made = by_module(plan)
    assert not plan.missing
    for name in (*inside, "ext4", "jbd2", "crc32c_generic"):
        # What is built in is told only if a device or the root asks for it itself.
        if name in generic.modules:
            assert made[name].verdict is Verdict.IN, name
            assert made[name].path == generic.modules[name].path and made[name].origin == "client"
    assert len(plan.load) < 50


def test_what_goes_in_is_the_closure_and_nothing_else(generic, cloud):
    """I2: `load` is exactly what is IN, each after all that it depends on."""
    plan = make_plan(client_of(generic), generic, target_of(AHCI, E1000E, SOUND), cloud)
    inside = [one for one in plan.decisions if one.verdict is Verdict.IN]
    assert [one.path for one in inside] == list(plan.load)
    done = set()
    for one in inside:
        needed = {name for name in generic.modules[one.module].depends if name in generic.modules}
        assert needed <= done, one.module
        done.add(one.module)
    asked = [one.module for one in inside if one.role is not Role.DEPENDENCY]
    assert done == {module.name for module in close(generic, asked).load}
    assert all(one.reason for one in plan.decisions)


def test_defaults_of_the_template_without_use_stay_out(generic, cloud):
    """P6-10: thousands of the template's, and what only the old hardware needed."""
    plan = make_plan(client_of(cloud), cloud, target_of(NVME), generic)
    made = by_module(plan)
    assert made["megaraid_sas"].verdict is Verdict.OUT and "default of the template" in made["megaraid_sas"].reason
    assert made["virtio_blk"].verdict is Verdict.OUT
    assert "the guest came from" in made["virtio_blk"].reason and made["virtio_blk"].alias.startswith("virtio:")
    out = [one for one in plan.decisions if one.verdict is Verdict.OUT]
    assert len(out) > 3900
    assert not {one.module for one in out} & {one.module for one in plan.decisions if one.verdict is not Verdict.OUT}


def test_two_clients_give_two_plans_from_one_template(generic, cloud):
    """P6-05: the client's kernel decides, not the template's."""
    target = target_of(NVME, VIRTIO_NIC)
    one, other = (make_plan(client_of(tables), tables, target, generic) for tables in (generic, cloud))
    assert one.load != other.load and one.client.release != other.client.release
    assert by_module(one)["nvme"].verdict is Verdict.IN and by_module(other)["nvme"].verdict is Verdict.BUILT_IN
    assert make_plan(client_of(generic), generic, target, generic) == one


def test_built_in_drivers_are_recognised_without_an_alias(generic, cloud):
    """The cloud kernel has NVMe and ext4 built in, and no alias says so."""
    assert cloud.match(NVME) == ()
    plan = make_plan(client_of(cloud), cloud, target_of(NVME), generic)
    made = by_module(plan)
    assert not plan.missing and "nvme" not in {one.module for one in plan.decisions if one.verdict is Verdict.IN}
    assert made["nvme"].verdict is Verdict.BUILT_IN and made["nvme"].role is Role.DISK
    assert made["ext4"].verdict is Verdict.BUILT_IN and made["ext4"].role is Role.ROOT
    refuse_if_missing(plan)


def test_drivers_of_other_devices_are_left_to_the_system(generic, cloud):
    plan = make_plan(client_of(generic), generic, target_of(NVME, E1000E, SOUND, AHCI), cloud)
    made = by_module(plan)
    assert made["e1000e"].verdict is Verdict.LATER and made["e1000e"].role is Role.NIC
    assert made["snd_hda_intel"].verdict is Verdict.LATER and made["ahci"].verdict is Verdict.LATER
    assert not {"e1000e", "ahci"} & {path.rpartition("/")[2].split(".")[0] for path in plan.load}


def test_what_the_client_runs_guests_with_is_left_to_it(generic, cloud):
    """P6-03: a hypervisor's modules are no drivers of the image; the system loads them, and nothing forbids it."""
    cpu = "cpu:type:x86,ven0000fam0006mod003C:feature:,0000,0019,0085,00C0"
    plan = make_plan(client_of(generic), generic, target_of(NVME, "", cpu), cloud)
    assert by_module(plan)["kvm_intel"].verdict is Verdict.LATER
    assert "blacklist" not in plan.command_line


def test_a_card_goes_in_when_the_root_comes_over_the_network(generic, cloud):
    plan = make_plan(client_of(generic), generic, target_of(NVME, VIRTIO_NIC), cloud, options=Options(stream=True))
    made = by_module(plan)
    for name in ("virtio_net", "net_failover", "virtio_pci", "nbd", "dm_mod"):
        assert made[name].verdict is working(generic, name), name
    # Debian 12 has no dm-clone: the mirror is taken. Where there is one it is preferred.
    wanted = "dm_clone" if "dm_clone" in generic.modules else "dm_mirror"
    assert made[wanted].verdict is Verdict.IN


def test_both_drivers_that_an_alias_names_are_told(generic, cloud):
    plan = make_plan(client_of(generic), generic, target_of(NVME, RTL8139), cloud, options=Options(network=True))
    made = by_module(plan)
    assert made["8139cp"].verdict is made["8139too"].verdict is made["mii"].verdict is Verdict.IN
    assert made["8139too"].alias == made["8139cp"].alias == RTL8139 and made["mii"].role is Role.DEPENDENCY


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (Layer.LVM, {"dm_mod", "dm_thin_pool", "dm_raid", "raid1", "raid10", "raid0", "dm_cache", "dm_cache_smq"}),
        (Layer.LVM, {"dm_writecache", "dm_integrity"}),
        (Layer.MD, {"md_mod", "raid1", "raid456"}),
        (Layer.LUKS, {"dm_mod", "dm_crypt", "xts", "aes_generic", "usbhid", "hid_generic", "xhci_pci"}),
    ],
)
def test_layers_below_the_root_bring_their_modules(generic, cloud, layer, names):
    client = client_of(generic)
    client = replace(client, root=replace(client.root, layers=(Layer.PARTITION, layer), fs="xfs"))
    made = by_module(make_plan(client, generic, target_of(NVME, "", XHCI), cloud))
    for name in (*names, "xfs"):
        assert made[name].verdict is working(generic, name), name
    assert "ext4" not in made or made["ext4"].verdict is Verdict.OUT


def test_any_controller_may_carry_the_disk_when_nobody_says_which(generic, cloud):
    """A physical machine's script tells devices, and not where the disk will hang."""
    devices = (Device(modalias=LSI, slot="a"), Device(modalias=MEGASAS, slot="b"))
    target = target_of(NVME, devices=devices)
    assert {"sym53c8xx", "megaraid_sas"} <= {one.module for one in make_plan(
        client_of(generic), generic, target, cloud).decisions if one.verdict is Verdict.IN}  # fmt: skip
    plan = make_plan(client_of(generic), without(generic, "megaraid_sas"), target, generic)
    assert not plan.missing and any("no driver for b" in one for one in plan.warnings)
    plan = make_plan(client_of(cloud), cloud, target, generic)
    assert {one.module for one in plan.missing} == {LSI, MEGASAS}


def test_a_summary_counts_and_a_table_lists(generic, cloud):
    plan = make_plan(client_of(cloud), cloud, target_of(NVME, VIRTIO_NIC), generic)
    told = document(plan)
    assert told["buildable"] is True and told["release"] == cloud.release
    assert told["counts"]["out"] > 3900 and told["counts"]["in"] == len(told["load"])
    assert len(told["decisions"]) == sum(told["counts"].values())
    listed = list(rows(plan))
    assert len(listed) < 100 < len(list(rows(plan, all_of=True)))
    assert ("nvme", "built-in", "disk") in {row[:3] for row in listed}
    assert any(line.startswith(f"out: {told['counts']['out']} defaults") for line in summary(plan))


# --- missing drivers, and the store ---------------------------------------------------------------------------------


def test_a_kernel_without_the_needed_drivers_is_refused_with_the_list(generic, cloud):
    """P6-22, I3: by role; the on-board controller that carries nothing is only told."""
    plan = make_plan(client_of(cloud), cloud, target_of(MEGASAS, RTL8139, LSI), generic)
    assert {(one.module, one.role) for one in plan.missing} == {(MEGASAS, Role.DISK), (RTL8139, Role.NIC)}
    assert not document(plan)["buildable"]
    with pytest.raises(DriversMissing) as caught:
        refuse_if_missing(plan)
    assert MEGASAS in str(caught.value) and RTL8139 in str(caught.value) and "'web1'" in str(caught.value)
    assert LSI not in str(caught.value)
    assert any(LSI in word and "no restored disk hangs on it" in word for word in plan.warnings)


def test_what_is_above_a_controller_may_be_missing_too(generic, cloud):
    plan = make_plan(client_of(generic), without(generic, "sd_mod"), target_of(AHCI), cloud)
    (one,) = plan.missing
    assert one.module == "scsi:t-0x00" and one.role is Role.UPPER


def test_a_missing_dependency_is_named(generic, cloud):
    plan = make_plan(client_of(generic), without(generic, "libahci"), target_of(AHCI), cloud)
    assert "ahci" not in {module.rpartition("/")[2] for module in plan.load}
    assert plan.missing


def test_a_missing_file_system_is_refused(generic, cloud):
    client = client_of(generic)
    client = replace(client, root=replace(client.root, fs="reiser4"))
    (one,) = make_plan(client, generic, target_of(AHCI), cloud).missing
    assert one.role is Role.ROOT and one.module == "fs-reiser4"


def test_modules_of_another_release_never_fill_the_gap(kernels, generic, cloud, tmp_path):
    """I3: the generic kernel's module is for another release by its vermagic."""
    store = DriverStore(tmp_path / "store")
    module = next(kernels["generic"].glob("**/megaraid_sas.ko*"))
    words = f"is for kernel {generic.release} by its vermagic, and was asked for {cloud.release}"
    with pytest.raises(DriversRefused, match=re.escape(words)):
        store.add(module, release=cloud.release)
    # A folder that says it is of the other kernel does not help.
    lying = tmp_path / "lib" / "modules" / cloud.release / "kernel" / module.name
    lying.parent.mkdir(parents=True)
    shutil.copy(module, lying)
    with pytest.raises(DriversRefused, match=f"lies in the folder of {re.escape(cloud.release)}"):
        store.add(tmp_path / "lib")
    assert store.list() == () and list((tmp_path / "store").iterdir()) == []
    # As what it is it may be kept, and is not used.
    store.add(module)
    assert store.tables(cloud.release) == ()
    plan = make_plan(client_of(cloud), cloud, target_of(MEGASAS), generic, store.tables(cloud.release))
    assert {one.module for one in plan.missing} == {MEGASAS}


def packed_deb(folder: Path, modules: Path, scratch: Path, options=()) -> Path:
    root = scratch / "root"
    target = root / "usr" / "lib" / "modules" / modules.name
    shutil.copytree(modules, target, ignore=shutil.ignore_patterns("modules.*"))
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN" / "control").write_text(
        "Package: extra-drivers\nVersion: 1\nArchitecture: amd64\nMaintainer: a <a@b>\nDescription: drivers\n"
    )
    script = root / "DEBIAN" / "preinst"
    script.write_text(f"#!/bin/sh\ntouch {scratch}/ran\n")
    script.chmod(0o755)
    package = folder / "drivers.deb"
    subprocess.run(["dpkg-deb", *options, "-b", str(root), str(package)], check=True, capture_output=True)
    assert not (scratch / "ran").exists()
    return package


def packed_rpm(folder: Path, modules: Path, scratch: Path, payload: str) -> Path:
    spec = scratch / "drivers.spec"
    spec.write_text(
        "Name: kmod-extra\nVersion: 1\nRelease: 1\nSummary: drivers\nLicense: GPL\n%description\ndrivers\n"
        f"%install\nmkdir -p %{{buildroot}}/lib/modules\ncp -r {modules} %{{buildroot}}/lib/modules/\n"
        f"rm -f %{{buildroot}}/lib/modules/*/modules.*\n%files\n/lib/modules\n%pre\ntouch {scratch}/ran\n"
    )
    define = {"_topdir": scratch, "_rpmdir": folder, "_binary_payload": payload, "debug_package": "%{nil}",
              "__os_install_post": "%{nil}", "_build_id_links": "none"}  # fmt: skip
    words = [word for key, value in define.items() for word in ("--define", f"{key} {value}")]
    subprocess.run(["rpmbuild", "-bb", *words, str(spec)], check=True, capture_output=True)
    (package,) = folder.glob("**/*.rpm")
    assert not (scratch / "ran").exists()
    return package


@pytest.mark.parametrize("kind", ["folder", "deb-xz", "deb-zst", "rpm-xz", "rpm-gz", "rpm-zst"])
def test_the_package_of_that_very_release_makes_it_succeed(kernels, generic, cloud, tmp_path, kind):
    """I3: the same plan, once the store has the driver; what the store has goes in, for the root disk has it not."""
    for name in ("scratch", "packages"):
        (tmp_path / name).mkdir()
    source = kernels["generic"]
    if kind.startswith("deb"):
        options = [f"-Z{'xz' if kind == 'deb-xz' else 'zstd'}"]
        source = packed_deb(tmp_path / "packages", source, tmp_path / "scratch", options)
    elif kind.startswith("rpm"):
        payload = {"rpm-xz": "w2.xzdio", "rpm-gz": "w2.gzdio", "rpm-zst": "w3.zstdio"}[kind]
        source = packed_rpm(tmp_path / "packages", source, tmp_path / "scratch", payload)
    poor = without(generic, "megaraid_sas", "8139too", "8139cp")
    target = target_of(MEGASAS, RTL8139)
    assert {one.module for one in make_plan(client_of(generic), poor, target, generic).missing} == {MEGASAS, RTL8139}

    store = DriverStore(tmp_path / "store")
    added = store.add(source)
    assert added.release == generic.release and added.modules == 4
    assert store.add(source) == added and store.list() == (added,)
    plan = make_plan(client_of(generic), poor, target, generic, store.tables(generic.release))
    refuse_if_missing(plan)
    made = by_module(plan)
    for name in ("megaraid_sas", "8139too"):
        assert made[name].verdict is Verdict.IN and made[name].origin == added.name, name
    assert "the root disk does not have it" in made["8139too"].reason
    # What the client has itself is not taken from the store.
    assert made["mii"].origin == made["ext4"].origin == "client"
    assert plan.load.index(made["mii"].path) < plan.load.index(made["8139too"].path)
    assert f"from the driver store, {added.name}: 2" in summary(plan)
    file = next(kernels["generic"].glob("**/megaraid_sas.ko*"))
    assert store.read(generic.release, added.name, made["megaraid_sas"].path) == file.read_bytes()

    store.remove(added.name)
    assert store.list() == () and store.tables(generic.release) == ()
    with pytest.raises(NoSuchDrivers):
        store.remove(added.name)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_compressed_modules_say_the_same(kernels, tmp_path, suffix):
    source = next(kernels["generic"].glob("**/8139too.ko*"))
    content = modinfo.plain(source.name, source.read_bytes())
    pack = {".xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32), ".gz": gzip.compress,
            ".zst": zstandard.compress}[suffix]  # fmt: skip
    told = modinfo.read(f"8139too.ko{suffix}", pack(content))
    assert told == modinfo.read("8139too.ko", content)
    assert told.name == "8139too" and told.depends == ("mii",) and told.signed
    assert told.vermagic.startswith(f"{told.release} SMP")
    with pytest.raises(GuestUnreadable, match="more than 1000 bytes"):
        modinfo.plain(f"x.ko{suffix}", pack(content), 1000)


def test_what_a_module_says_is_what_depmod_says(kernels, generic):
    """The store's tables are computed by ourselves: the same aliases and dependencies as depmod's."""
    for file in kernels["generic"].glob("kernel/**/*.ko*"):
        told = modinfo.read(file.name, file.read_bytes())
        assert set(told.depends) <= set(generic.modules[told.name].depends)
        text = generic.files["modules.alias"].decode()
        theirs = [line.split()[1] for line in text.splitlines() if line.endswith(f" {told.name}")]
        assert sorted(told.aliases) == sorted(theirs)


def test_secure_boot_tells_about_modules_without_a_signature(kernels, generic, tmp_path):
    """P6-26"""
    signed = next(kernels["generic"].glob("**/megaraid_sas.ko*"))
    content = modinfo.plain(signed.name, signed.read_bytes())
    bare = tmp_path / "megaraid_sas.ko"
    bare.write_bytes(content[: content.rindex(b"~Module signature appended~")])
    store = DriverStore(tmp_path / "store")
    added = store.add(bare)
    target = target_of(MEGASAS, secure_boot=True, firmware=Firmware.UEFI)
    poor = without(generic, "megaraid_sas")
    plan = make_plan(client_of(generic), poor, target, generic, store.tables(generic.release))
    assert f"Secure Boot is on, and module megaraid_sas from {added.name} is unsigned: the kernel refuses it" in (
        plan.warnings
    )


def test_a_stored_file_that_was_changed_is_not_used(kernels, generic, tmp_path):
    store = DriverStore(tmp_path / "store")
    added = store.add(kernels["generic"])
    (decision,) = [path for path in store.tables(generic.release)[0].modules.values() if path.name == "mii"]
    (kept,) = (tmp_path / "store").glob(f"*/*/modules/{decision.path}")
    kept.write_bytes(b"something else")
    with pytest.raises(DriversRefused, match="was changed after it was added"):
        store.read(generic.release, added.name, decision.path)


@pytest.fixture
def short():
    """A home's path may have 50 bytes: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        yield Path(folder)


def test_drivers_are_kept_in_the_repository(kernels, short):
    """P6-22, I3: another home that joins the repository has them too; what one removes, the other has no more."""
    from appliance.config import Home
    from appliance.service import Session
    from appliance.service.image import drivers
    from appliance.service.setup import init

    (module,) = kernels["generic"].glob("**/megaraid_sas.ko*")
    release = kernels["generic"].name
    homes = [Home(short / name) for name in ("one", "two")]
    with Session(homes[0]) as session:
        init(session, str(short / "repo"), encrypt=False)
        kept = drivers.add(session, module)
        assert drivers.add(session, module) == kept
    with Session(homes[1]) as session:
        init(session, str(short / "repo"), encrypt=False)
        assert drivers.listing(session) == [kept] == drivers.listing(session, release)
        assert drivers.listing(session, "5.0") == []
        store = drivers.store_for(session, release)
        (path,) = [one.path for table in store.tables(release) for one in table.modules.values()]
        assert store.read(release, kept.name, path) == module.read_bytes()
    with Session(homes[0]) as session:
        drivers.remove(session, kept.name)
        with pytest.raises(NoSuchDrivers):
            drivers.remove(session, kept.name)
    with Session(homes[1]) as session:
        assert drivers.store_for(session, release).list(release) == ()
