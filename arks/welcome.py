"""What `arks up` tells a human once it serves: lines that can be pasted."""

import json
import shlex
from pathlib import Path

from arks.policyfiles import example


def welcome(gateway: str, admin: str, policy: Path, engines: str, *, show_secret: bool) -> str:
    """`show_secret`: the policy's token is the quickstart's, which everybody knows. A user's own stays out of logs."""
    lines = ["", f"Arks serves at {gateway}", f"  engines   {engines}", f"  policy    {policy} (changes apply at once)"]
    lines += [f"  admin     {admin}/readyz  {admin}/metrics", ""]
    shown = example(policy)
    if shown is None or not show_secret:
        lines += ["With the secret of one of your ArksTokens in $TOKEN:", ""]
    secret = shown.secret if shown and show_secret else "$TOKEN"
    model = shown.model if shown else "MODEL"
    lines += [_curl(gateway, secret, model, stream=False), "", _curl(gateway, secret, model, stream=True), ""]
    return "\n".join([*lines, "Ctrl-C stops everything.", ""])


def _curl(gateway: str, secret: str, model: str, *, stream: bool) -> str:
    body: dict[str, object] = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    body["max_tokens"] = 64  # some engines otherwise go on to the end of their context
    if stream:
        body["stream"] = True
    header = f"Authorization: Bearer {secret}"
    # In double quotes, so that a shell fills it in.
    bearer = f'"{header}"' if secret.startswith("$") else shlex.quote(header)
    flag = "-sN" if stream else "-s"
    return (
        f"curl {flag} {gateway}/v1/chat/completions -H {bearer} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )
