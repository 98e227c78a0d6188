"""A model that answers in a process of its own, for a parent that must stay small (the board).

    python -m rlhf.serving.worker '{"path": "runs/x/sft/model", "max_response_length": 256, ...}'

It writes one JSON object a line: {"ready": true}; then, for each line {"messages", "seed",
"greedy"} that it reads, {"piece": text} as the answer grows and {"done": true, "whole": whether it
ended by itself}, or {"error": message}. SIGINT cuts an answer short. It ends with its input.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from conf.schema import ModelConfig
from rlhf.types import UserError

Tell = Callable[[dict[str, Any]], None]


class Cut:
    """Whether SIGINT asked to end the answer that is being written."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def talker_of(options: dict[str, Any]) -> Any:
    """The model of options["path"]. options: max_prompt_length and max_response_length in tokens,
    temperature, top_p, chat_template. Raises UserError for a directory that can't talk.
    """
    from rlhf.models.encoding import require_template
    from rlhf.models.loading import load_causal_lm, load_tokenizer
    from rlhf.process import distributed
    from rlhf.serving.talkers import HFTalker
    from rollout.sampling import Sampling

    path = options["path"]
    model = ModelConfig(path=path)
    tokenizer = load_tokenizer(model, options.get("chat_template"))
    require_template(tokenizer, f"chat with {path}")
    longest = options["max_prompt_length"] + options["max_response_length"]
    sampling = Sampling(options["max_response_length"], options["temperature"], options["top_p"])
    held = load_causal_lm(model, tokenizer, native=True).to(distributed.device())
    return HFTalker(path, held, tokenizer, sampling, longest)


def answer(talker: Any, asked: dict[str, Any], cut: Cut, tell: Tell) -> None:
    """One answer, piece by piece."""
    cut.asked = False
    try:
        for piece in talker.stream(asked["messages"], asked["seed"], greedy=asked["greedy"]):
            if piece:
                tell({"piece": piece})
            if cut.asked:
                break
    except UserError as error:
        tell({"error": str(error)})
        return
    tell({"done": True, "whole": talker.finished and not cut.asked})


def main() -> int:
    """1 where the model can't be loaded."""
    from rlhf.process import distributed
    from rlhf.process.libraries import quiet_libraries

    # What libraries print goes to the log: standard output belongs to the parent.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    cut = Cut()
    quiet_libraries()
    distributed.set_threads(None)
    try:
        talker = talker_of(json.loads(sys.argv[1]))
    except (UserError, ValueError, OSError) as error:
        tell({"error": str(error)})
        return 1
    tell({"ready": True})
    for line in sys.stdin:
        answer(talker, json.loads(line), cut, tell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
