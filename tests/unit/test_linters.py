"""The tools that read the code are tests too, so that one command tells the truth about a commit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def shell_scripts() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    scripts = []
    for name in listed.splitlines():
        path = ROOT / name
        if path.is_file():
            with path.open("rb") as file:
                if file.read(40).startswith((b"#!/bin/sh", b"#!/bin/bash")):
                    scripts.append(name)
    return scripts


def test_ruff():
    run("ruff", "check", ".")


@pytest.mark.timeout(300)
def test_mypy_strict():
    run(sys.executable, "-m", "mypy")


@pytest.mark.timeout(120)
def test_import_layers():
    run("lint-imports")


def test_shellcheck():
    run("shellcheck", *shell_scripts())


def test_requirements_have_lower_bounds():
    """In an environment that sees Debian's packages pip is content with any version unless it is told otherwise."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        assert ">=" in requirement or "==" in requirement, requirement


def test_versions_seen_are_those_asked_for():
    """An old Debian package that hides the asked version would only fail at some later call."""
    import tomllib
    from importlib.metadata import version

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), text
