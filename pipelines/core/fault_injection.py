"""Fault injection: named points in production code where a test, or an operator's drill, makes something go wrong.

`INGOT_FAULTS` names a JSON file, a list of faults such as

    [{"point": "train.after_step", "rank": 1, "step": 7, "action": "SIGKILL"},
     {"point": "checkpoint.mid_shard", "nth": 3, "action": "ENOSPC"}]

A fault waits for its point; every key but `nth`, `action`, `seconds` and `factor` must equal the coordinate that the
point reports (`rank` is known everywhere). `nth` counts the matching visits of one process. A fault fires once in its
life: it is claimed by creating `<file>.<index>.fired`, which is atomic between processes and outlives restarts. Without
the variable a point costs one dictionary look-up.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

ENVIRONMENT_VARIABLE = "INGOT_FAULTS"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
ACTIONS = (*SIGNALS, "raise", "ENOSPC", "truncate", "flip", "delay", "nan", "scale")

_NOT_COORDINATES = frozenset({"point", "nth", "action", "seconds", "factor"})
_visits: Counter[int] = Counter()


class InjectedFaultError(RuntimeError):
    """What the action `raise` raises: a crash that no code expects."""


def fault_point(name: str, **coordinates: Any) -> None:
    """Let the faults that wait here happen; does nothing unless `INGOT_FAULTS` is set.

    Args:
        name: the point, `part.moment`.
        **coordinates: where the run is (`rank`, `step`), and what an action may work on: `path` for `truncate` and
            `flip`, `tensor` for `nan` and `scale`.
    """
    plan = os.environ.get(ENVIRONMENT_VARIABLE)
    if plan is None:
        return
    here = {"rank": int(os.environ.get("RANK", "0")), **coordinates}
    for index, fault in enumerate(_read(Path(plan))):
        if fault["point"] == name and _matches(fault, here):
            _visits[index] += 1
            if _visits[index] >= fault.get("nth", 1) and _claim(Path(f"{plan}.{index}.fired")):
                _act(fault, here)


def _read(plan: Path) -> list[dict[str, Any]]:
    faults: list[dict[str, Any]] = json.loads(plan.read_text(encoding="utf-8"))
    for fault in faults:
        if fault["action"] not in ACTIONS:
            raise ValueError(f"{plan}: unknown action {fault['action']!r}; known: {', '.join(ACTIONS)}")
    return faults


def _matches(fault: dict[str, Any], here: dict[str, Any]) -> bool:
    return all(key in here and here[key] == value for key, value in fault.items() if key not in _NOT_COORDINATES)


def _claim(marker: Path) -> bool:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _act(fault: dict[str, Any], here: dict[str, Any]) -> None:
    action = fault["action"]
    if action in SIGNALS:
        os.kill(os.getpid(), signal.Signals[action])
    elif action == "raise":
        raise InjectedFaultError(f"injected at {fault['point']}")
    elif action == "ENOSPC":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(here.get("path", "")))
    elif action == "truncate":
        os.truncate(here["path"], Path(here["path"]).stat().st_size - 1)
    elif action == "flip":
        _flip(Path(here["path"]))
    elif action == "delay":
        time.sleep(fault.get("seconds", 1.0))
    elif action == "scale":
        here["tensor"].mul_(fault.get("factor", 100.0))
    else:
        here["tensor"].fill_(float("nan"))


def _flip(path: Path) -> None:
    """Invert the lowest bit of the middle byte."""
    with path.open("r+b") as stream:
        middle = path.stat().st_size // 2
        stream.seek(middle)
        byte = stream.read(1)[0]
        stream.seek(middle)
        stream.write(bytes([byte ^ 1]))
