"""Tests whether a run resumes after SIGKILL in the middle of its checkpoint saves, again and again.

Command:  python -m benchmarks.crash_recovery
Smaller:  python -m benchmarks.crash_recovery --tries 2 --classes 2000

One run with a large head: each try starts it with the same command, waits for a save to begin, and
kills it a random moment later. A try counts as resumed when the next start continues from a saved
step, and no step that was complete before is lost.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import timing

SAVES_EVERY = 3  # steps


def command(workdir: Path, classes: int, width: int) -> list[str]:
    options = {
        "data.generated.num_classes": classes,
        "data.generated.train_photos": 2 * classes,
        "model.embedding_width": width,
        "train.steps": 10**6,
        "train.checkpoint_every_steps": SAVES_EVERY,
        "train.checkpoint_every_seconds": 10**6,
        "train.evaluate_every_epochs": 10**6,
        "train.log_every_steps": 1,
        "mesh.data": 1,
    }
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "sicot_jax.main", "--config=tiny", f"--workdir={workdir}", *flags]


def complete_steps(workdir: Path) -> set[int]:
    """Returns the steps of complete checkpoints."""
    return {
        int(path.name)
        for path in (workdir / "checkpoints" / "last").glob("*")
        if path.name.isdigit()
    }


def unfinished(workdir: Path) -> list[Path]:
    """Returns checkpoints that are being written."""
    return [path for path in (workdir / "checkpoints" / "last").glob("*tmp*") if path.is_dir()]


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def wait_for_save(process: subprocess.Popen, workdir: Path, log: Path) -> None:
    """Waits until this process has begun a save: its second one, where there was none before."""
    before = set(unfinished(workdir))  # removed when the run starts
    while not (complete_steps(workdir) and set(unfinished(workdir)) - before):
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself: {log.read_text()[-2000:]}")
        time.sleep(0.002)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=30)
    parser.add_argument("--classes", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument(
        "--longest", type=float, default=1.0, help="seconds after a save's begin, at most"
    )
    args = parser.parse_args()
    timing.print_machine()
    rng = random.Random(0)
    during = resumed = lost = 0
    complete: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "compiled")}
        for number in range(args.tries + 1):
            run = subprocess.Popen(
                command(workdir, args.classes, args.width),
                stdout=subprocess.DEVNULL,
                stderr=(log := (Path(folder) / "log").open("w+")),
                env=environment,
            )
            wait_for_save(run, workdir, Path(log.name))
            log_text = Path(log.name).read_text()
            match = re.search(r"resuming .* from step (\d+)", log_text)
            if complete:
                resumed += match is not None and int(match[1]) in complete
                lost += match is None or int(match[1]) < max(complete)
            if number < args.tries:
                time.sleep(rng.uniform(0, args.longest))
            run.send_signal(signal.SIGKILL)
            run.wait()
            log.close()
            complete = complete_steps(workdir)
            if number < args.tries:
                during += bool(unfinished(workdir))
                print(
                    f"try {number + 1}: killed, whole are {sorted(complete)}, half "
                    f"{len(unfinished(workdir))}",
                    flush=True,
                )
            checkpoint = (
                folder_bytes(workdir / "checkpoints" / "last" / str(max(complete)))
                if complete
                else 0
            )
    timing.print_table(
        f"{args.classes:,} classes x {args.width}, checkpoints of {checkpoint / 2**20:,.0f} MiB "
        f"every {SAVES_EVERY} steps",
        ("kills", "during a save", "resumed", "lost a whole checkpoint"),
        [(str(args.tries), str(during), str(resumed), str(lost))],
    )


if __name__ == "__main__":
    main()
