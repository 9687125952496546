"""One finding, and the three ways to write one down."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check", "fail", "ok", "warn"]


@dataclass(frozen=True, slots=True)
class Check:
    """`status`: ok; warn (works, and deserves a look); fail (protection does not work until it is mended)."""

    name: str
    status: str
    finding: str
    remedy: str = ""


def ok(name: str, finding: str) -> Check:
    return Check(name, "ok", finding)


def warn(name: str, finding: str, remedy: str) -> Check:
    return Check(name, "warn", finding, remedy)


def fail(name: str, finding: str, remedy: str) -> Check:
    return Check(name, "fail", finding, remedy)
