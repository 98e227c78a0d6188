"""Every causal family of transformers as a tiny random model, tried, and written as the table of
docs/models.md. Takes about half an hour of one core; what is known already (build/families.json) is
not tried again.

    python -m benchmarks.families [--only FAMILY ...] [--table] [--again]
"""

import argparse
import json
import logging
import os
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks.families import table
from rlhf.process.libraries import first_line

RESULTS = Path("build/families.json")
PAGE = Path("docs/models.md")
_SECONDS = 120  # a family's


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=None, help="these families")
    parser.add_argument("--table", action="store_true", help="write the page, try nothing")
    parser.add_argument("--again", action="store_true", help="forget what is known")
    arguments = parser.parse_args()
    known: dict[str, Any] = {}
    if RESULTS.is_file() and not arguments.again:
        known = json.loads(RESULTS.read_text(encoding="utf-8"))
    if not arguments.table:
        _sweep(known, arguments.only)
    PAGE.write_text(table.page(known), encoding="utf-8")


def _sweep(known: dict[str, Any], only: list[str] | None) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import peft  # noqa: F401  imported once, before the children
    import torch

    from benchmarks.families.build import causal_families
    from rollout.vllm_private import engine_environment

    with engine_environment():
        from vllm import LLM  # noqa: F401

    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    for family in only or causal_families():
        if family in known and only is None:
            continue
        known[family] = _in_a_child(family)
        print(family, {name: result["end"] for name, result in known[family].items()}, flush=True)
        RESULTS.write_text(json.dumps(known, indent=1), encoding="utf-8")


def _in_a_child(family: str) -> dict[str, Any]:
    """The results of a family, tried in a process of its own, which a crash ends alone."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        child = os.fork()
        if child == 0:
            signal.alarm(_SECONDS)
            _try(family, Path(folder), results)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        out: dict[str, Any] = {}
        if results.is_file():
            out = json.loads(results.read_text(encoding="utf-8"))
    if status:
        out["died"] = {"end": "crashed", "why": f"the process ended with status {status}"}
    return out


def _try(family: str, folder: Path, results: Path) -> None:
    from benchmarks.families import tries
    from benchmarks.families.build import FOR_VLLM, tiny

    done: dict[str, Any] = {}

    def keep(name: str, result: Any) -> None:
        done[name] = result
        results.write_text(json.dumps(done), encoding="utf-8")

    try:
        tiny(family)
    except Exception as error:  # noqa: BLE001  the table says which
        keep(
            "build",
            {"end": "not built", "why": f"{type(error).__name__}: {first_line(error)}"[:200]},
        )
        return
    keep("policy", tries.outcome(lambda: tries.policy_gap(tiny(family))))
    keep("packed", tries.outcome(lambda: tries.packed_gap(tiny(family))))
    keep("reward", tries.outcome(lambda: tries.reward_gap(tiny(family), folder / "reward")))
    keep("LoRA", tries.outcome(lambda: tries.adapter_gap(tiny(family), folder / "lora")))
    if done["policy"]["end"] == tries.RIGHT:
        wide = tiny(family, FOR_VLLM)
        keep("vLLM", tries.outcome(lambda: tries.vllm_gap(wide, folder / "vllm")))


if __name__ == "__main__":
    main()
