"""Assigns one GPU to each worker process; JAX would otherwise take all GPUs in every worker."""

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
_POOL = "SICOT_SERVE_GPUS"  # folder of locks and names of GPUs, for worker processes
_TIMEOUT_SECONDS = 10.0  # for a worker that was killed to release its GPU
_GPU = re.compile(r"\d+|(GPU|MIG)-[\w/.-]+")
_held_locks: list[IO[str]] = []  # locks last as long as the process


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get(_VISIBLE)
    if names is not None:
        # CUDA stops at the first name that is no GPU.
        return list(itertools.takewhile(_GPU.fullmatch, map(str.strip, names.split(","))))
    # CUDA counts from 0 whatever the files are called: a container may have the last two of eight.
    count = sum(path.name[6:].isdecimal() for path in Path("/dev").glob("nvidia*"))
    return [str(number) for number in range(count)]


def create_gpu_pool(workers: int) -> str | None:
    """Prepares one GPU for each of several worker processes.

    Args:
      workers: number of worker processes.

    Returns:
      A temporary folder to remove at the end; None where there is no GPU or one worker.

    Raises:
      InputError: more workers than GPUs.
    """
    names = visible_gpus()
    if not names or workers == 1:
        return None
    if workers > len(names):
        raise InputError(
            f"--workers {workers} on {len(names)} GPUs, wanted at most one a GPU; "
            f"{_VISIBLE}= (empty) leaves them unused"
        )
    folder = tempfile.mkdtemp(prefix="sicot-gpus-")
    os.environ[_POOL] = json.dumps({"folder": folder, "names": names})
    return folder


def claim_gpu() -> str | None:
    """Claims a GPU of the pool for this worker process; call it before JAX is imported.

    Returns:
      Name of the GPU; None where there is no pool.

    Raises:
      RuntimeError: no GPU becomes free within ten seconds.
    """
    if _POOL not in os.environ:
        return None
    pool = json.loads(os.environ[_POOL])
    end = time.monotonic() + _TIMEOUT_SECONDS
    while True:
        for name in pool["names"]:
            lock = Path(pool["folder"], re.sub(r"\W", "_", name)).open("w")  # noqa: SIM115 (stays open)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            _held_locks.append(lock)
            os.environ[_VISIBLE] = name
            return name
        if time.monotonic() > end:
            raise RuntimeError(f"no GPU of {', '.join(pool['names'])} is free for this worker")
        time.sleep(0.1)
