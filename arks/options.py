"""Values of flags: each reader says what is wrong with a value and what a right one looks like.

Every flag has an environment variable, ARKS_ and the flag's name in capitals; the flag wins. `add_flag` shows default
and variable in --help, and names the variable in the error where the value came from it.
"""

import argparse
import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class HostPort(NamedTuple):
    host: str
    """IP address or name, IPv6 without brackets"""
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def url(self) -> str:
        """Where to reach it from this machine."""
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{HostPort(reachable, self.port)}"


class EngineUrl(NamedTuple):
    url: str
    """without a path"""
    host: str
    port: int


def variable(flag: str) -> str:
    """The environment variable of `--some-flag`."""
    return "ARKS_" + flag.removeprefix("--").replace("-", "_").upper()


def add_flag(
    parser: argparse.ArgumentParser,
    flag: str,
    read: Callable[[str], Any],
    default: str | None,
    meaning: str,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    shown: str | None = None,
) -> None:
    """A flag with one value, or with its environment variable's, or the default (`shown` in the help)."""
    name = variable(flag)
    default_text = shown or default
    told = f"{meaning} [{f'default: {default_text}; ' if default_text else ''}env {name}]"
    given = os.environ.get(name)
    if choices:  # not argparse's own: it does not check defaults against them
        read = _one_of(choices)
        metavar = "{" + ",".join(choices) + "}"
    parser.add_argument(
        flag,
        type=lambda text: (_named(read, name) if text == given else read)(text),
        default=given or default,
        help=told.replace("%", "%%"),
        metavar=metavar,
    )


def add_engines(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument(
        "--engine",
        action="append",
        type=engine_url,
        metavar="URL",
        help=f"{meaning} Repeat for more. [env ARKS_ENGINE, several with commas between]",
    )


def engines_of(given: list[EngineUrl] | None) -> tuple[EngineUrl, ...]:
    """--engine's values, or ARKS_ENGINE's. Raises ArgumentTypeError for a bad one of the latter."""
    if given:
        return tuple(given)
    from_env = os.environ.get("ARKS_ENGINE", "")
    return tuple(_named(engine_url, "ARKS_ENGINE")(part.strip()) for part in from_env.split(",") if part.strip())


def add_switch(parser: argparse.ArgumentParser, flag: str, meaning: str) -> None:
    """A flag without a value. `is_on` has its variable's word, too."""
    parser.add_argument(flag, action="store_true", help=f"{meaning} [env {variable(flag)}: true or false]")


def is_on(flag: str, given: bool) -> bool:
    """Whether the flag, or else its variable, says so. Raises ArgumentTypeError for any other word."""
    name = variable(flag)
    word = os.environ.get(name, "")
    if given or not word:
        return given
    return bool(_named(_one_of(("true", "false")), name)(word.lower()) == "true")


def unread_variables(parser: argparse.ArgumentParser, read: Iterable[str] = ()) -> list[str]:
    """ARKS_ variables that are set and that no flag of any command, nor `read`, is about: misspelt ones, mostly.

    Left out are those that Kubernetes makes of every Service whose name begins with arks.
    """
    known = {"ARKS_HELP", *read}
    pending = [parser]
    for each in pending:
        for action in each._actions:  # noqa: SLF001 - argparse has no other way to ask
            known.update(variable(flag) for flag in action.option_strings if flag.startswith("--"))
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - see above
                pending += action.choices.values()
    given = (name for name in os.environ if name.startswith("ARKS_"))
    return sorted(name for name in given if name not in known and not _SERVICE_LINK.search(name))


def _named(read: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    def reader(text: str) -> Any:
        try:
            return read(text)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from error

    return reader


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def reader(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return reader


def text(value: str) -> str:
    return value


def host_port(text: str) -> HostPort:
    """HOST:PORT, [IPv6]:PORT, or :PORT for all interfaces."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or (":" in host and not bracketed):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT; write for example 127.0.0.1:8080 or [::1]:8080")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: the port must be a number from 0 (any free one) to 65535")
    host = host[1:-1] if bracketed else host or "0.0.0.0"
    return HostPort("127.0.0.1" if host == "localhost" else host, int(port))


def listen_address(text: str) -> str:
    """HOST:PORT or unix:PATH, as extproc takes it."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path:
            raise argparse.ArgumentTypeError("unix: needs a path; write for example unix:/run/arks/extproc.sock")
        if len(os.fsencode(path)) > 107:  # sun_path of Linux
            raise argparse.ArgumentTypeError(
                f"the socket's path has {len(os.fsencode(path))} bytes, the system allows 107; choose a shorter one"
            )
        return text
    return str(host_port(text))


def engine_url(text: str) -> EngineUrl:
    """http://HOST:PORT of an OpenAI-compatible server; a trailing /v1 is understood."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
    except ValueError as error:  # brackets that hold no IPv6 address
        raise argparse.ArgumentTypeError(f"{text!r} is no address; write for example http://[::1]:8000") from error
    if parts.scheme == "https":
        raise argparse.ArgumentTypeError(
            f"{text}: TLS to engines is not supported yet; give its http:// address, or put a local TLS proxy before it"
        )
    if parts.scheme != "http":
        raise argparse.ArgumentTypeError(f"{text!r} is not an http:// address; write for example http://localhost:8000")
    try:
        port = 80 if parts.port is None else parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: the port must be a number from 1 to 65535")
    if not parts.hostname or not parts.hostname.isprintable() or " " in parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} names no host; write for example http://localhost:8000")
    if parts.username or parts.password:
        raise argparse.ArgumentTypeError("an engine's address cannot carry a user or password")
    if parts.path.rstrip("/") not in {"", "/v1"} or parts.query:
        raise argparse.ArgumentTypeError(f"{text!r}: give the server's root, without a path (a final /v1 is allowed)")
    return EngineUrl(f"http://{HostPort(parts.hostname, port)}", parts.hostname, port)


def resolve(engine: EngineUrl) -> tuple[str, ...]:
    """The engine's addresses as Envoy writes them. Raises OSError for a name that does not resolve."""
    host = "127.0.0.1" if engine.host == "localhost" else engine.host
    found = socket.getaddrinfo(host, engine.port, type=socket.SOCK_STREAM)
    v4 = [entry for entry in found if entry[0] == socket.AF_INET]
    return tuple(dict.fromkeys(str(HostPort(str(entry[4][0]), engine.port)) for entry in v4 or found))


def existing_folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return path.absolute()


def existing_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path.absolute()


def program(text: str) -> Path:
    path = existing_file(text)
    if not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} is not executable; run: chmod +x {text}")
    return path


def folder(text: str) -> Path:
    """A folder that may still have to be made."""
    path = Path(text).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path


def file_path(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: its folder does not exist")
    return path


def seconds(text: str) -> float:
    """A number of seconds, or with a unit: 500ms, 30s, 10m, 2h, 7d."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write for example 30s, 10m or 2h")
    return float(match[1]) * _UNIT_S[match[2] or "s"]


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def moment(text: str) -> float:
    """Unix seconds of an ISO date or time (UTC unless it says otherwise), or of a duration before now."""
    if _DURATION.fullmatch(text.strip()):
        return time.time() - seconds(text)
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time; write for example 2h (ago), 2026-01-31 or 2026-01-31T08:00:00Z"
        ) from error
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
