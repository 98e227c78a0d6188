"""`python -m benchmarks.chaos`: see benchmarks/chaos/harness.py."""

import sys

from benchmarks.chaos.harness import main

sys.exit(main())
