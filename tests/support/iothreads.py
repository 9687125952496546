"""Whether the QEMU of this machine is one whose disks with an iothread are protected. Where they are refused, tests
that would have one do the same without."""

from __future__ import annotations

import functools
import subprocess

from appliance.hypervisor.graph.survey import SILENT
from appliance.service.doctor.known import parse

__all__ = ["protected"]


@functools.cache
def protected() -> bool:
    said = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True).stdout
    return parse(said.split()[3])[0] < SILENT
