"""Processes that stay: ranks on this machine, for many tests. Where there are GPUs enough each has
its own, by NCCL; else gloo, and they share the one there is."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds, for a test or for a collective in one


def _work(rank: int, size: int, folder: str, commands: Connection) -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.kernels import conftest  # noqa: F401  # what it does to the interpreter
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(rank % gpus)
    dist.init_process_group(
        "nccl" if gpus >= size else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    groups = {n: dist.new_group(range(n)) for n in range(1, size + 1)}
    commands.send((True, None))
    while (command := commands.recv()) is not None:
        function, n, arguments = command
        try:
            commands.send((True, function(rank, groups[n], *arguments)))
        except BaseException:
            commands.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``size`` processes; the first n of them are a group, for each n."""

    def __init__(self, size: int) -> None:
        # forked from a process that has imported torch and has no threads
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "triton_gn"])
        self._folder = tempfile.TemporaryDirectory(prefix="triton-gn-ranks-")
        self._commands, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = rank, size, str(Path(self._folder.name)), theirs
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._commands.append(ours)
            self._processes.append(process)
        self._answers(size)

    def run(self, function: Callable[..., Any], n: int, *arguments: Any) -> list[Any]:
        """Run ``function(rank, group, *arguments)`` on the first ``n`` ranks; list the results."""
        for commands in self._commands[:n]:
            commands.send((function, n, arguments))
        return self._answers(n)

    def _answers(self, n: int) -> list[Any]:
        answers = []
        for rank, commands in enumerate(self._commands[:n]):
            if not commands.poll(TIMEOUT):
                self.stop()
                raise AssertionError(f"rank {rank} of {n} does not answer")
            answers.append(commands.recv())
        errors = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not errors, "\n".join(errors)
        return [answer for _, answer in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()
