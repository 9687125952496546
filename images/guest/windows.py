"""A Windows that a point holds: what is known of it, and the refusal that tells it to whoever only knows Linux.

Experimental: never promised. Tried with a disk that was made like one, never with a real Windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from appliance.errors import GuestUnreadable
from images.guest.layout import ESP
from images.guest.texts import printable
from images.guest.volumes import Volume
from images.model import Firmware

__all__ = ["IsWindows", "Service", "Windows", "firmware_of"]

# A terminal shows them: what a reader that was taken over tells is no more believed than what it read.
_Word = Annotated[str, Field(max_length=128), AfterValidator(printable)]


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Service(_Told):
    """Of a driver: `start` as the registry has it (0: at boot, 3: on demand, 4: never), None where it makes no sense;
    `file`: whether its .sys file is there."""

    start: int | None = Field(default=None, ge=0, le=0xFFFFFFFF)
    file: bool = False


class Windows(_Told):
    """`volume` is that of its root, `disk` the target that it lies on. `version` as in `10.0`, `build` a number, `arch`
    as in `AMD64`; empty where the registry does not tell. `control_set` is the current one. `state`: `clean`,
    `hibernated` (also by Fast Startup), `unclean` or `damaged`; `whole`: the registry has all that was written to it.
    `services` are those of drivers for disks that are there, in lower case."""

    volume: Annotated[str, Field(max_length=512), AfterValidator(printable)]
    product: _Word = ""
    host: _Word = ""
    version: Annotated[str, Field(pattern=r"^([0-9]{1,3}\.[0-9]{1,3})?$")] = ""
    build: _Word = ""
    arch: _Word = ""
    control_set: Annotated[str, Field(pattern=r"^ControlSet[0-9]{3}$")]
    state: Literal["clean", "hibernated", "unclean", "damaged"]
    whole: bool
    services: dict[Annotated[str, Field(max_length=64)], Service] = {}

    @property
    def name(self) -> str:
        return self.product or "Windows"

    def at_least(self, major: int, minor: int) -> bool:
        """Not so where the version is not known."""
        found = tuple(map(int, self.version.split("."))) if self.version else (0, 0)
        return found >= (major, minor)


class IsWindows(GuestUnreadable):
    """The system is a Windows. What is known of it is in `windows`, and in `volumes` where it lies."""

    windows: Windows
    volumes: tuple[Volume, ...]

    @classmethod
    def found(cls, windows: Windows, volumes: Sequence[Volume]) -> IsWindows:
        reason = f"it is {windows.name}, on {windows.volume}, and this is for Linux guests"
        hint = "`rewind image plan` and `rewind image start` know Windows, as an experiment"
        error = cls(what="the point", reason=reason, hint=hint)
        error.windows, error.volumes = windows, tuple(volumes)
        return error


def firmware_of(volumes: Sequence[Volume]) -> Firmware:
    """What its disks are set up for: Windows starts by UEFI from an EFI system partition, by BIOS without one."""
    return Firmware.UEFI if any(one.kind == ESP for one in volumes) else Firmware.BIOS
