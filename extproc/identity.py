"""Who is asking: from a request's credentials to a principal. Secrets stay in here and are forgotten at once."""

import hashlib
import hmac
from typing import Final

from extproc.errors import Refused, refused
from extproc.snapshot.index import Ambiguous, Index, Principal

_SCHEME: Final = b"bearer "


def secret_of(authorization: bytes | None) -> bytes | None:
    """The secret in `Authorization: Bearer …` (scheme in any case)."""
    if authorization is not None and authorization[:7].lower() == _SCHEME:
        return authorization[7:].strip() or None
    return None


def identify(index: Index, secret: bytes | None, now_s: float) -> Principal | Refused:
    """The token behind a secret, if it may be used now."""
    if not secret:
        return refused("missing_token", "Send your token as 'Authorization: Bearer TOKEN' or 'x-api-key: TOKEN'.")
    digest = hashlib.sha256(secret).digest()
    found = index.principals.get(digest)
    if found is None:
        return refused("invalid_token", "This token is not known.")
    if isinstance(found, Ambiguous):
        return refused(
            "token_ambiguous",
            "Two tokens share this secret, so neither is accepted. Ask your administrator for a new one.",
        )
    token = found.token
    # The look-up above already compared a hash; this comparison keeps its time from telling how much of it matched.
    if not hmac.compare_digest(digest, token.digest):
        return refused("invalid_token", "This token is not known.")
    if token.disabled:
        return refused("token_disabled", "This token is disabled.")
    if token.expires_at_s is not None and now_s >= token.expires_at_s:
        return refused("token_expired", "This token has expired.")
    return found
