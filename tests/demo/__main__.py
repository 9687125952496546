"""A real guest loses something, and is brought back to the write before, by moving only what changed.

    boot ─ load ─ protect ─ every write … ─ damage ─ revert --instant ─ check ─ work ─ undo ─ check ─ forward ─ check

With `--epochs` it is protected by a point every few seconds instead, and brought back to the last one.

Everything that is said was measured in this run. Ends with exit code 1 when anything that was checked is not so.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.demo.appliance import Appliance, Running
from tests.demo.subjects import DebianSubject, TinySubject
from tests.demo.tell import Teller, human_bytes
from tests.support import libvirt, world


class Demo:
    """One run. `verified` collects what was checked; `figures` what was measured."""

    def __init__(self, tell: Teller, tiny: bool, epochs: bool) -> None:
        self.tell = tell
        self.tiny = tiny
        self.continuous = not epochs
        self.verified: dict[str, bool] = {}
        self.figures: dict[str, Any] = {}
        self.every = 3 if tiny else 5
        self.points_before = 3 if tiny else 4

    def run(self) -> None:
        with self.tell.step("libvirt and the guest start, in software emulation") as told:
            libvirt.start()
            folder = world.images_folder("demo")
            self.subject = TinySubject(folder) if self.tiny else DebianSubject(folder)
            self.appliance = self._appliance()
            self.subject.boot()
            told["guest"] = self.subject.name
        daemon = None
        try:
            daemon = self._protect()
            if self.continuous:
                self._record_everything()
            else:
                self._take_points(daemon)
            self._lose_something(daemon)
            self._take_it_back()
            self._undo_and_forward()
            self._timeline()
        except BaseException:
            print(self.subject.evidence(), file=sys.stderr)
            raise
        finally:
            if daemon is not None:
                daemon.end()
            self.subject.end()

    def _appliance(self) -> Appliance:
        home = Path(tempfile.mkdtemp(prefix="demo-", dir=world.folder()))
        # QEMU runs as another user and passes through to the sockets of a run.
        home.chmod(0o711)
        return Appliance(home, self.subject.uri)

    # --- the story ---------------------------------------------------------------------------------------------------

    def _protect(self) -> Running:
        name = self.subject.name
        how = ["--continuous"] if self.continuous else ["--every", f"{self.every}s"]
        with self.tell.step(f"rewind init; rewind protect {name} {' '.join(how)}; rewind daemon") as told:
            self.subject.begin_load()
            self.appliance.run("init")
            protected = self.appliance.run("protect", name, *how)
            daemon = self.appliance.begin("daemon")
            told["disks"] = protected["disks"]
        try:
            with self.tell.step("the first point takes the whole disks, under load") as told:
                first = self.appliance.wait_points(name, lambda found: len(found) >= 1, 300, daemon)[0]
                told |= {key: first[key] for key in ("size_bytes", "moved_bytes", "stored_bytes")}
                told["pause_ms"] = _ms(first["pause_seconds"])
                self.figures["disk_bytes"] = first["size_bytes"]
        except BaseException:
            daemon.end()
            raise
        return daemon

    def _take_points(self, daemon: Running) -> None:
        name = self.subject.name
        with self.tell.step(f"{self.points_before - 1} more points take only what changed") as told:
            found = self.appliance.wait_points(name, lambda found: len(found) >= self.points_before, 120, daemon)
            told["moved"] = [human_bytes(point["moved_bytes"]) for point in found[1:]]
            told["pauses_ms"] = [_ms(point["pause_seconds"]) for point in found[1:]]

    def _record_everything(self) -> None:
        with self.tell.step("from now on every write is a recovery point") as told:
            before = self._capture()
            time.sleep(5)
            capture = self._capture()
            told["writes"] = capture["sequence"] - before["sequence"]
            told["lost_by_a_power_cut_now_s"] = capture["near_seconds"]
            told["added_latency_ms"] = _ms(capture["added_latency_seconds"])
            self._check("every_write_is_recorded", capture["mode"] == "tap" and told["writes"] > 0)

    def _capture(self) -> dict[str, Any]:
        """How the capture stands, once it records."""
        deadline = time.monotonic() + 60
        while True:
            found = self.appliance.lines("status", self.subject.name)
            capture: dict[str, Any] = next(line["capture"] for line in found if line["type"] == "domain-status")
            if capture["mode"] == "tap" or time.monotonic() > deadline:
                return capture
            time.sleep(0.3)

    def _lose_something(self, daemon: Running) -> None:
        name = self.subject.name
        with self.tell.step("something is lost") as told:
            before = self.appliance.points(name)
            told["damage"], self.damaged_at = self.subject.damage()
            if self.continuous:
                # To the very instant before the damage; what no client was told of may be in it or not.
                moment = datetime.datetime.fromtimestamp(self.damaged_at, datetime.UTC)
                self.target, self.good_from, self.good_until = moment.isoformat(), self.damaged_at, self.damaged_at
            else:
                # The daemon goes on and keeps the damage, too.
                done = time.time()
                self.appliance.wait_points(
                    name, lambda found: any(_seconds(point["time"]) > done for point in found), 120, daemon
                )
                good = [point for point in before if _seconds(point["time"]) <= self.damaged_at][-1]
                self.target, self.good_from = good["id"], _seconds(good["time"])
                self.good_until = self.good_from + good["pause_seconds"]
            lost = self.subject.answer()
            told["now"] = lost.json()
            self._check("damage_was_real", lost.rows is None and not lost.documents)

    def _take_it_back(self) -> None:
        name, to = self.subject.name, ("--to", self.target)
        with self.tell.step(f"rewind revert {name} --to {self.target} --instant") as told:
            plan = self.appliance.run("revert", name, *to, "--instant", "--dry-run")
            result = self._revert_and_answer("revert", name, *to, "--instant", "--yes", "--wait", "60s")
            told["planned_bytes"] = plan["changed_bytes"]
            told |= result
            for key in ("changed_bytes", "moved_bytes", "answer_seconds"):
                self.figures[key] = result[key]
            self.figures["revert_pause_ms"] = result["pause_ms"]
            self._check("moved_only_what_changed", result["moved_bytes"] <= 1.1 * result["changed_bytes"])
        with self.tell.step("the guest is asked what it sees") as told:
            answer = self.subject.answer()
            least = self.subject.promises.at_least(self.good_from)
            most = self.subject.promises.at_most(self.good_until)
            told |= {"answer": answer.json(), "promised_before_that_instant": least, "possible_by_then": most}
            self._check("rows", answer.exact and answer.rows is not None and least <= answer.rows <= most)
            self._check("documents", answer.documents)
            self.figures["rows"] = answer.rows

    def _undo_and_forward(self) -> None:
        name = self.subject.name
        with self.tell.step("clients go on writing, and the revert is undone") as told:
            self.subject.begin_load()
            time.sleep(2)
            result = self._revert_and_answer("undo", name, "--instant", "--yes", "--wait", "60s")
            undone = self.subject.answer()
            told |= result | {"answer": undone.json()}
            self._check("undo", undone.rows is None and not undone.documents)
        with self.tell.step("forward again, to what the clients wrote since") as told:
            forward = result["safety_point"]
            point = next(point for point in self.appliance.points(name) if point["id"] == forward)
            instant = _seconds(point["time"])
            result = self._revert_and_answer("revert", name, "--to", forward, "--yes", "--wait", "60s")
            answer = self.subject.answer()
            least, most = self._later_promises(instant)
            told |= result | {"answer": answer.json(), "promised_before_the_point": least, "possible_by_then": most}
            newer = answer.rows is not None and answer.rows > (self.figures["rows"] or 0)
            self._check("forward", answer.exact and newer and answer.documents and least <= (answer.rows or 0) <= most)

    def _timeline(self) -> None:
        points = self.appliance.points(self.subject.name)
        rows = [["time", "taken for", "changed", "moved", "pause", "history"]]
        shown = False
        for point in points:
            if not shown and _seconds(point["time"]) > self.damaged_at:
                rows.append([_clock(self.damaged_at), "*** damage ***", "", "", "", ""])
                shown = True
            rows.append(
                [
                    _clock(_seconds(point["time"])), point["reason"], human_bytes(point["changed_bytes"] or 0),
                    human_bytes(point["moved_bytes"]), f"{_ms(point['pause_seconds'])} ms", str(point["timeline"])[:8],
                ]
            )  # fmt: skip
        self.tell.table("Timeline", rows)
        self.figures["points"] = len(points)
        pauses = sorted(_ms(point["pause_seconds"]) for point in points if point["reason"] != "safety")
        self.figures["pause_ms"] = pauses[len(pauses) // 2]
        self.figures["longest_pause_ms"] = pauses[-1]

    # --- measuring ---------------------------------------------------------------------------------------------------

    def _revert_and_answer(self, *words: str) -> dict[str, Any]:
        """Run a verb that resets the guest; how long until it answers, counted from the command."""
        self.subject.expect_reset()
        started = time.time()
        running = self.appliance.begin(*words)
        try:
            answered = self.subject.wait_answer(300, lambda: running.failed)
        except Exception:
            if running.ended:
                running.result()  # raises what the verb itself said, which explains more
            running.end()
            raise
        pending = not running.ended
        result = running.result()
        chosen = {key: result[key] for key in ("changed_bytes", "moved_bytes", "safety_point")}
        # The verb's own time is without its wait for the daemon's point that was under way.
        chosen["revert_seconds"] = round(result["seconds"], 3)
        chosen["command_seconds"] = round(running.seconds(), 3)
        chosen |= {"pause_ms": _ms(result["pause_seconds"]), "answer_seconds": round(answered - started, 3)}
        return chosen | {"blocks_still_pending_then": pending}

    def _later_promises(self, instant: float) -> tuple[int, int]:
        """As for the first revert, but only of what was seen after it: the rows' numbers began again."""
        seen = [one for one in self.subject.promises.seen if one[0] > self.damaged_at]
        promises = dataclasses.replace(self.subject.promises, seen=seen)
        return promises.at_least(instant), promises.at_most(instant)

    def _check(self, name: str, good: bool) -> None:
        self.verified[name] = good
        self.tell.say(f"{'verified' if good else 'NOT SO'}: {name.replace('_', ' ')}")


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def _clock(instant: float) -> str:
    return datetime.datetime.fromtimestamp(instant).strftime("%H:%M:%S.%f")[:-3]


def _ms(seconds: float | None) -> float:
    return round((seconds or 0) * 1000, 1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a busybox guest instead of Debian: under a minute")
    parser.add_argument("--epochs", action="store_true", help="a point every few seconds instead of every write")
    parser.add_argument("--json", action="store_true", help="JSON lines; the last one is the result")
    options = parser.parse_args()
    tell = Teller(options.json)
    demo = Demo(tell, options.tiny, options.epochs)
    started = time.monotonic()
    error = ""
    try:
        demo.run()
    except Exception as problem:
        error = str(problem) or repr(problem)
        if not options.json:
            traceback.print_exc()
    ok = not error and bool(demo.verified) and all(demo.verified.values())
    result: dict[str, Any] = {"ok": ok, **demo.figures, "verified": demo.verified}
    result["seconds"] = round(time.monotonic() - started, 1)
    if error:
        result["error"] = error
    tell.end(result)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
