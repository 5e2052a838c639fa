"""Keep a command running for as long as this program's standard input is open.

A worker that is killed cannot stop the ComfyUI it has started, which would keep its GPU's memory.
The worker's end of the pipe closes whichever way it ends: ``python guard.py COMMAND ...``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading


def main() -> None:
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def end_with_parent() -> None:
        while os.read(0, 1024):  # sys.stdin would be locked when this program ends
            pass
        child.kill()

    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(child.wait())


if __name__ == "__main__":
    main()
