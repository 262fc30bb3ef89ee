"""Run threads one at a time, and exchange values between them."""

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from triton_gn.tiling.layout import NotExactError

_END = ("the end of the forward",)


class _Stopped(BaseException):
    """Signal that unwinds a tile after another tile has failed."""


class Baton:
    """Scheduler that lets one tile run at a time.

    Tiles run in the grid's order up to one exchange and in reverse order up to the next: the last
    tile to hand in its part is the first to continue.
    """

    def __init__(self, tiles: int) -> None:
        self.error: BaseException | None = None
        self.is_in_between = False  # whether some tiles were ahead of the one that failed
        self._turns = [threading.Semaphore(0) for _ in range(tiles)]
        self._done = threading.Event()
        self._step = 1
        self._key: tuple[Any, ...] = ()
        self._parts: dict[int, Any] = {}
        self._shared: Any = None
        self._takers = 0

    def run(self, bodies: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run all bodies, one per tile, and return their results.

        If a body raises, or the caller is interrupted, all of them stop.
        """
        results: list[Any] = [None] * len(bodies)
        threads: list[threading.Thread] = []

        def run_one(tile: int) -> None:
            try:
                self._wait(tile)
                results[tile] = bodies[tile]()
                if self._hand_in(tile, _END, None):
                    self._done.set()
                else:
                    self._turns[tile + self._step].release()
            except _Stopped:
                pass
            except BaseException as error:
                self._stop(error)

        try:
            for tile in range(len(bodies)):
                context = contextvars.copy_context()
                thread = threading.Thread(target=context.run, args=(run_one, tile), daemon=True)
                thread.start()
                threads.append(thread)
            self._turns[0].release()
            # with a timeout, because a Ctrl-C just before the wait is raised only after it
            while not self._done.wait(0.1):
                pass
        except BaseException as error:
            self._stop(error)
        finally:
            for thread in threads:
                thread.join()
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # its traceback holds this frame
        return results

    def exchange(
        self,
        tile: int,
        key: tuple[Any, ...],
        part: Any,
        combine: Callable[[list[Any]], Any],
        waiting: AbstractContextManager[Any],
    ) -> Any:
        """Hand in ``part``, and return ``combine`` of the parts of all tiles.

        ``combine`` runs once, after the last tile has handed in its part. While other tiles run,
        this one is inside the context ``waiting``.
        """
        if self._hand_in(tile, key, part):
            parts = [self._parts[i] for i in range(len(self._turns))]
            self._parts.clear()
            self._shared = combine(parts)
            self._takers = len(parts)
            self._step = -self._step
        else:
            with waiting:
                self._turns[tile + self._step].release()
                self._wait(tile)
        shared = self._shared
        self._takers -= 1
        if not self._takers:
            self._shared = None
        return shared

    def check(self) -> None:
        """Unwind if another tile has failed."""
        if self.error is not None:
            raise _Stopped

    def _hand_in(self, tile: int, key: tuple[Any, ...], part: Any) -> bool:
        if self._parts and key != self._key:
            raise NotExactError(
                f"exact_tiles: all tiles must do the same; one came to {key[0]} and another "
                f"to {self._key[0]}, or with other sizes. The model must keep no state."
            )
        self._key = key
        self._parts[tile] = part
        return len(self._parts) == len(self._turns)

    def _wait(self, tile: int) -> None:
        self._turns[tile].acquire()
        self.check()

    def _stop(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
            self.is_in_between = bool(self._parts)
        for turn in self._turns:
            turn.release()
        self._done.set()
