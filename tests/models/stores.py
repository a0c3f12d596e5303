"""An S3 store that checks every signature, and an OCI registry that hands out bearer tokens."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs, parse_qsl, unquote, unquote_to_bytes, urlsplit
from xml.sax.saxutils import escape

from aiohttp import web

from tests.models.origin import Origin

KEY_ID, SECRET = "AKIDTEST", "secret/key+of-the-test"


@dataclass
class Stored:
    content: bytes
    part_bytes: int = 0
    sha256: bool = False
    kms: bool = False
    etag: str = ""

    def __post_init__(self):
        if self.etag:
            return
        if self.part_bytes:
            parts = [
                hashlib.md5(self.content[n : n + self.part_bytes]).digest()
                for n in range(0, len(self.content), self.part_bytes)
            ]
            self.etag = f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"
        else:
            self.etag = hashlib.md5(self.content).hexdigest()


@dataclass
class Store:
    """``keys`` maps a key id to its secret (and session token); none: public."""

    bucket: str = "weights"
    objects: dict[str, Stored] = field(default_factory=dict)
    keys: dict[str, tuple[str, str]] = field(default_factory=lambda: {KEY_ID: (SECRET, "")})
    region: str = "us-east-1"
    page: int = 1000
    web_identity: str = ""
    on_listed: object = None
    origin: Origin = field(default_factory=Origin)

    async def start(self):
        await self.origin.start(self._handle)
        return self

    async def stop(self):
        await self.origin.stop()

    async def _handle(self, request):
        parts = urlsplit(request.raw_path)
        if request.method == "POST":
            return await self._sts(request)
        if self.keys and (refusal := self._unsigned(request, parts)):
            status, code = refusal
            headers = {"x-amz-bucket-region": self.region} if code == "AuthorizationHeaderMalformed" else {}
            return web.Response(status=status, headers=headers, text=f"<Error><Code>{code}</Code></Error>")
        path = unquote(parts.path)
        if path == f"/{self.bucket}/" and request.method == "GET":
            return self._list(dict(parse_qsl(parts.query, keep_blank_values=True)))
        key = path.removeprefix(f"/{self.bucket}/")
        found = self.objects.get(key)
        if found is None or not path.startswith(f"/{self.bucket}/"):
            return web.Response(status=404)
        if request.headers.get("If-Match", f'"{found.etag}"') != f'"{found.etag}"':
            return web.Response(status=412)
        headers = {"ETag": f'"{found.etag}"'}
        if found.kms:
            headers["x-amz-server-side-encryption"] = "aws:kms"
        if found.sha256 and request.headers.get("x-amz-checksum-mode") == "ENABLED":
            headers["x-amz-checksum-sha256"] = base64.b64encode(hashlib.sha256(found.content).digest()).decode()
            headers["x-amz-checksum-type"] = "FULL_OBJECT"
        content = found.content
        if "partNumber=1" in parts.query and found.part_bytes:
            content = content[: found.part_bytes]
        return await self.origin.send(request, key, content, headers)

    def _list(self, query):
        assert query["list-type"] == "2"
        keys = sorted(key for key in self.objects if key.startswith(query.get("prefix", "")))
        start = int(query.get("continuation-token", "0 +/=").split()[0])
        shown, more = keys[start : start + self.page], start + self.page < len(keys)
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><ETag>&quot;{self.objects[key].etag}&quot;</ETag>"
            f"<Size>{len(self.objects[key].content)}</Size><Owner><ID>x</ID></Owner></Contents>"
            for key in shown
        )
        token = f"<NextContinuationToken>{start + self.page} +/=</NextContinuationToken>" if more else ""
        if self.on_listed:
            self.on_listed()
        return web.Response(
            content_type="application/xml",
            text='<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{self.bucket}</Name><IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}</ListBucketResult>",
        )

    async def _sts(self, request):
        form = {name: values[0] for name, values in parse_qs((await request.read()).decode()).items()}
        if form.get("WebIdentityToken") != self.web_identity or form.get("Action") != "AssumeRoleWithWebIdentity":
            return web.Response(status=403)
        self.keys = {"ASIATEMP": ("temp-secret", "temp-token")}
        return web.Response(
            text="<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            "<AccessKeyId>ASIATEMP</AccessKeyId><SecretAccessKey>temp-secret</SecretAccessKey>"
            "<SessionToken>temp-token</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration>"
            "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )

    def _unsigned(self, request, parts):
        """The server's side of the signature: from the bytes on the wire, by the scope that the header names."""
        match = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, "
            r"SignedHeaders=([^,]+), Signature=(\w{64})",
            request.headers.get("Authorization", ""),
        )
        if match is None or match[1] not in self.keys:
            return 403, "AccessDenied"
        _, day, region, names, signature = match.groups()
        if region != self.region:
            return 400, "AuthorizationHeaderMalformed"
        secret, session = self.keys[match[1]]
        if request.headers.get("x-amz-security-token", "") != session:
            return 403, "InvalidToken"
        names = names.split(";")
        assert {"host", "x-amz-date", "x-amz-content-sha256"} <= set(names)
        assert all(name in names for name in map(str.lower, request.headers) if name.startswith("x-amz-"))

        def reencoded(text):
            return "".join(
                chr(byte) if re.match(rb"[A-Za-z0-9._~-]", bytes([byte])) else f"%{byte:02X}"
                for byte in unquote_to_bytes(text)
            )

        query = sorted(
            (reencoded(name), reencoded(value))
            for name, _, value in (pair.partition("=") for pair in parts.query.split("&") if pair)
        )
        canonical = [
            request.method,
            "/".join(reencoded(part) for part in parts.path.split("/")),
            "&".join(f"{name}={value}" for name, value in query),
            *(f"{name}:{request.headers[name].strip()}" for name in names),
            "",
            ";".join(names),
            request.headers["x-amz-content-sha256"],
        ]
        scope = f"{day}/{region}/s3/aws4_request"
        hashed = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
        told = f"AWS4-HMAC-SHA256\n{request.headers['x-amz-date']}\n{scope}\n{hashed}"
        key = ("AWS4" + secret).encode()
        for step in [day, region, "s3", "aws4_request"]:
            key = hmac.new(key, step.encode(), hashlib.sha256).digest()
        if hmac.new(key, told.encode(), hashlib.sha256).hexdigest() != signature:
            return 403, "SignatureDoesNotMatch"
        return None


