"""What is written about the command line is compared with the command line."""

from __future__ import annotations

import configparser
import dataclasses
import json
import re
import resource
import sqlite3
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import click
import pytest

from appliance.cli import main, man, records
from appliance.cli.app import VERBS, program
from appliance.cli.command import Verb
from appliance.config import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (files("appliance.cli") / "JSON.md").read_text()
LOADED = [getattr(records, name) for name in records.__all__]
RECORDS = {kind.type: kind for kind in records.Record.__subclasses__()}


def documented():
    """type → fields, as JSON.md has them."""
    found = {}
    for section in re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)[1:]:
        name, _, text = section.partition("\n")
        rows = re.findall(r"^\| ([a-z_, ]+) \|", text, flags=re.MULTILINE)
        found[name.strip()] = [field.strip() for row in rows if row != "field" for field in row.split(",")]
    return found


@pytest.fixture
def unit(monkeypatch, capsys):
    for name in ("REWIND_HOME", "REWIND_CONNECT"):
        monkeypatch.delenv(name, raising=False)

    def made(*words):
        monkeypatch.setattr("sys.argv", ["/opt/venv/bin/rewind"])
        assert main([*words, "help", "systemd"]) == 0
        found = configparser.ConfigParser(interpolation=None)
        found.optionxform = str
        found.read_string(capsys.readouterr().out)
        return found

    return made


def test_the_unit_of_systemd_works_where_it_was_asked_for(unit, monkeypatch):
    """Or the daemon looks into another home than the one that a person tried it with."""
    monkeypatch.setenv("REWIND_HOME", "/srv/50% of $it/it's")
    started = unit("--connect", "qemu:///session")["Service"]["ExecStart"]
    home = '"/srv/50%% of $$it/it\'s"'
    assert started == f"/opt/venv/bin/rewind --home {home} --connect qemu:///session daemon"
    monkeypatch.chdir("/srv")
    monkeypatch.setenv("REWIND_HOME", 'a "b\\c')
    assert unit()["Service"]["ExecStart"] == r'/opt/venv/bin/rewind --home "/srv/a \"b\\c" daemon'


def test_the_unit_of_systemd_has_what_the_daemon_needs(unit):
    """Its children outlive it, it tells systemd when it is ready, and a signal has it look anew."""
    found = unit()
    service = found["Service"]
    assert service["SuccessExitStatus"] == "143", "a SIGTERM while it still opens the repository"
    assert (service["ExecStart"], service["Type"]) == ("/opt/venv/bin/rewind daemon", "notify")
    assert (service["KillMode"], service["OOMPolicy"]) == ("process", "continue")
    assert "-HUP" in service["ExecReload"] and found["Install"]["WantedBy"] == "multi-user.target"


def test_every_type_is_documented():
    assert set(documented()) == set(RECORDS)


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_every_field_is_documented(name):
    """The machine's side of the command line is promised field by field."""
    assert sorted(documented()[name]) == sorted(field.name for field in dataclasses.fields(RECORDS[name]))


def commands(group=program, path=("rewind",)):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def test_every_verb_of_the_table_is_there():
    assert [path[1] for path, _command in commands() if len(path) == 2] == list(VERBS)


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_the_manual_has_every_verb_and_option(path, command):
    page = man.page().replace("\\-", "-")
    assert " ".join(path) in page
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.opts[0] in page, f"{' '.join(path)} {option.opts[0]}"


def test_the_manual_in_the_tree_is_the_one_of_this_program():
    """`./dev rewind help man > appliance/cli/rewind.1` brings it up to date."""
    assert (ROOT / "appliance/cli/rewind.1").read_text() == man.page()


