"""Several processes for one run on this machine, started and watched by PyTorch's elastic agent.

Each is the very command that was typed, with a rank in its environment
(`lorakit.training.distributed`). The first writes to the terminal, the others to files that end up
in the run's folder. Across machines, torchrun or a cluster's own launcher starts them instead.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lorakit.errors import RunError, UsageError
from lorakit.recipes.recipe import Recipe
from lorakit.runs.folder import LOGS, RECIPE
from lorakit.runs.start import starting_point
from lorakit.training.distributed import LOST

log = logging.getLogger("lorakit")
# Seconds that processes have after a signal to end their step and save a checkpoint.
PATIENCE = 600
# SIGHUP too would be passed on, which `nohup` has this process ignore.
SIGNALS: dict[str, Any] = (
    {"signals_to_handle": "SIGTERM,SIGINT"}
    if "signals_to_handle" in LaunchConfig.__dataclass_fields__
    else {}
)
# Lines of another process's log that are shown when it has failed.
LINES = 12


def launch(
    arguments: Sequence[str],
    recipe: Recipe,
    processes: int,
    restarts: int,
    resume: str | None,
    overwrite: bool,
) -> int:
    """Run `lorakit` with these arguments in so many processes, and start them anew up to `restarts`
    times when one of them fails. Returns the exit code: 0, or that of a process which has said
    itself what was wrong.

    Raises UsageError for a folder that must not be written to, RunError where a process was killed.
    """
    if restarts and overwrite:
        what = "--restarts goes on from checkpoints, and --overwrite removes them"
        raise UsageError(what, "Remove the old run first, or name another output_dir.")
    resume = resume or recipe.train.resume_from_checkpoint
    if restarts and resume not in (None, "auto"):
        what = f"--restarts goes on from the newest checkpoint, and --resume names `{resume}`"
        raise UsageError(what, "Resume it with --resume auto, or leave --restarts out.")
    if 0 < (gpus := torch.cuda.device_count()) < processes:
        raise UsageError(f"there are {gpus} GPUs for {processes} processes", f"--nproc {gpus}")
    folder = Path(recipe.output_dir)
    starting_point(folder, recipe, resume, overwrite)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with _logs(folder) as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=f"lorakit-{os.getpid()}",
            # A static rendezvous can not restart.
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=restarts,
            logs_specs=DefaultLogsSpecs(
                log_dir=str(logs), redirects=dict.fromkeys(range(1, processes), Std.ALL)
            ),
            **SIGNALS,
        )
        log.info("%d processes; what the others say is in %s until the end", processes, logs)
        try:
            elastic_launch(config, sys.executable)("-m", "lorakit", *arguments)
        except SignalException:
            return 130
        except ChildFailedError as failed:
            return _exit_code(failed, folder, logs)
    return 0


@contextmanager
def _logs(folder: Path) -> Iterator[Path]:
    """Context with a folder for what the processes say, which becomes a part of the run's."""
    logs = Path(tempfile.mkdtemp(prefix="lorakit-logs-"))
    try:
        yield logs
    finally:
        if (folder / RECIPE).is_file():
            for file in sorted(logs.glob("*/attempt_*/*/std*.log")):
                attempt, rank = file.parent.parent.name, file.parent.name
                (folder / LOGS).mkdir(exist_ok=True)
                name = f"{attempt.replace('_', '-')}-process-{rank}-{file.name}"
                shutil.copyfile(file, folder / LOGS / name)
            shutil.rmtree(logs, ignore_errors=True)


def _exit_code(failed: ChildFailedError, folder: Path, logs: Path) -> int:
    """The exit code of the process that failed first, where that one has said itself what was
    wrong: the first process on the terminal, another one in its log, of which the end is shown
    here. Raises RunError where it ended otherwise, or was killed."""
    rank, code = min(
        ((rank, failure.exitcode) for rank, failure in failed.failures.items()), key=_blame
    )
    if code in (1, 2, LOST, 130):
        if rank and code != 2:  # a recipe is as wrong for the first, which has said so
            said = sorted(logs.glob(f"*/attempt_*/{rank}/stderr.log"))
            lines = said[-1].read_text("utf-8", "replace").splitlines()[-LINES:] if said else []
            log.error("process %d of the run said:\n  %s", rank, "\n  ".join(lines))
        return 1 if code == LOST else int(code)
    how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    place = folder / LOGS if (folder / RECIPE).is_file() else logs
    raise RunError(
        f"process {rank} of the run ended {how}",
        f"What it said is in {place}. `--resume auto` goes on from the last checkpoint;"
        " where memory is short, fewer processes or a smaller per_device_train_batch_size help.",
    )


def _blame(one: tuple[int, int]) -> tuple[int, int]:
    """Sort key of (rank, exit code): a process that has said what was wrong, then one that was
    killed. The others are those that lost it, or that the agent ended."""
    rank, code = one
    consequence = {-signal.SIGTERM: 2, LOST: 3, 130: 4}
    return (0 if code in (1, 2) else consequence.get(code, 1)), rank
