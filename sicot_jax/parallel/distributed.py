"""Runs several processes as one: start, the primary process, and what all must agree on.

Every process runs the same program over all devices of all of them. With one process these
functions cost nothing. What decides whether a process enters a collective must be equal everywhere,
or the others wait forever.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from sicot_jax.errors import InputError

# How long a process that failed alone waits for the others before it ends, and they with it.
_SHUTDOWN_TIMEOUT_SECONDS = 10

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Connects this process with the others of the run; before the first use of a device.

    Under Slurm, on a TPU pod slice and under Open MPI JAX finds them by itself; elsewhere each
    process reads JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.

    Raises:
      InputError: the variables are incomplete or wrong, or the processes do not meet.
    """
    address, arguments = _from_environment()
    try:
        jax.distributed.initialize(
            **arguments,  # type: ignore[arg-type]
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        advice = (
            "check that it can be reached and that no other process uses its port"
            if address
            else "start it by srun or on every worker of a TPU slice, or set "
            f"{', '.join(_VARIABLES)} for each process"
        )
        where = f" at {address}" if address else ""
        raise InputError(
            f"--distributed: the processes did not meet{where} ({reason}); {advice}"
        ) from error


def _from_environment() -> tuple[str, dict[str, str | int]]:
    """The coordinator's address and all arguments that the variables give; nothing without them."""
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not given:
        return "", {}
    if missing := [name for name in _VARIABLES if name not in given]:
        raise InputError(
            f"--distributed: {', '.join(given)} set, {', '.join(missing)} not; set all three or "
            "none"
        )
    address, count, index = (given[name] for name in _VARIABLES)
    if not address.rpartition(":")[2].isdigit():
        raise InputError(
            f"--distributed: JAX_COORDINATOR_ADDRESS={address}, wanted HOST:PORT of process 0"
        )
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise InputError(
            f"--distributed: JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count}, wanted 0 up to "
            "one less than their number"
        )
    return address, {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
    }


def is_multiprocess() -> bool:
    """Returns whether the run consists of several processes."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Returns whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def print_primary(*lines: str) -> None:
    """Prints to standard error, once for all processes.

    Args:
      *lines: the lines.
    """
    if is_primary():
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def all_gather(x: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, stacked.

    Args:
      x: [...], of one shape in all processes and a dtype of at most 32 bits.

    Returns:
      [processes, ...], the same in all processes.
    """
    if is_multiprocess():
        return np.asarray(multihost_utils.process_allgather(np.asarray(x)))
    return np.asarray(x)[None]


def all_gather_columns(x: np.ndarray) -> np.ndarray:
    """Returns the columns of all processes, joined in their order.

    Args:
      x: [n, m, ...], of one shape in all processes; numbers of at most 32 bits, or text.

    Returns:
      [n, processes * m, ...], the same in all processes.
    """
    if x.dtype.kind == "U":
        length = int(all_gather(np.asarray(x.dtype.itemsize // 4, np.int32)).max())
        letters = x.astype(f"<U{length}")[..., None].view(np.uint32)  # a letter is four bytes
        return all_gather_columns(letters).view(f"<U{length}")[..., 0]
    return np.concatenate(list(all_gather(x)), axis=1)


def any_process(flag: bool) -> bool:
    """Returns whether a flag is set in any process.

    Args:
      flag: this process's.

    Returns:
      The same in all processes.
    """
    return bool(all_gather(np.asarray(flag)).any())


def broadcast_from_primary(flag: bool) -> bool:
    """Returns the primary process's flag.

    Args:
      flag: this process's.

    Returns:
      The same in all processes.
    """
    return bool(all_gather(np.asarray(flag))[0])


def check_same_on_all(what: str, digest: str, advice: str) -> None:
    """Raises InputError, in every process, unless a digest is the same in all of them.

    Args:
      what: what the digest is of, for the message.
      digest: hexadecimal, of one length in all processes.
      advice: what to do, for the message.

    Raises:
      InputError: the digests differ.
    """
    digests = all_gather(np.frombuffer(bytes.fromhex(digest), np.uint8))
    different = [
        number for number, other in enumerate(digests) if not np.array_equal(other, digests[0])
    ]
    if different:
        raise InputError(
            f"{what} of process {different[0]} is {digests[different[0]].tobytes().hex()[:12]}, "
            f"that of process 0 is {digests[0].tobytes().hex()[:12]}; {advice}"
        )


@contextlib.contextmanager
def sync_errors() -> Iterator[None]:
    """Turns an InputError of one process into one of all, so that none waits for the others.

    The block must contain no collectives.

    Yields:
      None.

    Raises:
      InputError: this or another process raised one in the block.
    """
    try:
        yield
    except InputError:
        any_process(True)
        raise
    if any_process(False):
        raise InputError("refused in another process, which says why")


def barrier(name: str) -> None:
    """Waits until all processes have come here.

    Args:
      name: name of the barrier, the same in all processes.
    """
    if is_multiprocess():
        multihost_utils.sync_global_devices(name)
