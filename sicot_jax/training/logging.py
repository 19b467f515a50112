"""What a run tells: a progress line, `log.jsonl`, TensorBoard events."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sicot_jax.common.files import write_text
from sicot_jax.parallel import distributed


class RunLog:
    """Writes every record of numbers to `log.jsonl` (and TensorBoard), and one progress line to the
    terminal.

    `photos_before` says how many photos the steps before one take. A resumed run appends; records
    beyond the step it resumes from are dropped first, so that each step stands once. Of several
    processes the first one alone tells.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        total_steps: int,
        photos_before: Callable[[int], int],
        tensorboard: bool,
    ):
        self.total_steps, self.photos_before = total_steps, photos_before
        self.tells = distributed.is_primary()
        self.start_step, self.last_step, self.last_time = (
            start_step,
            start_step,
            time.perf_counter(),
        )
        self.seconds_a_photo: float | None = None
        self.warm = False
        self.live = sys.stderr.isatty()
        if not self.tells:
            return
        path = workdir / "log.jsonl"
        kept = (
            [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
            if path.exists()
            else []
        )
        write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.writer: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:  # a bare accelerator image
                print("no tensorboardX here: numbers go to log.jsonl alone", file=sys.stderr)
            else:
                self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def numbers(self, step: int, kind: str, values: dict[str, float]) -> None:
        if not self.tells:
            return
        self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, losses: dict[str, float]) -> None:
        """Progress after `step` steps, with rate and time to go measured since the last call
        (evaluation excluded).
        """
        now = time.perf_counter()
        if step > self.last_step:
            current = (now - self.last_time) / (
                self.photos_before(step) - self.photos_before(self.last_step)
            )
            # The first interval holds what happens once: the second one replaces it.
            self.seconds_a_photo = (
                0.7 * self.seconds_a_photo + 0.3 * current
                if self.seconds_a_photo and self.warm
                else current
            )
            self.warm = self.last_step > self.start_step
        self.last_step, self.last_time = step, now
        rate = 1 / self.seconds_a_photo if self.seconds_a_photo else 0.0
        photos_to_go = self.photos_before(self.total_steps) - self.photos_before(step)
        to_go = int(photos_to_go * (self.seconds_a_photo or 0))
        detail = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.numbers(step, "train", {**losses, "images_per_second": round(rate, 1)})
        self._line(
            f"step {step}/{self.total_steps}  {detail}  {rate:.0f} images/s  {to_go // 60}:{to_go % 60:02d} to go"
        )

    def pause(self) -> None:
        """Call before, and `resume_clock` after, work that is not training."""
        self._paused = time.perf_counter()

    def resume_clock(self) -> None:
        self.last_time += time.perf_counter() - self._paused

    def _line(self, text: str) -> None:
        if self.live and self.tells:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            distributed.print_primary(text)

    def message(self, text: str) -> None:
        if self.live and self.tells:
            print("\r\x1b[K", end="", file=sys.stderr)
        distributed.print_primary(text)

    def close(self) -> None:
        if not self.tells:
            return
        if self.live:
            print(file=sys.stderr)
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut off by a kill
