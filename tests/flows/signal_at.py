"""Run `ingot` and signal it from inside: python signal_at.py SIGNAL EVENT TEXT NTH ARGUMENTS...

The signal is sent at the NTH audit event (sys.addaudithook) of that name: in the middle of the import of the module
TEXT, before a file is opened whose path holds TEXT. No clock decides when.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main() -> None:
    name, wanted, text, nth = sys.argv[1:5]
    sys.argv = ["ingot", *sys.argv[5:]]
    left = [int(nth)]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == wanted and left[0] and (text == arguments[0] if event == "import" else text in str(arguments[0])):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.Signals[name])

    from flows.__main__ import main as ingot

    sys.addaudithook(hook)
    ingot()


if __name__ == "__main__":
    main()
