"""``python -m rlhf.launch.ready --limit-s 600 --pid PID URL...``: waits until every server answers
at /health; exit code 1 where one does not in time, or the process PID has ended.
"""

import argparse
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

_ASK_S = 5.0  # limit of one question
_EVERY_S = 0.5


def answers(url: str) -> bool:
    """Whether the server at `url` says that it is up. It asks no proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=_ASK_S) as response:
            status: int = response.status
            return status == 200
    except (OSError, urllib.error.URLError, ValueError):
        return False


def wait(urls: Sequence[str], limit_s: float, goes_on: Callable[[], bool]) -> list[str]:
    """Wait until all `urls` answer, `limit_s` seconds are over, or `goes_on` says no. Returns those
    that don't answer.
    """
    missing = list(urls)
    deadline = time.monotonic() + limit_s
    while True:
        missing = [url for url in missing if not answers(url)]
        if not missing or time.monotonic() >= deadline or not goes_on():
            return missing
        time.sleep(_EVERY_S)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is there, and another user's
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Wait as the arguments say, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.launch.ready", description=__doc__)
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--pid", type=int, help="of the process that starts the servers")
    parser.add_argument("urls", nargs="+")
    given = parser.parse_args(argv)
    missing = wait(given.urls, given.limit_s, lambda: given.pid is None or _alive(given.pid))
    for url in missing:
        print(
            f"error: the rollout server {url} does not answer: it ended, or it took longer than "
            f"rollout.server.start_limit_s={given.limit_s:g}. Its log says why.",
            file=sys.stderr,
        )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