def test_the_manual_can_be_rendered(tmp_path):
    page = tmp_path / "rewind.1"
    page.write_text(man.page())
    try:
        done = subprocess.run(
            ["man", "--warnings", "-l", str(page)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
        )
    except FileNotFoundError:
        pytest.skip("needs man")
    assert not done.stderr, done.stderr
    assert "NAMING AN INSTANT" in done.stdout or "This system has been minimized" in done.stdout or not done.stdout


@pytest.mark.parametrize("command", [command for _path, command in commands() if isinstance(command, Verb)])
def test_help_ends_with_the_exit_codes(command):
    text = command.get_help(click.Context(command, info_name=command.name))
    assert "Exit codes:" in text
    assert command.help, command.name
    assert command.get_short_help_str(), command.name


def test_the_manual_says_what_exit_codes_mean(capsys):
    """The same as `rewind help exit-codes`, also of those that no error has."""
    assert main(["--json", "help", "exit-codes"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {0, 1, 2, 41, 130, 143} <= {one["code"] for one in found}
    page = man.page()
    for one in found:
        term, meaning = (man._escape(text) for text in (f"{one['code']} {one['id']}", one["meaning"]))
        assert f".B {term}\n{meaning}\n" in page


@pytest.mark.parametrize(("name", "codes"), [("status", ["1"]), ("doctor", ["1", "2"])])
def test_codes_that_are_no_errors_are_in_the_table_of_help(name, codes):
    command = program.get_command(click.Context(program), name)
    table = command.get_help(click.Context(command, info_name=name)).partition("Exit codes:")[2]
    found = [line.split()[0] for line in table.splitlines() if line[:4].strip() or line.startswith("  ")]
    assert found[: 1 + len(codes)] == ["0", *codes]


@pytest.mark.parametrize("name", ["start", "serve", "resume", "forget"])
def test_verbs_that_take_a_name_alone_tell_that_it_may_be_held(name):
    [command] = [command for path, command in commands() if path[-2:] == ("image", name)]
    table = command.get_help(click.Context(command, info_name=name)).partition("Exit codes:")[2]
    assert re.search(r"^ +31 ", table, re.MULTILINE)


def test_help_is_there_at_once():
    """Without libvirt, boto3 or pydantic being imported. Processor time, because this machine is shared."""
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "appliance.cli", "--help"], check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"rewind --help: {best * 1000:.0f} ms")
    assert best < 0.3
    code = "import sys; import appliance.cli; appliance.cli.main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    heavy = {"boto3", "libvirt", "nbd", "pydantic", "yaml", "zstandard", "blake3", "cryptography", "qemu", "rich"}
    assert not heavy & set(done.stderr.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell):
    command = [sys.executable, "-m", "appliance.cli", "completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "_REWIND_COMPLETE" in done.stdout


def test_settings_are_documented_with_their_defaults(capsys):
    """`rewind help settings`: each key once, as it is."""
    assert main(["help", "settings"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    told = {key.removeprefix("| "): default for key, default, _ in rows}
    assert told == {one.name: str(one.default) for one in dataclasses.fields(Settings)} and len(rows) == len(told)


def test_completion_knows_verbs_options_and_domains(tmp_path):
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains/u.json").write_text('{"domain": "webserver"}')
    (tmp_path / "domains/broken.json").write_text("{")

    def complete(words):
        environment = {
            "PATH": "/usr/bin:/bin", "_REWIND_COMPLETE": "bash_complete", "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split())), "REWIND_HOME": str(tmp_path), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        code = "import sys; sys.argv = ['rewind']; from appliance.cli import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        return done.stdout.split()

    assert "plain,revert" in complete("rewind ")
    assert "plain,webserver" in complete("rewind points ")
    (tmp_path / "cache").mkdir()
    with sqlite3.connect(tmp_path / "cache/catalogue.sqlite") as database:
        database.execute("CREATE TABLE points (id, domain, uuid, label, time)")
        database.execute("INSERT INTO points VALUES ('0123abcd', 'webserver', 'u', 'before-upgrade', 1)")
    database.close()
    assert complete("rewind revert webserver --to ") == ["plain,latest", "plain,before-upgrade", "plain,0123abcd"]
    assert complete("rewind diff webserver ") == ["plain,latest", "plain,before-upgrade", "plain,0123abcd"]
    assert complete("rewind diff other ") == ["plain,latest"]
