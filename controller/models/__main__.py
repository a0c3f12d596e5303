"""``python3 -m controller.models '<json>'``: see the package's docstring for what it does and its exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from controller.models.errors import EXIT_LASTING, EXIT_READY, EXIT_STOPPED, EXIT_TRANSIENT, LoadError, TransientError
from controller.models.loading import Loading
from controller.models.progress import Progress, termination_message
from controller.models.report import Report
from controller.models.request import Settings, decode_request

TERMINATION_LOG = "/dev/termination-log"


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


async def load(argument: str, environment: Mapping[str, str]) -> tuple[int, Report]:
    """(exit code, last report)"""
    progress = Progress("", "", _say)
    task = asyncio.current_task()
    assert task is not None
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, task.cancel)
    try:
        settings = Settings.of(environment)
        request = decode_request(argument)
        progress = Progress(request.model, request.kind, _say)
        async with progress.telling(settings.report_every_s):
            await Loading(request, settings, environment, progress).run()
    except LoadError as error:
        return error.exit_code, progress.fail(error)
    except asyncio.CancelledError as error:
        return EXIT_STOPPED, progress.fail(error)
    except Exception as error:
        # A mistake of ours. Its text is not shown: it may hold a URL.
        sys.stderr.writelines(traceback.format_tb(error.__traceback__))
        return EXIT_TRANSIENT, progress.fail(TransientError("Internal", f"unexpected {type(error).__name__}"))
    return EXIT_READY, progress.tell("ready")


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python3 -m controller.models '<json>'", file=sys.stderr)
        return EXIT_LASTING
    code, report = asyncio.run(load(sys.argv[1], os.environ))
    # Kubernetes puts a file there to be written to; anywhere else it is not made.
    log = Path(os.environ.get("ARKS_TERMINATION_LOG", TERMINATION_LOG))
    with contextlib.suppress(OSError):
        if log.is_file():
            log.write_bytes(termination_message(report))
    return code


if __name__ == "__main__":
    sys.exit(main())
