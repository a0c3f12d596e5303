"""A candidate for a lease, as a process that a test may freeze or kill: notes when its fence let it write.

usage: candidate.py KUBECONFIG NAMESPACE IDENTITY NOTES OBJECTS

While it leads it applies ConfigMaps c0 … c<OBJECTS-1> again and again, stamped with its identity, through the fenced
client. NOTES gets one line for each write that the fence let through: "<monotonic before> <monotonic after>".
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path

from controller.kube.client import Client
from controller.kube.credentials import from_kubeconfig
from controller.kube.errors import KubeError
from controller.kube.lease import Lease
from controller.kube.resource import CONFIG_MAPS

LEASE_S, RENEW_S, RETRY_S = 3.0, 2.0, 0.3


async def main(kubeconfig: str, namespace: str, identity: str, notes: Path, objects: int) -> None:
    with notes.open("a", buffering=1) as out:
        async with Client(from_kubeconfig(kubeconfig), timeout_s=5) as client:
            await client.raw("/version")
            out.write("# ready\n")
            lease = Lease(client, namespace, "leader", identity, lease_s=LEASE_S, renew_s=RENEW_S, retry_s=RETRY_S)
            writer = client.fenced(lease.fence)

            async def leading() -> None:
                out.write("# leading\n")
                n = 0
                while True:
                    body = {
                        "metadata": {"name": f"c{n % objects}", "namespace": namespace},
                        "data": {"by": identity, "n": str(n)},
                    }
                    began = time.monotonic()
                    with contextlib.suppress(KubeError):
                        await writer.apply(CONFIG_MAPS, body)
                        out.write(f"{began} {time.monotonic()}\n")
                    n += 1
                    await asyncio.sleep(0.005)

            running = asyncio.create_task(lease.run(leading))
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
            await asyncio.gather(running, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5])))
