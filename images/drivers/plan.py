"""Which drivers go into an image, and why: each judged by what it is for on this target.

    make_plan           → Plan; nothing is read or written, and a missing driver is only told
    refuse_if_missing   DriversMissing for a plan that forbids to build

The way: devices that carry a restored disk first, with what the kernel sees above them (`IN`); then wanted cards, which
must have a driver but may wait for the root disk (`LATER`) unless the root comes over the network; then what the root
needs; then every other device (`LATER`). Then dependencies. What the template has by default or the old hardware
needed, and nobody asked for, is `OUT`.

Two traps. Drivers that are built into a kernel have no aliases in its tables: the template's kernel or a list of our
own (`known`) names the driver then, and the client's list of built-in ones says whether it is there. And a module from
the driver store is not on the client's root disk: it never is `LATER`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from appliance.errors import DriversMissing
from images.drivers.advice import advice
from images.drivers.closure import close
from images.drivers.glob import Budget
from images.drivers.known import known_names
from images.drivers.needs import Need, mode_of, needs_of
from images.drivers.settle import command_line, rename
from images.drivers.tables import Module, Tables, merge
from images.drivers.wanted import Wanted, wanted_devices
from images.hardware.expand import upper_aliases
from images.model import Client, Decision, Device, Inventory, Layer, Plan, Role, Verdict

__all__ = ["Options", "make_plan", "refuse_if_missing"]

# They match every IDE controller by its class and drive few: alone they are no driver where a real one is known.
_FALLBACKS = frozenset({"ata_generic", "pata_acpi"})
_RANK = {role: number for number, role in enumerate(Role)}


@dataclass(frozen=True, slots=True)
class Options:
    """`network`: wanted cards must work in the image already. `stream`: the root comes over the network while the local
    disk fills (implies `network`). `extra`: modules that must be in besides. `identifiers`: the `UUID=…`, `LABEL=…`,
    `PARTUUID=…` found on the restored disks; None when nobody has looked."""

    network: bool = False
    stream: bool = False
    extra: tuple[str, ...] = ()
    identifiers: Collection[str] | None = None


def make_plan(
    client: Client,
    client_tables: Tables,
    inventory: Inventory,
    template_tables: Tables,
    store_tables: Sequence[Tables] = (),
    *,
    options: Options | None = None,
) -> Plan:
    """The plan for this client on this target; equal for equal arguments.

    `client_tables` are those of `client.release`, `store_tables` what the driver store has for exactly that release.
    A driver that is missing everywhere is a decision `MISSING` where it must work and a warning elsewhere. Raises
    ValueError when tables of another release are given, GuestUnreadable when the client's tables are hostile.
    """
    options = options or Options()
    if client_tables.release != client.release:
        raise ValueError(f"tables of kernel {client_tables.release} for a client with {client.release}")
    planner = _Planner(merge(client_tables, *store_tables), template_tables)
    planner.devices(
        wanted_devices(
            inventory, network=options.network or options.stream, keyboard=Layer.LUKS in client.root.layers
        )
    )
    planner.needs(needs_of(client, stream=options.stream, extra=options.extra))
    planner.console(inventory.console)
    load = planner.close()
    planner.leave_out(client.origin)
    return _plan(client, inventory, planner, load, options)


def refuse_if_missing(plan: Plan) -> None:
    """Raises DriversMissing with the whole list. Called before anything is written."""
    if plan.missing:
        devices = "; ".join(f"{one.module} ({one.reason})" for one in plan.missing)
        raise DriversMissing(
            release=plan.client.release, host=plan.client.host, devices=devices, target=plan.inventory.name
        )


def _plan(
    client: Client, inventory: Inventory, planner: _Planner, load: tuple[Module, ...], options: Options
) -> Plan:
    mode, why = mode_of(client)
    line, line_notes = command_line(client, inventory, options.identifiers)
    names, name_notes = rename(client, inventory)
    warnings = [*planner.warnings, *line_notes, *name_notes]
    if mode == "append":
        warnings.append(f"the guest's own initrd stays in use and its drivers with it: {why}")
        if not client.initrd:
            warnings.append("the guest has no initrd that could be kept: the image will not find its root")
    warnings += [*client.warnings, *advice(client, inventory, load, options.identifiers)]
    return Plan(
        client=client,
        inventory=inventory,
        decisions=planner.decisions(load),
        load=tuple(module.path for module in load),
        mode=mode,
        rename=names,
        command_line=line,
        warnings=tuple(dict.fromkeys(warnings)),
    )


@dataclass
class _Planner:
    """Collects one decision for each driver. `tables` are the client's and the store's, `template` the default's."""

    tables: Tables
    template: Tables
    budget: Budget = field(default_factory=Budget)
    warnings: list[str] = field(default_factory=list)
    made: dict[str, Decision] = field(default_factory=dict)
    missing: dict[str, Decision] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    _drivers: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.warnings += self.tables.notes

    # --- what asks for drivers ---

    def devices(self, groups: Iterable[Wanted]) -> None:
        for group in groups:
            found = [device for device in group.devices if self._device(group, device)]
            lacking = group.without(found)
            if group.required and not found:
                for device in lacking:
                    self.miss(device.modalias, group.role, f"{group.reason} {_where(device)}")
            elif group.required or group.told:
                for device in lacking:
                    where, harmless = _where(device), group.harmless or "another may carry the disk"
                    self.warnings.append(f"kernel {self.tables.release} has no driver for {where}: {harmless}")

    def _device(self, group: Wanted, device: Device) -> bool:
        """Takes its drivers and what is above it; whether it has any. What lacks above is MISSING."""
        drivers = self.drivers(device.modalias)
        reason = f"{group.reason} {_where(device)}"
        for name in drivers:
            self.add(name, group.role, reason, device.modalias, now=group.now, required=group.required)
        for alias, why in upper_aliases([device]) if drivers else ():
            above, must = self.drivers(alias), group.must_have(alias)
            for name in above:
                self.add(name, group.upper_role, why, alias, now=group.now_above(alias), required=must)
            if must and not above:
                self.miss(alias, group.upper_role, f"{why}; {reason}")
        return bool(drivers)

    def drivers(self, alias: str) -> tuple[str, ...]:
        """Modules and built-in drivers for an alias; a fallback alone is none where the template knows a real one."""
        if alias not in self._drivers:
            found = dict.fromkeys(self.tables.match(alias, self.budget))
            known = (*self.template.named(alias, self.budget), *known_names(alias, self.budget))
            found.update(dict.fromkeys(name for name in known if name in self.tables.builtin))
            if found.keys() <= _FALLBACKS and set(known) - _FALLBACKS:
                found = {}
            self._drivers[alias] = tuple(found)
        return self._drivers[alias]

    def needs(self, needs: Iterable[Need]) -> None:
        for need in needs:
            found = next((names for one in need.names if (names := self.tables.resolve(one, self.budget))), ())
            for name in found:
                self.add(name, need.role, need.reason, now=True, required=need.required)
            if need.required and not found:
                self.miss(need.names[0], need.role, need.reason)

    def console(self, console: str) -> None:
        name = "virtio_console" if console.startswith("hvc") else "8250"
        if console and not console.startswith("tty0"):
            if self.tables.has(name):
                self.add(name, Role.CONSOLE, f"the console {console}", now=True)
            else:
                self.warnings.append(f"kernel {self.tables.release} has no driver {name} for the console {console}")

    # --- decisions ---

    def add(self, name: str, role: Role, reason: str, alias: str = "", *, now: bool, required: bool = False) -> None:
        """Of two that ask for the same driver the one that needs it now counts, then the more important role."""
        module = self.tables.modules.get(name)
        if module is None:
            verdict, reason = Verdict.BUILT_IN, f"{reason}; part of the kernel"
        elif now:
            verdict = Verdict.IN
        elif module.origin != "client":
            verdict, reason = Verdict.IN, f"{reason}; the root disk does not have it"
        else:
            verdict, reason = Verdict.LATER, f"{reason}; the system loads it from its root disk"
        new = Decision(name, verdict, role, reason, alias=alias)
        old = self.made.get(name)
        if required:
            self.required.add(name)
        if old is None or _weight(new) < _weight(old):
            self.made[name] = new

    def miss(self, what: str, role: Role, reason: str) -> None:
        self.missing.setdefault(what, Decision(what, Verdict.MISSING, role, reason, alias=what if ":" in what else ""))

    def close(self) -> tuple[Module, ...]:
        """Dependencies of all that is IN, and whether those of wanted cards are there; the modules in order."""
        names = []
        for name, one in list(self.made.items()):
            asked = one.verdict is Verdict.IN or (one.verdict is Verdict.LATER and name in self.required)
            if asked and self._complete(name, one) and one.verdict is Verdict.IN:
                names.append(name)
        closure = close(self.tables, names, self.budget)
        for name in (*closure.built_in, *(module.name for module in closure.load)):
            if name not in names:
                self.add(name, Role.DEPENDENCY, f"needed by {closure.wanted_by.get(name, '')}", now=True)
        return closure.load

    def _complete(self, name: str, one: Decision) -> bool:
        lacking = close(self.tables, [name], self.budget).missing
        if not lacking:
            return True
        words = ", ".join(f"{needed} (needed by {by})" for needed, by in lacking)
        if name in self.required:
            for needed, by in lacking:
                self.miss(needed, one.role, f"module {by} needs it; {one.reason}")
        else:
            self.warnings.append(f"module {name} of kernel {self.tables.release} is of no use: there is no {words}")
            del self.made[name]
        return False

    def leave_out(self, origin: Iterable[str]) -> None:
        for alias in origin:
            above = [upper for upper, _ in upper_aliases([Device(modalias=alias)])]
            for one in (alias, *above):
                for name in self.drivers(one):
                    self._out(name, "the hardware that the guest came from needed it", one)
        for name in self.template.modules:
            self._out(name, "a default of the template that this target has no use for", "")

    def _out(self, name: str, reason: str, alias: str) -> None:
        if name not in self.made and name not in self.tables.builtin:
            self.made[name] = Decision(name, Verdict.OUT, Role.OTHER, reason, alias=alias)

    def decisions(self, load: Sequence[Module]) -> tuple[Decision, ...]:
        """Missing first, then what goes in, in its order, then the rest by verdict and name."""
        inside = []
        for module in load:
            inside.append(replace(self.made[module.name], path=module.path, origin=module.origin))
        rest = [one for one in self.made.values() if one.verdict is not Verdict.IN]
        order = list(Verdict)
        rest.sort(key=lambda one: (order.index(one.verdict), one.module))
        return (*self.missing.values(), *inside, *rest)


def _weight(one: Decision) -> tuple[bool, int]:
    return one.verdict is Verdict.LATER, _RANK[one.role]


def _where(device: Device) -> str:
    words = " at ".join(word for word in (device.description, device.slot) if word)
    return f"{words} ({device.modalias})" if words else device.modalias


