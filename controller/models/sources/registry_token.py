"""How a registry is convinced: the challenge of a 401 answered with what the pull secret holds.

Protocol: distribution's token authentication (``WWW-Authenticate: Bearer realm=…,service=…,scope=…``, then a GET of
the realm, or a POST with a refresh token) and basic authentication. Credentials are read from ``config.json`` in the
folder DOCKER_CONFIG, as docker writes it; credential helpers are programs that are not here.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from controller.models.errors import LastingError, TransientError
from controller.models.http import Http, HttpRequest, RefusedError, persistently

_FIELD = "spec.source.oci.pullSecretRef"
_PARAMETER = re.compile(r'([A-Za-z]+)="((?:[^"\\]|\\.)*)"')
_DOCKER_NAMES = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")


class _Auth(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


class _Config(msgspec.Struct, frozen=True):
    auths: dict[str, _Auth] = {}


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""


class RegistryToken:
    """``headers`` are empty until the registry challenged once."""

    def __init__(
        self, http: Http, registry: str, repository: str, environment: Mapping[str, str], *, secure: bool
    ) -> None:
        self._http = http
        self._repository = repository
        self._secure = secure
        self._auth = _stored(environment, registry)
        self._authorization = ""

    @property
    def has_credentials(self) -> bool:
        return self._auth != _Auth()

    def headers(self) -> dict[str, str]:
        return {"Authorization": self._authorization} if self._authorization else {}

    async def renew(self, challenge: str) -> bool:
        """Whether there is a new answer to the challenge. Raises LoadError."""
        scheme, _, rest = challenge.partition(" ")
        said = {name.lower(): value for name, value in _PARAMETER.findall(rest)}
        if scheme.lower() == "basic" and self._basic():
            fresh = f"Basic {self._basic()}"
        elif scheme.lower() == "bearer" and self._auth.registrytoken:
            fresh = f"Bearer {self._auth.registrytoken}"
        elif scheme.lower() == "bearer" and said.get("realm"):
            fresh = f"Bearer {await self._exchange(said)}"
        else:
            return False
        self._authorization = fresh
        return True

    async def _exchange(self, said: Mapping[str, str]) -> str:
        realm = said["realm"]
        host = urlsplit(realm).hostname or "the token service"
        if self._secure and self.has_credentials and urlsplit(realm).scheme != "https":
            raise LastingError(
                "UnsafeRedirect", f"the registry wants its password sent to {host} in the clear", field=_FIELD
            )
        scope = said.get("scope") or f"repository:{self._repository}:pull"
        service = said.get("service", "")
        if self._auth.identitytoken:
            form = {
                "grant_type": "refresh_token",
                "service": service,
                "scope": scope,
                "client_id": "arks-models",
                "refresh_token": self._auth.identitytoken,
            }
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            request = HttpRequest(realm, headers, "POST", urlencode(form).encode(), follow=False)
        else:
            query = urlencode({"service": service, "scope": scope}, quote_via=quote)
            url = f"{realm}{'&' if '?' in realm else '?'}{query}"
            request = HttpRequest(
                url, {"Authorization": f"Basic {self._basic()}"} if self._basic() else {}, follow=False
            )
        try:
            body, _ = await persistently(self._http.settings, lambda: self._http.document(request))
        except RefusedError as refused:
            said_no = "refuses the pull secret" if self.has_credentials else "gives no anonymous access"
            told = f"{refused.answer.host} {said_no} for {self._repository} ({refused.answer.status})"
            raise LastingError("Unauthorized", told, field=_FIELD) from None
        try:
            token = msgspec.json.decode(body, type=_Token)
        except msgspec.DecodeError:
            token = _Token()
        if not (token.token or token.access_token):
            raise TransientError("UnusableAnswer", f"{host} gives no token")
        return token.token or token.access_token

    def _basic(self) -> str:
        return self._auth.auth


def _stored(environment: Mapping[str, str], registry: str) -> _Auth:
    folder = environment.get("DOCKER_CONFIG", "")
    if not folder:
        return _Auth()
    try:
        config = msgspec.json.decode((Path(folder) / "config.json").read_bytes(), type=_Config)
    except (OSError, msgspec.DecodeError):
        raise LastingError(
            "InvalidPullSecret", "the pull secret's .dockerconfigjson cannot be read", field=_FIELD
        ) from None
    names = _DOCKER_NAMES if registry == "docker.io" else (registry, f"https://{registry}", f"http://{registry}")
    for name, auth in config.auths.items():
        # Tools write a registry with or without scheme and path.
        if name in names or (registry != "docker.io" and name.partition("://")[2].partition("/")[0] == registry):
            return _usable(auth)
    return _Auth()


def _usable(auth: _Auth) -> _Auth:
    given = auth.auth
    if not given and auth.username:
        given = base64.b64encode(f"{auth.username}:{auth.password}".encode()).decode()
    try:
        # An identity token stands beside a user name with an empty password.
        base64.b64decode(given, validate=True)
    except binascii.Error:
        raise LastingError("InvalidPullSecret", "the pull secret's auth is not base64", field=_FIELD) from None
    return msgspec.structs.replace(auth, auth=given)
