"""A real S3 server (Versity's gateway, over a folder), and a small client that fills it.

with S3Server(folder) as server:
    server.url, server.port
    server.make_bucket("weights")
    server.put("weights", "a/key", content, sha256=True)     stored with a checksum
    server.put_in_parts("weights", "a/key", content, 5 << 20)

The client signs on its own (Signature Version 4), so that the loader's signatures meet a stranger's check.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import hashlib
import hmac
import http.client
import os
import re
import signal
import socket
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Self
from urllib.parse import quote

from tests.harness.go_build import go_binary

VERSION = "1.8.0"
KEY_ID, SECRET, REGION = "AKIAREALSERVER", "secret/of+the-real-server", "eu-central-1"
READY_TIMEOUT_S = 90.0


_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def _end_with_the_tests() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def program() -> Path:
    """Built on its first use (minutes); `NoGoError` without a toolchain."""
    return go_binary("versitygw", VERSION, "github.com/versity/versitygw/cmd/versitygw", module="store")


class S3Server:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        for name in ("accounts", "objects", "metadata"):
            (self._folder / name).mkdir()
        for _ in range(3):
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
            # Metadata in files: not every file system that a temporary folder may be on has extended attributes.
            command = [program(), "--port", f"127.0.0.1:{self.port}", "--region", REGION, "--quiet"]
            command += ["--iam-dir", self._folder / "accounts"]  # else an unknown key is no S3 error
            command += ["posix", "--sidecar", self._folder / "metadata", self._folder / "objects"]
            environment = {**os.environ, "ROOT_ACCESS_KEY": KEY_ID, "ROOT_SECRET_KEY": SECRET}
            with (self._folder / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    preexec_fn=_end_with_the_tests,  # noqa: PLW1509 - one system call, through a library loaded before
                )
            if self._ready():
                return self
            self.__exit__()
        raise RuntimeError((self._folder / "log").read_text()[-2000:])

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _ready(self) -> bool:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                return False
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
            time.sleep(0.05)
        return False

    # -- what fills it ------------------------------------------------------------------------------------------------

    def make_bucket(self, bucket: str) -> None:
        self._send("PUT", f"/{bucket}")

    def put(self, bucket: str, key: str, content: bytes, *, sha256: bool = False) -> None:
        headers = {}
        if sha256:
            headers["x-amz-checksum-sha256"] = base64.b64encode(hashlib.sha256(content).digest()).decode()
        self._send("PUT", f"/{bucket}/{key}", content, headers=headers)

    def put_in_parts(self, bucket: str, key: str, content: bytes, part_bytes: int) -> None:
        path = f"/{bucket}/{key}"
        _, begun = self._send("POST", path, query={"uploads": ""})
        upload = re.search(r"<UploadId>(.+?)</UploadId>", begun)
        assert upload is not None, begun
        rows = ""
        for number, start in enumerate(range(0, len(content), part_bytes), 1):
            query = {"partNumber": str(number), "uploadId": upload[1]}
            headers, _ = self._send("PUT", path, content[start : start + part_bytes], query=query)
            rows += f"<Part><PartNumber>{number}</PartNumber><ETag>{headers['ETag']}</ETag></Part>"
        whole = f"<CompleteMultipartUpload>{rows}</CompleteMultipartUpload>".encode()
        self._send("POST", path, whole, query={"uploadId": upload[1]})

    def _send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        query: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[dict[str, str], str]:
        at = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        hashed = hashlib.sha256(body).hexdigest()
        told = {
            "host": f"127.0.0.1:{self.port}",
            "x-amz-date": at,
            "x-amz-content-sha256": hashed,
            **(headers or {}),
        }
        names = sorted(told)
        encoded = quote(path, safe="/-_.~")
        asked = "&".join(sorted(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in (query or {}).items()))
        lines = [method, encoded, asked, *(f"{name}:{told[name]}" for name in names), "", ";".join(names), hashed]
        scope = f"{at[:8]}/{REGION}/s3/aws4_request"
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        key = f"AWS4{SECRET}".encode()
        for step in (at[:8], REGION, "s3", "aws4_request"):
            key = hmac.digest(key, step.encode(), "sha256")
        signature = hmac.digest(key, f"AWS4-HMAC-SHA256\n{at}\n{scope}\n{digest}".encode(), "sha256").hex()
        told["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={KEY_ID}/{scope}, SignedHeaders={';'.join(names)}, Signature={signature}"
        )
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, f"{encoded}?{asked}" if asked else encoded, body, told)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        assert response.status < 300, f"{method} {path}: {response.status} {text}"
        return dict(response.getheaders()), text
