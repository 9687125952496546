"""What runs when nobody types: one daemon for each home, which takes what is due and goes on with what was interrupted.

`loop` is the daemon and its round: points that are due, and taps that are gone. What else a round begins has a module
of its own: `resuming` (reverts, and what was brought up), `verifying` (test boots). `shared` is what they have in
common: whom they tell, what is running, and how long they wait after a failure.
"""

from appliance.daemon.loop import Daemon
from appliance.daemon.shared import Event

__all__ = ["Daemon", "Event"]
