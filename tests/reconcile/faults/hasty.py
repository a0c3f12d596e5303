"""`arks controller` in a hurry: the same `run`, with a Lease and a patience of seconds instead of half a minute.

usage: python -m tests.reconcile.faults.hasty '{"kubeconfig": "...", ...}'     fields of ControllerSettings, as JSON
"""

from __future__ import annotations

import asyncio
import json
import sys

from controller.app import run
from controller.settings import ControllerSettings
from extproc.observe.logs import configure_logging

# A process that is starved for two seconds leads on.
HASTE = {"lease_s": 5.0, "renew_s": 3.5, "retry_s": 0.4, "discovery_s": 1.0, "watch_silence_s": 5.0}

if __name__ == "__main__":
    configure_logging("info", "json")
    sys.exit(asyncio.run(run(ControllerSettings(environment={}, **{**HASTE, **json.loads(sys.argv[1])}))))
