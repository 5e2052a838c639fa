"""Run a command until the other end of this program's standard input is closed.

A worker that is killed cannot stop the ComfyUI it has started, which would keep its GPU's memory;
but its end of the pipe closes, whichever way it ends: ``python guard.py COMMAND ...``. POSIX only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    if os.fork():  # no child of the worker's: Ray kills those first, and would kill this one
        os._exit(0)
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def end_with_parent() -> None:
        while os.read(0, 1024):  # sys.stdin would be locked when this program ends
            pass
        os.killpg(child.pid, signal.SIGKILL)  # whatever the command has started, too

    threading.Thread(target=end_with_parent, daemon=True).start()
    child.wait()


if __name__ == "__main__":
    main()
