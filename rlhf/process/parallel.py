"""Work shared out among forked processes, with the results in the order of the work: the same for
any number of processes.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from rlhf.process import supervision
from rlhf.process.distributed import cores
from rlhf.types import UserError

Work = TypeVar("Work")
Result = TypeVar("Result")
_WORTH_S = 0.25  # seconds of work before others help: starting processes takes some hundredths
_MOST = 16  # processes: more than one that reads and writes for all can keep busy
_QUEUED = 2  # pieces of work that wait for each process: what is read ahead
_PR_SET_PDEATHSIG = 1
_ENDED = (
    "a process that worked on rows has ended before its work (killed, or out of memory). "
    "Start again: with fewer cores (taskset) it takes less memory."
)


def parts(rows: Iterable[Work], size: int) -> Iterator[list[Work]]:
    """The rows in lists of `size` neighbours."""
    source = iter(rows)
    while part := list(islice(source, size)):
        yield part


def in_order(
    function: Callable[[Work], Result],
    work: Iterable[Work],
    *,
    pieces: int | None = None,
    processes: int | None = None,
    worth_s: float | None = None,
    waiting: Callable[[], None] = supervision.alive,
) -> Iterator[Result]:
    """`function` of each piece of work, in order; at most a few pieces are read ahead.

    This process works alone for `worth_s` seconds (None: 0.25), or until the pieces that are left
    would take as long (`pieces`: how many there are, where that is known). What comes then is
    shared out among `processes` forked ones (None: as many as there are cores, 16 at most); pieces
    and results are pickled on their way. `waiting` is called about once a second meanwhile. Raises
    what `function` raises, and UserError where a process was killed.
    """
    processes = processes or min(_MOST, cores())
    worth_s = _WORTH_S if worth_s is None else worth_s
    can_fork = processes > 1 and "fork" in multiprocessing.get_all_start_methods()
    source, spent = iter(work), 0.0
    for done, piece in enumerate(source, start=1):
        began = time.perf_counter()
        result = function(piece)
        spent += time.perf_counter() - began
        yield result
        left = 0.0 if pieces is None else spent / done * (pieces - done)
        if can_fork and max(spent, left) >= worth_s:
            break
    following = next(source, None)
    if following is not None:
        yield from _shared_out(function, chain([following], source), processes, waiting)


def over_parts(
    function: Callable[[list[Work]], Result],
    rows: Sequence[Work],
    size: int,
    processes: int | None = None,
) -> Iterator[Result]:
    """`in_order` of the rows in lists of `size` neighbours, which each process takes for itself:
    what goes to it are their places only.
    """
    pieces = [slice(start, start + size) for start in range(0, len(rows), size)]

    def work(piece: slice) -> Result:
        return function(list(rows[piece]))

    return in_order(work, pieces, pieces=len(pieces), processes=processes)


def beside(function: Callable[[], Result], *, processes: int | None = None) -> Callable[[], Result]:
    """Begin `function` in a forked process of its own, and give what waits for its result. Where
    only one process may run (`processes`: None: as many as there are cores) it runs when its
    result is asked for.

    The second call raises what `function` raises, and UserError where the process was killed.
    """
    if (processes or cores()) < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return function
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(function, sender), daemon=True)
    process.start()
    sender.close()

    def result() -> Result:
        while not receiver.poll(1.0):
            supervision.alive()
        try:
            value, error = receiver.recv()
        except EOFError as gone:
            raise UserError(_ENDED) from gone
        finally:
            process.join()
        if error is not None:
            raise error
        out: Result = value
        return out

    return result


def _tell(function: Callable[[], Any], sender: Any) -> None:
    """What such a process does."""
    _begin(lambda piece: function())
    try:
        value, error = function(), None
    except Exception as raised:  # noqa: BLE001 - raised again where the result is asked for
        value, error = None, raised
    sender.send((value, error))


_inherited: list[Callable[[Any], Any]] = []  # what a worker does: forked, it has it from its parent


def _begin(function: Callable[[Any], Any]) -> None:
    """A worker dies with its parent, and leaves Ctrl-C to it."""
    _inherited[:] = [function]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    supervision.forget()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    gc.freeze()  # the parent's objects stay shared memory


def _do(piece: Any) -> Any:
    return _inherited[0](piece)


def _shared_out(
    function: Callable[[Work], Result],
    work: Iterable[Work],
    processes: int,
    meanwhile: Callable[[], None],
) -> Iterator[Result]:
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(function,),
    )
    waiting: deque[Future[Result]] = deque()
    try:
        for piece in work:
            waiting.append(pool.submit(_do, piece))
            if len(waiting) > _QUEUED * processes:
                yield _result(waiting.popleft(), meanwhile)
        while waiting:
            yield _result(waiting.popleft(), meanwhile)
    except BrokenProcessPool as error:
        raise UserError(_ENDED) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: "Future[Result]", meanwhile: Callable[[], None]) -> Result:
    while not future.done():
        wait([future], timeout=1.0)
        meanwhile()
    return future.result()
