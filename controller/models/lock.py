"""One loader at a time in a target folder, also where two nodes mount the same volume.

flock decides on one node, and on network file systems that pass it on (NFS 4, CephFS). Some do not pass it on, or
know no locks at all, so the holder also counts up in the lock file. Who gets the flock but sees the mark of another
machine watches the count; when it stands still for long enough the other is dead and its lock stale. Only changes are
watched, never two machines' clocks compared. An end in good order empties the file, so the next one need not watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from controller.models.tree import Tree

LOCK_FILE = ".arks-lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_BEATS_PER_SILENCE = 6


def this_machine() -> str:
    """The same for all pods of a node, until it boots again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.uname().nodename


@contextlib.asynccontextmanager
async def held(
    folder: Tree, *, poll_s: float, silence_s: float, waiting: Callable[[], None], machine: str = ""
) -> AsyncIterator[None]:
    """Waits as long as another one lives; ``waiting`` is called once when it has to. OSError as of `Tree`."""
    machine = machine or this_machine()
    mark = f"{machine} {os.getpid()}-{secrets.token_hex(4)}"
    told = False
    while True:
        fd = folder.descriptor(LOCK_FILE, os.O_RDWR | os.O_CREAT)
        try:
            locks = _flock(fd)
            if locks is not False and await _dead(folder, machine, poll_s, silence_s, trusted=locks is True):
                _write(fd, f"{mark} 0\n")
                if locks is True:
                    break
                # Without locks two may have come at once: the later mark stays, and each looks again.
                await asyncio.sleep(poll_s)
                if _read(folder).startswith(mark):
                    break
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if not told:
            told = True
            waiting()
        await asyncio.sleep(poll_s)
    beating = asyncio.create_task(_beat(fd, mark, silence_s / _BEATS_PER_SILENCE))
    try:
        yield
    finally:
        beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beating
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
        os.close(fd)


def _flock(fd: int) -> bool | None:
    """True: ours; False: another's; None: this file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


async def _dead(folder: Tree, machine: str, poll_s: float, silence_s: float, *, trusted: bool) -> bool:
    """Nobody else lives, by the marks. ``trusted``: we have the flock, which settles it on one machine."""
    seen = _read(folder)
    if not seen or (trusted and seen.startswith(machine + " ")):
        return True
    quiet_s = 0.0
    while quiet_s < silence_s:
        step = min(poll_s, silence_s - quiet_s)
        await asyncio.sleep(step)
        quiet_s += step
        now = _read(folder)
        if now != seen:
            return not now
    return True


def _read(folder: Tree) -> str:
    # Opened anew each time: network file systems ask the server again then.
    return (folder.read(LOCK_FILE, 500) or b"").decode("ascii", "replace")


def _write(fd: int, text: str) -> None:
    os.pwrite(fd, text.encode(), 0)
    os.ftruncate(fd, len(text))


async def _beat(fd: int, mark: str, every_s: float) -> None:
    count = 0
    while True:
        await asyncio.sleep(every_s)
        count += 1
        with contextlib.suppress(OSError):  # a full volume keeps the flock
            _write(fd, f"{mark} {count}\n")
