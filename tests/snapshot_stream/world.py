"""Both ends of the stream in one loop, over a real unix socket; and a publisher that says whatever a test wants."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import grpc
import grpc.aio

from apis import records
from apis.policy import Endpoint, Grant, Policy, Quota, QuotaLimit, RateLimit, Route, Token
from apis.records import METHOD, Record
from apis.wire.snapshot_pb2 import FollowRequest, FollowResponse
from controller.snapshot.feed import Feed
from controller.snapshot.server import PolicyServer
from extproc.snapshot.stream import StreamSource

TIMEOUT_S = 60.0


def token(name: str, secret: int = 1, rpm: int = 5, namespace: str = "team-a") -> Token:
    return Token(namespace, name, secret.to_bytes(32), (Grant("qwen", (RateLimit("rpm", rpm),), "basic"),))


def quota(name: str = "basic", total: int = 100, namespace: str = "team-a") -> Quota:
    return Quota(namespace, name, (QuotaLimit("total", total),))


def endpoint(name: str = "qwen", *addresses: str, hosts: tuple[str, ...] = (), namespace: str = "team-a") -> Endpoint:
    return Endpoint(namespace, name, name, (Route("app", 1, addresses, hosts),))


def put(feed: Feed, *items: Record) -> bool:
    return feed.change([(records.place_of(item), item) for item in items])


def drop(feed: Feed, *items: Record) -> bool:
    return feed.change([(records.place_of(item), None) for item in items])


def held(policy: Policy) -> set[Record]:
    return {*policy.tokens.values(), *policy.quotas.values(), *policy.endpoints.values()}


async def until(check: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not check():  # noqa: ASYNC110 - what happens at the other end of a socket sets no event here
            await asyncio.sleep(0.005)


class Following:
    """A `StreamSource` and all that it reported."""

    def __init__(self, folder: Path, address: str = "", **changes) -> None:
        self.policies: list[Policy] = []
        self.errors: list[str] = []
        self.address = address or f"unix:{folder / 'policy.sock'}"
        self.folder = folder
        self.source = StreamSource(
            self.address,
            lambda policy, _notes: self.policies.append(policy),
            lambda errors: self.errors.append(str(errors)),
            state_dir=folder,
            **changes,
        )

    @property
    def policy(self) -> Policy:
        return self.policies[-1]

    async def shows(self, *items: Record) -> None:
        """Wait until exactly these are in force."""
        await until(lambda: self.policies and held(self.policy) == set(items))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Following"]:
        """Started, and followed for the length of the block."""
        async with asyncio.timeout(TIMEOUT_S):
            await self.source.start()
        task = asyncio.create_task(self.source.run())
        await asyncio.sleep(0)  # a task that is cancelled before it began does nothing
        try:
            yield self
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def publishing(
    feed: Feed, folder: Path, *, ready: bool = True, view_age_s: float = 0.0, pulse_s: float = 0.05
) -> AsyncIterator[asyncio.Event]:
    """The real server end of a feed; yields its `ready`."""
    event = asyncio.Event()
    if ready:
        event.set()
    address = f"unix:{folder / 'policy.sock'}"
    async with PolicyServer(feed, address, ready=event, view_age_s=lambda: view_age_s, pulse_s=pulse_s):
        yield event


@contextlib.asynccontextmanager
async def saying(
    folder: Path, script: Callable[[int, FollowRequest], Iterable[FollowResponse | bytes]]
) -> AsyncIterator[list[FollowRequest]]:
    """A publisher that answers its n-th follower with a script and then stays silent; yields the requests."""
    requests: list[FollowRequest] = []

    async def follow(request, context):
        requests.append(request)
        for said in script(len(requests), request):
            await context.write(said if isinstance(said, bytes) else said.SerializeToString())
        await asyncio.Event().wait()

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            assert details.method == METHOD
            return grpc.unary_stream_rpc_method_handler(follow, request_deserializer=FollowRequest.FromString)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(f"unix:{folder / 'policy.sock'}")
    await server.start()
    try:
        yield requests
    finally:
        await server.stop(None)
