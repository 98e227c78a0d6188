#!/usr/bin/env bash
# PPO and GRPO on one CUDA device, in at most ten minutes; ends with a JSON and a table.
#   benchmarks/gpu.sh                   on the device (exit code 1 where a part failed)
#   benchmarks/gpu.sh --only grpo-135m  the trials whose names hold it
#   TINY=1 benchmarks/gpu.sh            tiny models, on the CPU where there is no device
#   INSTALL=1 benchmarks/gpu.sh         first makes .venv-cuda as docs/installing.md says
# PYTHON: the interpreter of an environment that has the toolkit's packages; by default that of
# .venv-cuda or .venv here, else python3. Nothing is installed without INSTALL=1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${INSTALL:-0}" = 1 ] && [ ! -x .venv-cuda/bin/python ]; then
    python3.11 -m venv .venv-cuda
    .venv-cuda/bin/python -m pip install -q -e ".[cuda]"
fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    for environment in .venv .venv-cuda; do
        if [ -x "$environment/bin/python" ]; then PYTHON=$environment/bin/python; fi
    done
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m benchmarks.gpu "$@"
