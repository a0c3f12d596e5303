"""A publisher in a process of its own, to be killed: `python -m tests.snapshot_stream.publishing KUBECONFIG ADDRESS`.

Prints the address once it listens, and "ready" once it tells the whole policy.
"""

import asyncio
import sys

from controller.kube.client import Client
from controller.kube.credentials import from_kubeconfig
from controller.kube.discovery import Discovery
from controller.reconcile.watches import Watches
from controller.snapshot.publisher import Publisher


async def main(kubeconfig: str, address: str) -> None:
    async with Client(from_kubeconfig(kubeconfig)) as client, asyncio.TaskGroup() as group:
        discovery = Discovery(client, interval_s=0.5)
        watches = Watches(client, discovery)
        publisher = Publisher(client, discovery, watches, address)
        for work in (discovery.run, watches.run, publisher.run):
            group.create_task(work())
        await publisher.listening.wait()
        print(publisher.address, flush=True)
        await publisher.ready.wait()
        print("ready", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
