"""One aiohttp session to the API server: every read, write and watch of the program goes through here.

Answers are decoded by the function given (`decoder(type)`), to a plain dict without one. Failures are the typed errors
of `errors`; a 401 reads the credentials anew and tries once more. Writes go through `Client.fenced(fence)` in a program
with several replicas: such a view asks the fence before each write, once more as its bytes go to the socket, and bounds
the write by what is left of the lease, so that nothing is sent by one who does not lead. Life cycle:
`async with Client(credentials) as client`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar, overload

import aiohttp
import msgspec
from aiohttp.abc import AbstractStreamWriter

from controller.kube.credentials import Access, Credentials
from controller.kube.errors import KubeError, MalformedError, NotLeaderError, UnreachableError, api_error, described
from controller.kube.metrics import ClientStats
from controller.kube.resource import PODS, Resource

T = TypeVar("T")
Object = dict[str, Any]
Decode = Callable[[bytes], T]
Fence = Callable[[], float]  # seconds that the lease still holds; raises NotLeaderError

FIELD_MANAGER = "arks-controller"
TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 75.0  # of a watch; the server says something once a minute
PAGE = 500
CALLS_IN_FLIGHT = 32
WRITE_VERBS = frozenset({"create", "update", "patch", "delete", "deletecollection"})
APPLY = "application/apply-patch+yaml"  # JSON is YAML
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"

_json: Decode[Object] = msgspec.json.Decoder(Object).decode


@functools.cache
def decoder(kind: type[T]) -> Decode[T]:
    """Function from JSON to `kind`: a pydantic model, or whatever msgspec decodes."""
    validate = getattr(kind, "model_validate_json", None)
    if validate is not None:
        found: Decode[T] = validate
        return found
    return msgspec.json.Decoder(kind).decode


class _ListMeta(msgspec.Struct):
    resource_version: str = msgspec.field(name="resourceVersion", default="")
    token: str = msgspec.field(name="continue", default="")


class Page(msgspec.Struct):
    """One page of a list, its items still undecoded, so that one malformed item spoils no other."""

    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


_page: Decode[Page] = msgspec.json.Decoder(Page).decode


@dataclass(slots=True)
class _Pool:
    """The session, shared by all views of a client whenever they were made."""

    session: aiohttp.ClientSession | None = None


class Client:
    """Calls on one API server. Cheap views of it (`fenced`) share its session and counters."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        field_manager: str = FIELD_MANAGER,
        timeout_s: float = TIMEOUT_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.field_manager, self.timeout_s, self.silence_s = field_manager, timeout_s, silence_s
        self.stats = ClientStats()
        self._credentials = credentials
        self._in_flight = asyncio.Semaphore(CALLS_IN_FLIGHT)
        self._pool = _Pool()
        self._fence: Fence | None = None

    async def __aenter__(self) -> Self:
        # Watches live long, so the pool must not be a limit; calls have one of their own.
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=60)
        self._pool.session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pool.session is not None:
            await self._pool.session.close()
            self._pool.session = None
        await self._credentials.close()

    def fenced(self, fence: Fence) -> Client:
        """The same client, whose writes need the lease. Close the first one only."""
        view = copy.copy(self)
        view._fence = fence  # noqa: SLF001 - another view of this very object
        return view

    # -- reading ------------------------------------------------------------------------------------------------------

    @overload
    async def get(self, resource: Resource, name: str, namespace: str = "") -> Object: ...
    @overload
    async def get(self, resource: Resource, name: str, namespace: str = "", *, decode: Decode[T]) -> T: ...
    async def get(self, resource: Resource, name: str, namespace: str = "", *, decode: Decode[Any] = _json) -> Any:
        """One object; raises `NotFoundError`."""
        return _decoded(decode, await self._call("get", "GET", resource, namespace, name))

    @overload
    async def list(
        self, resource: Resource, namespace: str = "", *, label_selector: str = "", field_selector: str = ""
    ) -> list[Object]: ...
    @overload
    async def list(
        self,
        resource: Resource,
        namespace: str = "",
        *,
        label_selector: str = "",
        field_selector: str = "",
        decode: Decode[T],
    ) -> list[T]: ...
    async def list(
        self,
        resource: Resource,
        namespace: str = "",
        *,
        label_selector: str = "",
        field_selector: str = "",
        decode: Decode[Any] = _json,
    ) -> list[Any]:
        """All objects of a kind, page by page; every namespace without `namespace`."""
        params = selectors(label_selector, field_selector)
        items: list[Any] = []
        token = ""
        while True:
            page = await self.page(resource, namespace, params, token=token)
            items += [_decoded(decode, bytes(raw)) for raw in page.items or ()]
            token = page.metadata.token
            if not token:
                return items

    async def page(
        self, resource: Resource, namespace: str, params: Mapping[str, str], *, token: str = "", limit: int = PAGE
    ) -> Page:
        """One page of a list and the token of the next."""
        query = dict(params) | {"limit": str(limit)} | ({"continue": token} if token else {})
        return _decoded(_page, await self._call("list", "GET", resource, namespace, params=query))

    @contextlib.asynccontextmanager
    async def open(
        self, resource: Resource, namespace: str, params: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """A watch as a stream of bytes. The caller bounds its silence; raises the typed errors."""
        path = resource.path(namespace)
        async with self._answer("watch", "GET", resource, path, params, None, {}, None) as response:
            yield response.content

    async def raw(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Mapping[str, str], bytes]:
        """GET of a path that is no object (discovery, health): status 200 or 304, headers, body."""
        resource = Resource("", "", path, "", namespaced=False)
        async with self._answer("get", "GET", resource, path, {}, None, headers or {}, self.timeout_s) as response:
            return response.status, response.headers, await response.read()

    async def log(
        self, namespace: str, pod: str, container: str, *, lines: int, limit_bytes: int, timeout_s: float
    ) -> bytes:
        """The last lines that a pod's container wrote, as its node has them. Raises the typed errors."""
        params = {"container": container, "tailLines": str(lines), "limitBytes": str(limit_bytes)}
        counted = Resource(PODS.group, PODS.version, f"{PODS.plural}/log", PODS.kind)
        path = PODS.path(namespace, pod, "log")
        async with (
            self._in_flight,
            self._answer("get", "GET", counted, path, params, None, {"Accept": "*/*"}, timeout_s) as response,
        ):
            try:
                return await response.read()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise UnreachableError(f"GET {path}: answer broke off: {_told(error)}") from error

    # -- writing ------------------------------------------------------------------------------------------------------

    async def create(self, resource: Resource, body: Mapping[str, Any], namespace: str = "") -> Object:
        """Raises `AlreadyExistsError`."""
        where = namespace or _namespace(body)
        params = {"fieldManager": self.field_manager}
        return _decoded(_json, await self._call("create", "POST", resource, where, params=params, body=body))

    async def replace(self, resource: Resource, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Object:
        """PUT; the resourceVersion inside `body` must be the present one, else `ConflictError`."""
        meta, params = body["metadata"], {"fieldManager": self.field_manager}
        sent = self._call(
            "update", "PUT", resource, _namespace(body), meta["name"], params=params, body=body, timeout_s=timeout_s
        )
        return _decoded(_json, await sent)

    async def patch(
        self, resource: Resource, name: str, namespace: str, body: Any, *, subresource: str = "", kind: str = MERGE
    ) -> Object:
        """Merge patch (or JSON patch by `kind`); for finalizers and what cannot be applied."""
        params = {"fieldManager": self.field_manager}
        sent = self._call(
            "patch", "PATCH", resource, namespace, name, subresource, params=params, body=body, content_type=kind
        )
        return _decoded(_json, await sent)

    async def apply(
        self, resource: Resource, body: Mapping[str, Any], *, subresource: str = "", force: bool = True
    ) -> Object:
        """Server-side apply: what `body` names is ours, what it no longer names is removed, the rest is left alone.

        Applying the same again changes nothing and costs no write in etcd. A `resourceVersion` in the body makes it
        conditional (`ConflictError`). Raises `InvalidError` for a field that the schema lacks.
        """
        params = {"fieldManager": self.field_manager, "force": "true" if force else "false"}
        name = body["metadata"]["name"]
        full = {"apiVersion": resource.api_version, "kind": resource.kind} | dict(body)
        sent = self._call(
            "patch",
            "PATCH",
            resource,
            _namespace(body),
            name,
            subresource,
            params=params,
            body=full,
            content_type=APPLY,
        )
        return _decoded(_json, await sent)

    async def apply_status(
        self, resource: Resource, name: str, namespace: str, status: Mapping[str, Any], *, version: str = ""
    ) -> Object:
        """Server-side apply of the status alone; `NotFoundError` if the object is gone, it is never created."""
        meta = {"name": name} | ({"namespace": namespace} if namespace and resource.namespaced else {})
        if version:
            meta["resourceVersion"] = version
        return await self.apply(resource, {"metadata": meta, "status": status}, subresource="status")

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str = "",
        *,
        uid: str = "",
        propagation: str = "Background",
        grace_s: int | None = None,
    ) -> None:
        """`uid` guards against deleting a namesake (`ConflictError`); raises `NotFoundError`."""
        body: Object = {"propagationPolicy": propagation}
        if uid:
            body["preconditions"] = {"uid": uid}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        await self._call("delete", "DELETE", resource, namespace, name, body=body)

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _call(
        self,
        verb: str,
        method: str,
        resource: Resource,
        namespace: str = "",
        name: str = "",
        subresource: str = "",
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        timeout_s: float | None = None,
    ) -> bytes:
        path = resource.path(namespace, name, subresource)
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": content_type} if data is not None else {}
        counted = f"{resource.plural}/{subresource}" if subresource else resource.plural
        named = Resource(resource.group, resource.version, counted, resource.kind)
        async with self._in_flight:
            limit_s = timeout_s or self.timeout_s
            async with self._answer(verb, method, named, path, params or {}, data, headers, limit_s) as response:
                try:
                    return await response.read()
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    raise UnreachableError(f"{method} {path}: answer broke off: {_told(error)}") from error

    def _limit_s(self, verb: str, timeout_s: float | None) -> float | None:
        """How long the request may take; raises `NotLeaderError` for a write that must not be sent."""
        if timeout_s is not None and self._fence is not None and verb in WRITE_VERBS:
            try:
                return min(timeout_s, self._fence())
            except NotLeaderError:
                self.stats.writes_fenced += 1
                raise
        return timeout_s

    @contextlib.asynccontextmanager
    async def _answer(
        self,
        verb: str,
        method: str,
        resource: Resource,
        path: str,
        params: Mapping[str, str],
        data: bytes | None,
        headers: Mapping[str, str],
        timeout_s: float | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer once its status is good; a 401 is tried again with credentials read anew."""
        access = await self._credentials.access()
        for attempt in (0, 1):
            # Asked at the last moment: the lease may have ended while we stood in line or fetched credentials.
            limit_s = self._limit_s(verb, timeout_s)
            try:
                # Not aiohttp's own limit: where that runs out in the moment in which the task is cancelled, it takes
                # the cancellation for its own, and the task lives on. Writes end with the lease, as their tasks do.
                async with asyncio.timeout(limit_s):
                    body = data if data is None or self._fence is None else _FencedBody(data, self._fence)
                    try:
                        response = await self._request(access, method, path, params, body, headers, limit_s)
                    except (aiohttp.ClientError, OSError) as error:
                        if isinstance(error.__cause__, NotLeaderError):
                            self.stats.writes_fenced += 1
                            raise error.__cause__ from None
                        self._count(verb, resource, "Unreachable")
                        raise UnreachableError(f"{method} {path}: {_told(error)}") from error
                    async with response:
                        self._count(verb, resource, str(response.status))
                        if response.status < 300 or response.status == 304:
                            try:
                                yield response
                            finally:
                                _leave(response)
                            return
                        try:
                            said = await response.read()
                        except (aiohttp.ClientError, OSError):
                            said = b""
                        if response.status == 401 and not attempt:
                            renewed = await self._renewed(access)
                            if renewed is not None:
                                access = renewed
                                continue
                        raise api_error(response.status, said, response.headers)
            except TimeoutError as error:
                self._count(verb, resource, "Unreachable")
                raise UnreachableError(f"{method} {path}: timed out") from error

    async def _renewed(self, refused: Access) -> Access | None:
        try:
            access = await self._credentials.renew(refused)
        except KubeError:
            return None
        return None if access is refused else access

    async def _request(
        self,
        access: Access,
        method: str,
        path: str,
        params: Mapping[str, str],
        data: bytes | aiohttp.BytesPayload | None,
        headers: Mapping[str, str],
        limit_s: float | None,
    ) -> aiohttp.ClientResponse:
        assert self._pool.session is not None, "use `async with Client(...)`"
        return await self._pool.session.request(
            method,
            access.base_url + path,
            params=params,
            data=data,
            # Compressing 10 000 objects costs both sides more than the bytes do inside a cluster.
            headers={"Accept": "application/json", "Accept-Encoding": "identity", **access.headers, **headers},
            ssl=access.tls,
            proxy=access.proxy,
            server_hostname=access.server_name,
            timeout=aiohttp.ClientTimeout(sock_connect=min(limit_s or CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S)),
            allow_redirects=False,
        )

    def _count(self, verb: str, resource: Resource, outcome: str) -> None:
        self.stats.calls[verb, resource.group, resource.plural, outcome] += 1


def _leave(response: aiohttp.ClientResponse) -> None:
    """Break off what was not read to its end: TLS would wait half a minute for the good-bye of a peer that is dead."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()


class _FencedBody(aiohttp.BytesPayload):
    """A body that asks the fence as it is written, and with it the headers, which wait for it.

    Between the first asking and the socket lie a connection to be had and turns of the loop: a process that is paused
    there would wake and write, long after another one leads.
    """

    def __init__(self, value: bytes, fence: Fence) -> None:
        super().__init__(value)
        self._fence = fence

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        self._fence()
        await super().write_with_length(writer, content_length)


def selectors(label_selector: str, field_selector: str) -> dict[str, str]:
    """Query parameters of a selection."""
    both = {"labelSelector": label_selector, "fieldSelector": field_selector}
    return {name: value for name, value in both.items() if value}


def _decoded(decode: Decode[T], body: bytes) -> T:
    try:
        return decode(body)
    except Exception as error:
        raise MalformedError(f"the answer does not decode: {described(error)}") from None


def _namespace(body: Mapping[str, Any]) -> str:
    return str(body["metadata"].get("namespace", ""))


def _told(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    # aiohttp's own text prints objects; what the system said is inside.
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    return f"{type(error).__name__}: {inner}"
