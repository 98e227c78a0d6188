"""A port is taken or refused before anything else is done; signals end a server in order."""

import os
import signal

import pytest

from rlhf.process.listening import address, ignoring_signals, listen
from rlhf.types import UserError


def test_a_port_is_bound_or_refused() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert address(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=rf"stage.port={port}: can't listen there"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="can't be resolved"):
        listen("no.such.host.invalid", 1)


def test_signals_do_nothing_inside_and_act_again_after() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ignoring_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
