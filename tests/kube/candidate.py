"""A candidate for a lease, as a process that a test may freeze or kill: notes when its fence let it write.

usage: candidate.py FOLDER PORT NAMESPACE IDENTITY NOTES OBJECTS LEASE_S RENEW_S RETRY_S

While it leads it applies ConfigMaps c0 … c<OBJECTS-1> again and again, stamped with its identity, through the fenced
client. NOTES gets "# leading" when it is elected, and one line for each write that the fence let through:
"<monotonic before> <monotonic after>".
FOLDER holds token and ca.crt, as in a pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path

from controller.kube.client import Client
from controller.kube.credentials import in_cluster
from controller.kube.errors import KubeError
from controller.kube.lease import Lease
from controller.kube.resource import CONFIG_MAPS


async def main(
    folder: Path, port: str, namespace: str, identity: str, notes: Path, objects: int, *times_s: float
) -> None:
    lease_s, renew_s, retry_s = times_s
    with notes.open("a", buffering=1) as out:
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": port}
        async with Client(in_cluster(folder, environ), timeout_s=5) as client:
            await client.raw("/version")
            out.write("# ready\n")
            lease = Lease(client, namespace, "leader", identity, lease_s=lease_s, renew_s=renew_s, retry_s=retry_s)
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
                    await asyncio.sleep(0.02)

            running = asyncio.create_task(lease.run(leading))
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
            await asyncio.gather(running, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(
        main(Path(sys.argv[1]), *sys.argv[2:5], Path(sys.argv[5]), int(sys.argv[6]), *map(float, sys.argv[7:10]))
    )