@dataclass
class Registry:
    """``user`` (name, password): anonymous pulls are refused. Tokens are good for ``uses`` requests."""

    user: tuple[str, str] | None = ("robot", "registry-password")
    repository: str = "models/qwen"
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    basic: bool = False
    uses: int = 10_000
    tokens: dict[str, int] = field(default_factory=dict)
    given: int = 0
    realm: str = ""
    origin: Origin = field(default_factory=Origin)
    tokens_origin: Origin = field(default_factory=Origin)
    storage: Origin = field(default_factory=Origin)

    async def start(self):
        await self.origin.start(self._handle)
        await self.tokens_origin.start(self._token)
        await self.storage.start(self._storage)
        self.realm = f"{self.tokens_origin.url}/token"
        return self

    async def stop(self):
        for one in (self.origin, self.tokens_origin, self.storage):
            await one.stop()

    @property
    def name(self):
        return self.origin.url.removeprefix("http://")

    @property
    def authorization(self):
        return "Basic " + base64.b64encode(":".join(self.user).encode()).decode()

    def blob(self, content):
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.blobs[digest] = content
        return digest

    def layer(self, content, title="", media="application/octet-stream", **notes):
        annotations = {**({"org.opencontainers.image.title": title} if title else {}), **notes}
        return {"mediaType": media, "digest": self.blob(content), "size": len(content), "annotations": annotations}

    def push(self, layers, tag="v1"):
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": self.blob(b"{}"), "size": 2},
            "layers": layers,
        }
        return self.put(json.dumps(manifest).encode(), tag)

    def put(self, body, tag):
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        self.manifests[digest] = self.manifests[tag] = body
        return digest

    async def _handle(self, request):
        if not self._authorised(request.headers.get("Authorization", "")):
            challenge = (
                'Basic realm="registry"'
                if self.basic
                else f'Bearer realm="{self.realm}",service="the registry",scope="repository:{self.repository}:pull"'
            )
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        base = f"/v2/{self.repository}/"
        what, _, reference = request.raw_path.removeprefix(base).partition("/")
        if what == "manifests" and reference in self.manifests:
            assert "application/vnd.oci.image.manifest.v1+json" in request.headers["Accept"]
            return await self.origin.send(request, reference, self.manifests[reference])
        if what == "blobs" and reference in self.blobs:
            return web.Response(status=307, headers={"Location": f"{self.storage.url}/{reference}?sig=very-secret"})
        return web.Response(status=404)

    def _authorised(self, authorization):
        if self.basic:
            return authorization == self.authorization
        token = authorization.removeprefix("Bearer ")
        if self.tokens.get(token, 0) <= 0:
            return False
        self.tokens[token] -= 1
        return True

    async def _token(self, request):
        query = dict(parse_qsl(urlsplit(request.raw_path).query))
        assert query == {"service": "the registry", "scope": f"repository:{self.repository}:pull"}
        if self.user and request.headers.get("Authorization") != self.authorization:
            return web.Response(status=401)
        self.given += 1
        token = f"registry-token-{self.given}"
        self.tokens[token] = self.uses
        return web.json_response({"token": token})

    async def _storage(self, request):
        if "Authorization" in request.headers:
            return web.Response(status=400)
        digest = urlsplit(request.raw_path).path.strip("/")
        return await self.storage.send(request, digest, self.blobs[digest])
