"""List and watch one kind into a `Store`, and keep it true through every failure we know.

Life cycle of `run()`: the initial objects come as a stream (WatchList) or, where the server cannot, in pages; then a
watch goes on from there, with bookmarks. What breaks is taken up again from the last resourceVersion. The rules:

- The server says something at least once a minute (bookmarks), so a stream that is silent for 75 s is dead.
- 410, also in the midst of a stream: list again; what vanished meanwhile is reported as deleted.
- Failures wait between 0.1 and 5 s, growing, with jitter; `Retry-After` is obeyed. Only `cancel` ends the reflector.
- Every object is decoded alone: a malformed one is counted, reported and skipped, and the others arrive.
- An unchanged resourceVersion is no change: a restart of the API server re-emits nothing.
- A kind that is not served (404) is an empty, synced store at the start; a filled store is emptied only when the kind
  stays away for `absent_after_s`.

The store lags behind the truth by a watch's delay, and during an outage by its length: `age_s` tells how long the
server has not been heard, `outage_s` how long it has not let us follow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import aiohttp
import msgspec
import structlog

from controller.kube.backoff import pause_s, spread_s
from controller.kube.client import PAGE, Client, Decode, selectors
from controller.kube.errors import (
    ApiError,
    GoneError,
    InvalidError,
    KubeError,
    NotFoundError,
    Status,
    UnreachableError,
    described,
    status_error,
)
from controller.kube.metrics import ReflectorStats
from controller.kube.resource import Key, Resource
from controller.kube.store import Entry, Store

T = TypeVar("T")
OnChange = Callable[[Key, T | None, T | None], None]  # key, new, old; either may be None
OnMalformed = Callable[[Key, str], None]  # key, what is wrong with it (no values of the object)

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 5.0
ABSENT_AFTER_S = 30.0
LINES_AT_ONCE = 200
HEALTHY_S = 5.0  # a stream that ends sooner, and said nothing, counts as a failure
INITIAL_EVENTS_END = "k8s.io/initial-events-end"

_log = structlog.get_logger(__name__)


class _Meta(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    version: str = msgspec.field(name="resourceVersion", default="")


class _Head(msgspec.Struct):
    metadata: _Meta


class _MarkMeta(msgspec.Struct):
    version: str = msgspec.field(name="resourceVersion", default="")
    annotations: dict[str, str] | None = None


class _Mark(msgspec.Struct):
    metadata: _MarkMeta


class _Frame(msgspec.Struct):
    type: str
    object: msgspec.Raw


_frame = msgspec.json.Decoder(_Frame).decode
_head = msgspec.json.Decoder(_Head).decode
_mark = msgspec.json.Decoder(_Mark).decode
_status = msgspec.json.Decoder(Status).decode


class _NoStreamingError(Exception):
    """The server cannot stream the initial objects."""


class Reflector(Generic[T]):
    """Keeps `store` equal to what the server has. `run()` is a task of the owner; cancel it to stop.

    `decode`: `decoder(type)` of the client module. `on_change` is called on the loop after the store has changed; an
    exception in it is counted and logged, never fatal. `keep_last_good`: whether an object that became malformed keeps
    its last good form (fail static) or leaves the store (fail closed).
    """

    def __init__(
        self,
        client: Client,
        resource: Resource,
        decode: Decode[T],
        *,
        store: Store[T] | None = None,
        namespace: str = "",
        label_selector: str = "",
        field_selector: str = "",
        on_change: OnChange[T] | None = None,
        on_malformed: OnMalformed | None = None,
        keep_last_good: bool = True,
        streaming: bool = True,
        page: int = PAGE,
        inactivity_s: float | None = None,
        backoff_max_s: float = BACKOFF_MAX_S,
        absent_after_s: float = ABSENT_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.resource = resource
        self.store: Store[T] = Store() if store is None else store
        self.synced = asyncio.Event()
        self.stats = ReflectorStats()
        self.malformed: dict[Key, str] = {}
        self.last_error: KubeError | None = None  # of the present outage; None while all is well
        self._client, self._decode, self._namespace = client, decode, namespace
        self._params = selectors(label_selector, field_selector)
        self._on_change, self._on_malformed, self._keep_last_good = on_change, on_malformed, keep_last_good
        self._streaming, self._page = streaming, page
        self._inactivity_s = client.silence_s if inactivity_s is None else inactivity_s
        self._backoff_max_s, self._absent_after_s = backoff_max_s, absent_after_s
        self._clock = clock
        self._heard_at = clock()
        self._failing_since: float | None = None
        self._version = ""  # empty: list first
        self._absent_since: float | None = None
        self._log = _log.bind(resource=str(resource))

    @property
    def age_s(self) -> float:
        """Seconds since the server was last heard: above 180 the program should count as dead."""
        return self._clock() - self._heard_at

    @property
    def outage_s(self) -> float:
        """Seconds for which the store has not been kept up to date, 0 while the watch is well (or not yet begun)."""
        return 0.0 if self._failing_since is None else self._clock() - self._failing_since

    @property
    def absent(self) -> bool:
        """The cluster does not know this kind."""
        return self._absent_since is not None

    async def run(self) -> None:
        """List and watch for ever."""
        failures = 0
        while True:
            began, heard = self._clock(), self.stats.events + self.stats.bookmarks
            wait_s = 0.0
            try:
                if self._version:
                    await self._watch(initial=False)
                elif self._streaming:
                    await self._watch(initial=True)
                else:
                    await self._list()
                    failures = 0
                    continue
                told = self.stats.events + self.stats.bookmarks > heard
                if told or self._clock() - began > HEALTHY_S:
                    failures = 0
                else:  # something in between ends every stream at once: do not spin
                    failures += 1
                    wait_s = self._pause(failures)
            except GoneError:
                self.stats.gone += 1
                self._version = ""
                # All replicas lose their place at the same moment: spread their lists.
                wait_s = spread_s(0.05, 0.3) if failures == 0 else self._pause(failures)
                failures += 1
            except _NoStreamingError as error:
                self._log.info("initial stream refused, listing in pages", why=str(error))
                self._streaming = False
            except KubeError as error:
                self.stats.errors += 1
                failures = 1 if self._clock() - began > HEALTHY_S and self.last_error is None else failures + 1
                self.last_error = error
                self._failing_since = self._failing_since or self._clock()
                if isinstance(error, ApiError):
                    self._heard()  # a refusal is a sign of life
                self._note_absence(error)
                wait_s = max(error.retry_after_s, self._pause(failures))
                if failures & (failures - 1) == 0:  # the 1st, 2nd, 4th, 8th …: an outage is no flood of lines
                    self._log.warning(
                        "watch broken", error=str(error), retry_in_s=round(wait_s, 2), age_s=round(self.age_s)
                    )
            except Exception as error:
                # A defect of ours or bytes that are no JSON; the next stream may be whole again.
                self.stats.errors += 1
                failures += 1
                self._version = ""
                wait_s = self._pause(failures)
                self._log.error("watch failed", error=described(error), retry_in_s=round(wait_s, 2))
            await asyncio.sleep(wait_s)

    def _pause(self, failures: int) -> float:
        return pause_s(failures, BACKOFF_FIRST_S, self._backoff_max_s)

    def _heard(self) -> None:
        self._heard_at = self._clock()

    def _well(self) -> None:
        if self.last_error is not None:
            self._log.info("watch healed", after=str(self.last_error))
            self.last_error = None
        self._absent_since = self._failing_since = None

    # -- getting everything -------------------------------------------------------------------------------------------

    async def _list(self) -> None:
        seen: set[Key] = set()
        token = ""
        while True:
            page = await self._client.page(self.resource, self._namespace, self._params, token=token, limit=self._page)
            self._heard()
            for raw in page.items or ():
                self._take(raw, seen)
            token = page.metadata.token
            if not token:
                self._listed(seen, page.metadata.resource_version)
                return

    def _listed(self, seen: set[Key], version: str) -> None:
        for key in [key for key in self.store if key not in seen]:
            self._drop(key)
        for key in [key for key in self.malformed if key not in seen]:
            del self.malformed[key]
        self._version = version
        self.stats.lists += 1
        self._well()
        self.synced.set()

    def _note_absence(self, error: KubeError) -> None:
        """The kind itself is not there: an empty store is right at once, a filled one only after a while."""
        if not isinstance(error, NotFoundError):
            self._absent_since = None
            return
        self._version = ""
        self._absent_since = self._absent_since or self._clock()
        if not self.store or self._clock() - self._absent_since >= self._absent_after_s:
            for key in list(self.store):
                self._drop(key)
            self.malformed.clear()
            self.synced.set()

    # -- following ----------------------------------------------------------------------------------------------------

    async def _watch(self, *, initial: bool) -> None:
        params = self._params | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            # All replicas started together must not come back together.
            "timeoutSeconds": str(int(spread_s(290.0, 580.0))),
        }
        if initial:
            params |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        else:
            params["resourceVersion"] = self._version
        self.stats.watches += 1
        loop = asyncio.get_running_loop()
        try:
            async with (
                asyncio.timeout(self._inactivity_s) as silence,
                self._client.open(self.resource, self._namespace, params) as stream,
            ):
                self._heard()  # it has answered; the first event may be a bookmark in a minute
                if not initial:
                    self._well()
                seen: set[Key] | None = set() if initial else None
                parts: list[bytes] = []
                async for chunk in stream.iter_any():
                    self._heard()
                    silence.reschedule(loop.time() + self._inactivity_s)
                    if b"\n" not in chunk:  # a big object: join it once, when it is whole
                        parts.append(chunk)
                        continue
                    first, *lines = chunk.split(b"\n")
                    seen = self._event(b"".join((*parts, first)), seen)
                    parts = [lines.pop()]
                    for count, line in enumerate(lines, 1):
                        seen = self._event(line, seen)
                        if count % LINES_AT_ONCE == 0:  # a burst must not hold up everyone else on the loop
                            await asyncio.sleep(0)
        except TimeoutError as error:
            self.stats.silences += 1
            raise UnreachableError(f"silent for {self._inactivity_s:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"stream broke: {type(error).__name__}") from error
        except InvalidError as error:
            if initial:
                raise _NoStreamingError(error.message) from error
            self._version = ""
            raise

    def _event(self, line: bytes, seen: set[Key] | None) -> set[Key] | None:
        """Take one line of the stream. `seen` collects the keys of the initial objects until they are complete."""
        if not line:
            return seen
        frame = _frame(line)
        match frame.type:
            case "ADDED" | "MODIFIED":
                self.stats.events += 1
                version = self._take(frame.object, seen)
                if seen is None and version:
                    self._version = version
            case "DELETED":
                self.stats.events += 1
                meta = _head(frame.object).metadata
                key = Key(meta.namespace, meta.name)
                if seen is not None:
                    seen.discard(key)
                else:
                    self._version = meta.version or self._version
                self.malformed.pop(key, None)
                self._drop(key)
            case "BOOKMARK":
                self.stats.bookmarks += 1
                mark = _mark(frame.object).metadata
                if seen is None:
                    self._version = mark.version
                elif (mark.annotations or {}).get(INITIAL_EVENTS_END) == "true":
                    self._listed(seen, mark.version)
                    return None
            case "ERROR":
                self._refused(frame.object, initial=seen is not None)
            case _:
                pass  # a type of a later API: nothing that we could know
        return seen

    def _refused(self, raw: msgspec.Raw, *, initial: bool) -> None:
        said = _status(raw)
        error: ApiError = status_error(said.code, said)
        if initial and ("RequestWatchProgress" in said.message or isinstance(error, InvalidError)):
            raise _NoStreamingError(error.message)
        raise error

    # -- one object ---------------------------------------------------------------------------------------------------

    def _take(self, raw: msgspec.Raw, seen: set[Key] | None) -> str:
        """Store one object; returns its resourceVersion (empty if even that cannot be read)."""
        try:
            meta = _head(raw).metadata
        except msgspec.DecodeError as error:
            self.stats.malformed += 1
            self._log.error("object without readable metadata", error=str(error))
            return ""
        key = Key(meta.namespace, meta.name)
        if seen is not None:
            seen.add(key)
        known = self.store.entry(key)
        if known is not None and known.version == meta.version and key not in self.malformed:
            return meta.version
        try:
            value = self._decode(bytes(raw))
            if known is not None and known.uid != meta.uid:
                self._drop(key)  # deleted and made anew while we did not look
            old = self.store.put(key, Entry(value, meta.uid, meta.version))
        except Exception as error:
            self._reject(key, described(error))
            return meta.version
        self.malformed.pop(key, None)
        self._tell(key, value, None if old is None else old.value)
        return meta.version

    def _reject(self, key: Key, what: str) -> None:
        self.stats.malformed += 1
        if self.malformed.get(key) != what:
            self._log.warning("malformed object skipped", key=str(key), error=what)
        self.malformed[key] = what
        if not self._keep_last_good:
            self._drop(key)
        if self._on_malformed is not None:
            try:
                self._on_malformed(key, what)
            except Exception:
                self.stats.handler_errors += 1
                self._log.exception("handler of malformed objects failed", key=str(key))

    def _drop(self, key: Key) -> None:
        old = self.store.pop(key)
        if old is not None:
            self._tell(key, None, old.value)

    def _tell(self, key: Key, new: T | None, old: T | None) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(key, new, old)
        except Exception:
            self.stats.handler_errors += 1
            self._log.exception("handler of changes failed", key=str(key))
