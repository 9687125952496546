"""The verbs of Rewind: everything that the command line and the daemon can do, as plain functions of a Session.

    Session      home, settings, repository, key, hypervisor, catalogue; opened when first used
    setup        init                        keys       export, change the passphrase
    protection   protect, unprotect, point   status     of the instance and its domains
    history      points, diff                recovery   revert, undo, resume
    elsewhere    export, restore             upkeep     check, gc, forget
    doctor       what on this host hinders or endangers protection

Each verb holds its domain's lock while it changes anything. Nothing here prints or asks; errors are those of `errors`.
"""

from __future__ import annotations

from appliance.service.session import Progress, Session, silent

__all__ = ["Progress", "Session", "silent"]
