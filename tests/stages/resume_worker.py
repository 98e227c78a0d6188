"""Run by tests/stages/test_resume.py in a process of its own, under torchrun for several ranks:
command lines of ``python -m rlhf``, one after another.

argument: a JSON list of lists of options. The exit code is that of the first command that fails.
"""

import json
import sys

from rlhf.__main__ import main
from tests import drawing

if __name__ == "__main__":
    drawing.off()
    for options in json.loads(sys.argv[1]):
        code = main(options)
        if code:
            sys.exit(code)
