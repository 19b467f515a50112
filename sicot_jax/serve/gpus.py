"""One GPU for each worker process: left alone, JAX takes all of them, and most of their memory, in
every worker.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import IO

from sicot_jax.errors import InputError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SHARED = "SICOT_SERVE_DEVICES"  # folder of locks and names, for worker processes
_SECONDS = 10.0  # for a worker that was killed to be gone
_GPU = re.compile(r"\d+|(GPU|MIG)-[\w/.-]+")
_held: list[IO[str]] = []  # locks last as long as the process


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none where there is
    none.
    """
    given = os.environ.get(_VISIBLE)
    if given is not None:
        names = (name.strip() for name in given.split(","))
        return list(
            itertools.takewhile(_GPU.fullmatch, names)
        )  # CUDA stops at the first that is none
    # CUDA counts from 0 whatever the files are called: a container may have the last two of eight.
    return [
        str(number)
        for number in range(
            len([p for p in Path("/dev").glob("nvidia*") if p.name[6:].isdecimal()])
        )
    ]


def share_out(workers: int) -> str | None:
    """Let each of several workers have a GPU of its own; a folder to remove at the end, or None
    where there is no GPU.

    InputError for more workers than GPUs.
    """
    there = visible()
    if not there or workers == 1:
        return None
    if workers > len(there):
        raise InputError(
            f"--workers {workers} on {len(there)} GPUs, wanted at most one a GPU; {_VISIBLE}= (empty) leaves them unused"
        )
    folder = tempfile.mkdtemp(prefix="sicot-devices-")
    os.environ[_SHARED] = json.dumps({"folder": folder, "names": there})
    return folder


def take() -> str | None:
    """In a worker, before JAX is imported: the GPU that it has to itself from now on; None where
    none are shared out.
    """
    if _SHARED not in os.environ:
        return None
    shared = json.loads(os.environ[_SHARED])
    end = time.monotonic() + _SECONDS
    while True:
        for name in shared["names"]:
            lock = Path(shared["folder"], re.sub(r"\W", "_", name)).open("w")  # noqa: SIM115 (held for good)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            _held.append(lock)
            os.environ[_VISIBLE] = name
            return name
        if time.monotonic() > end:
            raise RuntimeError(f"no GPU of {', '.join(shared['names'])} is free for this worker")
        time.sleep(0.1)
