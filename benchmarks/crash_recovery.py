"""A run with a large head, killed with SIGKILL in the middle of its checkpoint saves, again and
again: does it resume?

Command:  python -m benchmarks.crash_recovery
Smaller:  python -m benchmarks.crash_recovery --tries 2 --classes 2000
One run: each try starts it with the same command, waits for a save to begin, and kills it a random
  moment later. A try counts as resumed when the next start goes on from a step that was saved, and
  no step that was whole before is lost.
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


def saved(workdir: Path) -> set[int]:
    """Steps of the checkpoints that are whole."""
    return {
        int(path.name)
        for path in (workdir / "checkpoints" / "last").glob("*")
        if path.name.isdigit()
    }


def unfinished(workdir: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return [path for path in (workdir / "checkpoints" / "last").glob("*tmp*") if path.is_dir()]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def until_a_save(process: subprocess.Popen, workdir: Path, log: Path) -> None:
    """Returns when a save of this process has begun: its second one, where there was none before."""
    old = set(unfinished(workdir))  # cleared away when the run starts
    while not (saved(workdir) and set(unfinished(workdir)) - old):
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
    moment = random.Random(0)
    during = resumed = lost = 0
    known: set[int] = set()
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
            until_a_save(run, workdir, Path(log.name))
            text = Path(log.name).read_text()
            found = re.search(r"resuming .* from step (\d+)", text)
            if known:
                resumed += found is not None and int(found[1]) in known
                lost += found is None or int(found[1]) < max(known)
            if number < args.tries:
                time.sleep(moment.uniform(0, args.longest))
            run.send_signal(signal.SIGKILL)
            run.wait()
            log.close()
            known = saved(workdir)
            if number < args.tries:
                during += bool(unfinished(workdir))
                print(
                    f"try {number + 1}: killed, whole are {sorted(known)}, half {len(unfinished(workdir))}",
                    flush=True,
                )
            checkpoint = size(workdir / "checkpoints" / "last" / str(max(known))) if known else 0
    timing.print_table(
        f"{args.classes:,} classes x {args.width}, checkpoints of {checkpoint / 2**20:,.0f} MiB every {SAVES_EVERY} steps",
        ("kills", "during a save", "resumed", "lost a whole checkpoint"),
        [(str(args.tries), str(during), str(resumed), str(lost))],
    )


if __name__ == "__main__":
    main()
