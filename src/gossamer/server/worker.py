"""The one thread that computes: it batches all requests and hands the pieces back to the event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, Generic, Protocol, TypeVar

from gossamer.server.wire import RequestError

PieceT = TypeVar("PieceT", bound="Finishing")


class Finishing(Protocol):
    """A part of an answer; the last one of a request has a reason."""

    @property
    def finish_reason(self) -> str | None: ...


class Asked(Protocol[PieceT]):
    """A request of either engine: its pieces, as they come."""

    @property
    def pieces(self) -> deque[PieceT]: ...


class Steps(Protocol):
    """A scheduler of either engine."""

    @property
    def idle(self) -> bool: ...

    def add(self, request: Any) -> None: ...

    def drop(self, request: Any) -> None: ...

    def step(self) -> Any: ...


class Submission(Generic[PieceT]):
    """The requests of one HTTP call, and their pieces as they reach the event loop."""

    def __init__(self, requests: Sequence[Asked[PieceT]]) -> None:
        self.requests = tuple(requests)
        self._pieces: asyncio.Queue[tuple[int, PieceT] | None] = asyncio.Queue()

    def taken(self) -> list[tuple[int, PieceT]]:
        """From the engine thread: (index of the request, piece) of all that came since the last time."""
        return [
            (index, request.pieces.popleft())
            for index, request in enumerate(self.requests)
            for _ in range(len(request.pieces))
        ]

    def put(self, items: Iterable[tuple[int, PieceT] | None]) -> None:
        """From the event loop: pieces, or None when the engine stopped before the requests were done."""
        for item in items:
            self._pieces.put_nowait(item)

    async def get(self) -> tuple[int, PieceT]:
        """From the event loop: the next piece."""
        item = await self._pieces.get()
        if item is None:
            raise _stopped()
        return item


class Worker:
    """Owns the scheduler and its thread. Requests join and leave between steps."""

    def __init__(self, scheduler: Steps, max_queue: int) -> None:
        self._scheduler, self._max_queue = scheduler, max_queue
        self._wake = threading.Condition()  # guards the next three
        self._orders: deque[Callable[[], None]] = deque()
        self._submissions: set[Submission[Any]] = set()
        self._stopping = False
        self._num_requests = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # which requests come from
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gossamer-engine")
        self._future: Future[None] | None = None

    def start(self, on_end: Callable[[], None]) -> None:
        """Begin computing; `on_end` is called (in the engine thread) when that ends, however it ends."""
        self._future = self._executor.submit(self._run)
        self._future.add_done_callback(lambda _: on_end())

    def stop(self) -> None:
        """End after the step under way; raises what ended the engine, had it ended before."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._executor.shutdown()
        if self._future is not None:
            self._future.result()

    @property
    def alive(self) -> bool:
        return self._future is not None and not self._future.done()

    @property
    def num_requests(self) -> int:
        """Requests under way or waiting (asked in the event loop, the only one to change it)."""
        return self._num_requests

    async def pieces(self, requests: Sequence[Asked[PieceT]]) -> AsyncGenerator[tuple[int, PieceT], None]:
        """(index of the request, piece) as they come, until all are finished.

        Closing the iterator drops the requests. RequestError when the queue is full or the engine stops.
        """
        submission = Submission(requests)
        self._submit(submission)
        num_open = len(requests)
        try:
            while num_open:
                index, piece = await submission.get()
                num_open -= piece.finish_reason is not None
                yield index, piece
        finally:
            self._withdraw(submission)

    def check_room(self, num_requests: int) -> None:
        """RequestError when the engine has stopped, or has no room for so many requests more."""
        if self._stopping or not self.alive:
            raise _stopped()
        under_way = self.num_requests
        if under_way + num_requests > self._max_queue:
            raise RequestError(
                f"{under_way} requests are under way or waiting and {num_requests} came; this server takes "
                f"{self._max_queue}. Try again later.",
                code="queue_full",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
            )

    def _submit(self, submission: Submission[Any]) -> None:
        with self._wake:
            self.check_room(len(submission.requests))
            self._loop = asyncio.get_running_loop()
            self._submissions.add(submission)
            self._num_requests += len(submission.requests)
            self._orders.append(lambda: self._add(submission))
            self._wake.notify()

    def _withdraw(self, submission: Submission[Any]) -> None:
        with self._wake:
            self._submissions.remove(submission)
            self._num_requests -= len(submission.requests)
            self._orders.append(lambda: self._drop(submission))
            self._wake.notify()

    def _run(self) -> None:
        """The engine thread."""
        try:
            while self._carry_out_orders():
                if not self._scheduler.idle:
                    self._scheduler.step()
                with self._wake:
                    submissions = tuple(self._submissions)
                self._hand_over([(it, it.taken()) for it in submissions])
        finally:
            with self._wake:
                self._stopping = True
                self._hand_over([(it, [None]) for it in self._submissions])

    def _hand_over(self, taken: Sequence[tuple[Submission[Any], Sequence[Any]]]) -> None:
        """Wake the event loop once for all that a step brought."""
        arrivals = [(submission, items) for submission, items in taken if items]

        def put() -> None:
            for submission, items in arrivals:
                submission.put(items)

        if arrivals and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)

    def _carry_out_orders(self) -> bool:
        """Do what was ordered, waiting while there is nothing to do; False when it is time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._orders or not self._scheduler.idle)
            orders, self._orders = self._orders, deque()
        for order in orders:
            order()
        return not self._stopping

    def _add(self, submission: Submission[Any]) -> None:
        for request in submission.requests:
            self._scheduler.add(request)

    def _drop(self, submission: Submission[Any]) -> None:
        for request in submission.requests:
            self._scheduler.drop(request)


def _stopped() -> RequestError:
    return RequestError("the engine has stopped.", code="stopped", status=HTTPStatus.SERVICE_UNAVAILABLE)
