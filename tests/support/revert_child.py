"""A revert in a process of its own, to be killed: python -m tests.support.revert_child JSON.

With `die` it kills itself (and first whoever else is named in `also`) at that very step: `save:PHASE` right after the
phase is durable, `after:STEP` right after a step of the block graph.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from appliance.capture import epoch
from appliance.config import DEFAULT_SETTINGS, Home, load_settings
from appliance.hypervisor import connect
from appliance.hypervisor.graph import retrieval, switching
from appliance.restore import intent as intents
from appliance.restore import keeper
from appliance.restore.revert import Reverter
from appliance.store import RepositorySpec


def arm(order, home, uuid):
    """Put the death in its place."""
    kind, _, name = order["die"].partition(":")

    def die():
        state = keeper.state(home, uuid)
        pids = {"keeper": state.get("key", ""), "view": state.get("view", ""), "qemu": str(order["qemu"])}
        for victim in order["also"]:
            if pids[victim]:
                os.kill(int(pids[victim].partition(":")[0]), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    graph = switching if hasattr(switching, name) else retrieval
    owner, attribute = {"save": (intents, "save"), "after": (graph, name)}[kind]
    if name == "take":
        owner, attribute = epoch.Increment, "take"
    real = getattr(owner, attribute)

    def fatal(*words, **options):
        result = real(*words, **options)
        if kind == "after" or words[1].phase.value == name:
            die()
        return result

    setattr(owner, attribute, fatal)


def main():
    order = json.loads(sys.argv[1])
    home = Home(Path(order["home"]))
    spec = RepositorySpec.from_json(order["spec"])
    hypervisor = connect(order["uri"])
    repo = spec.open()
    domain = hypervisor.domain("bare")
    if order.get("die"):
        arm(order, home, domain.uuid)
    settings = load_settings(home, DEFAULT_SETTINGS)
    reverter = Reverter(home, settings, spec, repo, domain, Path("/nonexistent"))
    result = reverter.revert(repo.point(order["point"]), instant=order["instant"], rate=order["rate"])
    print(result.state)


if __name__ == "__main__":
    main()
