"""Processes that train one model together: who this one is, and what they tell each other.

Each process holds all adapters, reads its share of a step's rows, and adds up what all of them
found in one buffer a step. A launcher (`lorakit train --nproc`, torchrun, Slurm) says in the
environment how many there are; without one, this process is alone and nothing here costs anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from lorakit import compat
from lorakit.errors import RunError
from lorakit.process import attempt, processes

log = logging.getLogger("lorakit")
# For waiting where one process works alone, as in tokenising and saving.
PATIENCE = timedelta(days=2)
# Time that a launcher takes to see that a process has ended.
GRACE_SECONDS = 5


# Exit code of a process that lost the others, by which the launcher tells it from the one that
# ended first; that of the run is 1.
LOST = 75


class LostError(RunError):
    """Another process of the run has ended, or hangs."""

    exit_code = LOST


@dataclass(frozen=True)
class World:
    """The processes of a run. rank: the number of this one; the first is 0 and writes the run.
    device: on which sums are made. patient: a group of the same processes that waits for days."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    patient: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part of `rows` that this process reads: dealt by falling length, so that all have
        about as many tokens. lengths: of all rows of the data."""
        if self.size == 1:
            return rows
        return rows[np.argsort(-lengths[rows], kind="stable")][self.rank :: self.size]

    def sum_gradients(
        self, parameters: Sequence[nn.Parameter], scalars: Sequence[float | Tensor]
    ) -> list[float]:
        """Replace the gradients of float32 parameters by their sums over all processes, and return
        the sums of the scalars. One buffer of 4 · (entries + parameters + scalars) bytes.

        A parameter without a gradient in every process keeps none. Raises LostError where another
        process has ended.
        """
        if self.size == 1:
            return [float(scalar) for scalar in scalars]
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        parts = [
            p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters
        ]
        numbers = [torch.as_tensor(s, dtype=torch.float32).reshape(1) for s in scalars]
        buffer = torch.cat([part.to(self.device) for part in [*parts, there, *numbers]])
        self._reduce(buffer)
        sizes = [p.numel() for p in parameters]
        *sums, counts, totals = torch.split(buffer, [*sizes, len(sizes), len(numbers)])
        for parameter, total, count in zip(parameters, sums, counts.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.device) if count else None
        return [float(total) for total in totals.tolist()]

    def seed_step(self, seed: int, step: int) -> None:
        """Let each process draw other random numbers in this step, the same ones if it is run
        again. One process alone goes on with its own."""
        if self.size > 1:
            torch.manual_seed(zlib.crc32(f"{seed} {step} {self.rank}".encode()))

    def sum(self, array: NDArray[Any]) -> NDArray[Any]:
        """The sum of arrays of the same shape over all processes, in float64."""
        if self.size == 1:
            return array
        buffer = torch.from_numpy(np.ascontiguousarray(array, np.float64)).to(self.device)
        self._reduce(buffer)
        return buffer.cpu().numpy().astype(array.dtype)

    def largest(self, number: int) -> int:
        """The largest of the numbers of all processes, which are not negative."""
        return int(self.sum(np.eye(self.size)[self.rank] * number).max())

    def any(self, flag: bool) -> bool:
        """True if the flag is True in any process."""
        return bool(self.sum(np.array([float(flag)]))[0] > 0)

    def barrier(self) -> None:
        """Wait until every process has come here, for days if need be."""
        if self.size > 1:
            with _explained():
                dist.barrier(group=self.patient)

    @contextlib.contextmanager
    def one_after_the_first(self) -> Iterator[None]:
        """Context that the first process runs before the others, which find what it left in the
        cache."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    def assert_equal(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raise RunError where the tensors are not the same, to the bit, in all processes."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode())
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        # Six bytes are exact in float64.
        own = float(int.from_bytes(digest.digest()[:6], "big"))
        every = self.sum(np.eye(self.size)[self.rank] * own)
        if bool((every != every[0]).any()):
            odd = [str(rank) for rank, value in enumerate(every) if value != every[0]]
            raise RunError(
                f"{what} of process {', '.join(odd)} differ from those of process 0",
                "All processes must run the same packages on the same kind of device.",
            )

    def _reduce(self, buffer: Tensor) -> None:
        with _explained():
            dist.all_reduce(buffer)


ALONE = World()


@contextlib.contextmanager
def joined(timeout_seconds: float) -> Iterator[World]:
    """Context in which this process is one of those that its launcher has started, as the
    environment says it (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). A program that has
    joined them already stays with them.

    timeout_seconds: how long an exchange waits for the slowest process. Raises RunError where they
    do not find each other.
    """
    if processes() == 1:
        yield ALONE
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    mine = not dist.is_initialized()
    with _explained():
        if mine:
            timeout = timedelta(seconds=timeout_seconds)
            # Processes that are started anew find each other through the same store, where those
            # before them left their addresses.
            store, rank, size = compat.process_store(timeout, f"attempt-{attempt()}")
            dist.init_process_group(
                backend, timeout=timeout, store=store, rank=rank, world_size=size
            )
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, patient)
    finally:
        if mine:
            dist.destroy_process_group()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Context that says in lorakit's words that the processes lost each other."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # Whoever ended first is to blame: the launcher sees that one, and ends this one.
        time.sleep(GRACE_SECONDS)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LostError(
            f"the processes of this run lost each other: {reason}",
            "One of them has ended, or hangs: its own log says why. `--resume auto` goes on from"
            " the last checkpoint.",
        ) from error
