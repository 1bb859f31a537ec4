"""Whether installed packages import: each is tried in a process of its own.

A package that does not fit the torch beside it raises nearly anything, or ends the process, and
takes along whatever imports it (transformers imports torchvision, peft and flash_attn where they
are). A sound one may take seconds to import; a broken one mostly fails at once.
"""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterable
from importlib import import_module, util
from select import select

from ..printable import printable

PATIENCE = 0.7  # seconds, for packages that are still importing


class Trials:
    """Imports of modules that were started together, to be asked for in the end.

    Args:
        modules: names; those that are not there are left out. What this process imported already,
            torch above all, is not imported again.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.running = {module: _start(module) for module in modules if _is_there(module)}

    def errors(self, patience: float | None = PATIENCE) -> dict[str, str]:
        """What went wrong, by module; what is still importing then counts as sound.

        Args:
            patience: seconds to wait; None waits for all.
        """
        end = None if patience is None else time.monotonic() + patience
        found = {}
        for module, (process, reader) in self.running.items():
            left = None if end is None else max(end - time.monotonic(), 0)
            if not select([reader], [], [], left)[0]:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            else:
                said = os.read(reader, 10_000).decode(errors="replace")
                _, status = os.waitpid(process, 0)
                if os.WIFSIGNALED(status):
                    said = f"it ends Python by {signal.Signals(os.WTERMSIG(status)).name}"
                if said:
                    found[module] = said
            os.close(reader)
        return found


def _start(module: str) -> tuple[int, int]:
    """The process that imports a module, and where it says what went wrong."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    try:
        faulthandler.disable()
        os.nice(10)
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        sys.stdout = sys.stderr = open(silent, "w", encoding="utf-8")
        import_module(module)
    except BaseException as error:  # noqa: BLE001  SystemExit, too: all of it is what we ask for
        os.write(writer, f"{type(error).__name__}: {printable(error, 300)}".encode())
    finally:
        os._exit(0)


def _is_there(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except (ImportError, ValueError):  # what was imported before may lack a spec
        return module in sys.modules
