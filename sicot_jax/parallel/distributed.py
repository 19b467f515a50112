"""Several processes as one run: the start, who writes, and what all must agree on.

Every process runs the same program over all devices of all of them. Where one process alone would
do, these functions cost nothing. What decides whether a process enters a collective must be equal
everywhere, or the others wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sicot_jax.errors import InputError

_LEAVING_SECONDS = (
    10  # how long a process that failed alone waits for the others before it ends, and they with it
)
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Meet the other processes of this run; before the first use of a device.

    Under Slurm, on a TPU pod slice and under Open MPI JAX finds them by itself; elsewhere each
    process is told by JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Raises InputError.
    """
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    arguments: dict[str, Any] = {}
    if given:
        if missing := [name for name in _VARIABLES if name not in given]:
            raise InputError(
                f"--distributed: {', '.join(given)} set, {', '.join(missing)} not; set all three or none"
            )
        address, count, index = (given[name] for name in _VARIABLES)
        if not address.rpartition(":")[2].isdigit():
            raise InputError(
                f"--distributed: JAX_COORDINATOR_ADDRESS={address}, wanted HOST:PORT of process 0"
            )
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise InputError(
                f"--distributed: JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count}, wanted 0 up to one less than their number"
            )
        arguments = {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(index),
        }
    try:
        jax.distributed.initialize(**arguments, shutdown_timeout_seconds=_LEAVING_SECONDS)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = (
            "check that it can be reached and that nobody else uses its port"
            if given
            else f"start it by srun or on every worker of a TPU slice, or set {', '.join(_VARIABLES)} for each process"
        )
        where = f" at {given[_VARIABLES[0]]}" if given else ""
        raise InputError(
            f"--distributed: the processes did not meet{where} ({reason}); {remedy}"
        ) from error


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def say(*lines: str) -> None:
    """To the terminal, once for all processes."""
    if is_first():
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def gathered(x: np.ndarray) -> np.ndarray:
    """Every process's `x` (of one shape and a dtype of at most 32 bits), stacked: [P, ...]."""
    return multihost_utils.process_allgather(np.asarray(x)) if several() else np.asarray(x)[None]


def side_by_side(x: np.ndarray) -> np.ndarray:
    """Every process's columns, joined in their order: [n, m, ...] -> [n, P * m, ...]; text too."""
    if x.dtype.kind == "U":
        length = int(gathered(np.asarray(x.dtype.itemsize // 4, np.int32)).max())
        letters = x.astype(f"<U{length}")[..., None].view(np.uint32)  # a letter is four bytes
        return side_by_side(letters).view(f"<U{length}")[..., 0]
    return np.concatenate(list(gathered(x)), axis=1)


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    return bool(gathered(np.asarray(flag)).any())


def of_first(flag: bool) -> bool:
    """What it is in the first process."""
    return bool(gathered(np.asarray(flag))[0])


def check_same(what: str, digest: str, remedy: str) -> None:
    """InputError, in every process, unless the hexadecimal digest is the same in all of them."""
    mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
    others = gathered(mine)
    different = [
        number for number, other in enumerate(others) if not np.array_equal(other, others[0])
    ]
    if different:
        raise InputError(
            f"{what} of process {different[0]} is {others[different[0]].tobytes().hex()[:12]}, that of process 0 is "
            f"{others[0].tobytes().hex()[:12]}; {remedy}"
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is refused inside in one process is refused in all, so that none waits for the others;
    no collectives inside.
    """
    try:
        yield
    except InputError:
        any_of(True)
        raise
    if any_of(False):
        raise InputError("refused in another process, which says why")


def wait_for_all(why: str) -> None:
    """A barrier."""
    if several():
        multihost_utils.sync_global_devices(why)
