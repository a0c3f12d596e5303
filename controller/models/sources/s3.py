"""Objects under a prefix of an S3-compatible store.

The list (ListObjectsV2) gives names, sizes and ETags; one HEAD for each wanted object gives what can be verified: a
SHA-256 checksum if the object was stored with one, else the MD5 that the ETag is for objects written in one part, else
the MD5 of the parts' MD5s, for which the size of the first part is asked. Objects encrypted with a key of their own
have ETags that are no MD5: those keep their size and ETag. Bytes are asked for with If-Match, so an object that is
replaced meanwhile is noticed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit

from controller.models.digest import Digest
from controller.models.errors import ChangedError, LastingError, TransientError
from controller.models.http import Answer, Http, HttpRequest
from controller.models.request import S3
from controller.models.sources.aws_identity import AwsIdentity
from controller.models.sources.sigv4 import encoded_path, encoded_query, signed_headers
from controller.models.sources.source import Listing, RemoteFile, Source, listing_revision
from controller.models.sources.xml import elements

_MD5 = re.compile(r"[0-9a-f]{32}")
_PARTS = re.compile(r"[0-9a-f]{32}-([1-9]\d{0,4})")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_HEADS_AT_ONCE = 8
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
_REGION = re.compile(r"<Region>([a-z0-9-]{1,40})</Region>")
# Amazon S3 API Reference, "List of error codes"; stores of others use the same, some with another status.
_KEYS_AT_FAULT = {
    "InvalidAccessKeyId": "does not know the access key id",
    "SignatureDoesNotMatch": "finds that the secret access key is not the one of this access key id",
    "InvalidToken": "does not take the session token; the three values belong together",
    "ExpiredToken": "finds the session token expired; renew all three values",
}
_NOT_THERE = ("", "NoSuchBucket", "NoSuchKey")  # nothing: a HEAD has no body
_REGION_AT_FAULT = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException")


class S3Store(Source):
    spec = "spec.source.s3"

    def __init__(self, http: Http, source: S3, environment: Mapping[str, str]) -> None:
        super().__init__(http)
        region = source.region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
        self._region = region or "us-east-1"
        endpoint = source.endpoint or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        parts = urlsplit(endpoint or f"https://s3.{self._region}.amazonaws.com")
        if not _BUCKET.fullmatch(source.bucket):
            raise LastingError("InvalidRequest", "this is not the name of a bucket", field=f"{self.spec}.bucket")
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
            raise LastingError("InvalidRequest", "this is not an address", field=f"{self.spec}.endpoint")
        self._bucket = source.bucket
        host = parts.netloc.removesuffix({"http": ":80", "https": ":443"}[parts.scheme])
        if source.path_style or _no_subdomains(parts.hostname):
            self._host, self._base = host, f"{parts.path.rstrip('/')}/{source.bucket}"
        else:
            self._host, self._base = f"{source.bucket}.{host}", parts.path.rstrip("/")
        self._scheme = parts.scheme
        self._prefix = source.prefix.strip("/") + "/" if source.prefix.strip("/") else ""
        self._identity = AwsIdentity(http, environment, self._region)

    async def listing(self, wanted: Callable[[str], bool]) -> Listing:
        found: list[tuple[str, int, str]] = []
        token = ""
        while True:
            query = [("list-type", "2"), ("prefix", self._prefix)]
            if token:
                query.append(("continuation-token", token))
            body, _ = await self.document(lambda query=query: self._make("GET", "/", query))  # type: ignore[misc]
            page, following = _page(body)
            found.extend(one for one in page if not one[0].endswith("/") and wanted(one[0].removeprefix(self._prefix)))
            if not following or following == token:
                break
            token = following
        gate = asyncio.Semaphore(_HEADS_AT_ONCE)

        async def head(key: str, size: int, etag: str) -> RemoteFile:
            async with gate:
                return await self._file(key, size, etag)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(head(*one)) for one in found]
        files = tuple(task.result() for task in tasks)
        return Listing(listing_revision(files), files)

    async def _file(self, key: str, size: int, etag: str) -> RemoteFile:
        headers = await self._head(key, [], {"x-amz-checksum-mode": "ENABLED"})
        if headers.get("Content-Length") != str(size) or headers.get("ETag", "").strip('"') != etag:
            raise ChangedError("an object changed while the bucket was listed")
        identity = f"{self._scheme}://{self._host}{self._base}/{key}\0{etag}"
        return RemoteFile(
            key.removeprefix(self._prefix), size, await self._digest(key, size, etag, headers), identity, etag
        )

    async def _digest(self, key: str, size: int, etag: str, headers: Mapping[str, str]) -> Digest:
        if headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
            try:
                checksum = base64.b64decode(headers.get("x-amz-checksum-sha256", ""), validate=True)
            except binascii.Error:
                checksum = b""
            if len(checksum) == 32:
                return Digest("sha256", checksum.hex())
        own_key = headers.get("x-amz-server-side-encryption", "") not in {"", "AES256"}
        if own_key or "x-amz-server-side-encryption-customer-algorithm" in headers:
            return Digest()
        if _MD5.fullmatch(etag):
            return Digest("md5", etag)
        if match := _PARTS.fullmatch(etag):
            part = await self._head(key, [("partNumber", "1")], {})
            try:
                part_bytes = int(part.get("Content-Length", "0"))
            except ValueError:
                return Digest()
            if part_bytes > 0 and -(-size // part_bytes) == int(match[1]):
                return Digest("md5-parts", etag, part_bytes)
        return Digest()

    async def _head(self, key: str, query: Sequence[tuple[str, str]], headers: Mapping[str, str]) -> Mapping[str, str]:
        _, answered = await self.document(lambda: self._make("HEAD", f"/{key}", query, headers))
        return answered

    async def request(self, file: RemoteFile, span: str) -> HttpRequest:
        headers = {"If-Match": f'"{file.address}"'} if file.address else {}
        if span:
            headers["Range"] = span
        return await self._make("GET", f"/{self._prefix}{file.path}", (), headers)

    async def _make(
        self, method: str, path: str, query: Sequence[tuple[str, str]], headers: Mapping[str, str] | None = None
    ) -> HttpRequest:
        credentials = await self._identity.credentials()
        path, told = self._base + path, dict(headers or {})
        if credentials is not None:
            now = datetime.now(UTC)
            told = signed_headers(method, self._host, path, query, told, credentials, self._region, now)
        url = f"{self._scheme}://{self._host}{encoded_path(path)}"
        if query:
            url += f"?{encoded_query(query)}"
        # A redirect would need another signature; it says that the region is another one.
        return HttpRequest(url, told, method, follow=False)

    def refusal(self, answer: Answer) -> LastingError:
        code = match[1] if (match := _CODE.search(answer.text)) else ""
        region = answer.headers.get("x-amz-bucket-region", "") or (m[1] if (m := _REGION.search(answer.text)) else "")
        if (region and region != self._region) or code in _REGION_AT_FAULT:
            where = f"in the region {region[:40]}" if region else "in another region"
            return LastingError(
                "WrongRegion", f"the bucket is {where}, not {self._region}", field=f"{self.spec}.region"
            )
        field = f"{self.spec}.credentialsSecretRef"
        if code in _KEYS_AT_FAULT:
            return LastingError("AccessDenied", f"{answer.host} {_KEYS_AT_FAULT[code]}", field=field)
        if code == "RequestTimeTooSkewed":
            told = f"{answer.host} finds that this node's clock is wrong: requests are signed with the time"
            return LastingError("ClockSkewed", told, field=self.spec)
        if answer.status == 404 and code in _NOT_THERE:
            told = f"{answer.host} has no bucket {self._bucket}, or not this object"
            return LastingError("NotFound", told, field=f"{self.spec}.bucket")
        if answer.status in (401, 403):
            if not self._identity.named:
                told = f"{answer.host} asks for credentials: none are given and the pod has no identity of its own"
                return LastingError("Unauthorized", told, field=field)
            check = "check the keys, their rights to list and read, and the region"
            told = f"{answer.host} denies access to the bucket {self._bucket}: {check}"
            return LastingError("AccessDenied", told, field=field)
        named = f" ({code})" if code else ""
        return LastingError("SourceRefused", f"{answer.host} answers {answer.status}{named}", field=self.spec)


def _no_subdomains(host: str) -> bool:
    """An address without names cannot have the bucket's name before it."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." not in host
    return True


def _page(body: bytes) -> tuple[list[tuple[str, int, str]], str]:
    """((key, size, ETag), …), and the token of the next page."""
    found: list[tuple[str, int, str]] = []
    one: dict[str, str] = {}
    whole: dict[str, str] = {}

    def ended(path: Sequence[str], text: str) -> None:
        if len(path) == 3 and path[1] == "Contents":
            one[path[2]] = text
        elif len(path) == 2 and path[1] == "Contents":
            found.append((one["Key"], int(one["Size"]), one.get("ETag", "").strip('"')))
            one.clear()
        elif len(path) == 2:
            whole[path[1]] = text
        elif len(path) == 1 and path[0] != "ListBucketResult":
            raise KeyError(path[0])

    try:
        elements(body, ended)
    except (KeyError, ValueError):
        raise TransientError("UnusableAnswer", "the store's list of objects is not what it should be") from None
    return found, whole.get("NextContinuationToken", "") if whole.get("IsTruncated") == "true" else ""
