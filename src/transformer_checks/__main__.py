"""`python -m transformer_checks FILE[:NAME]`: the same as `pytest --model FILE[:NAME]`, supervised.

The checks run in a process of their own, whose verdicts are read as they are written: a model that crashes the
interpreter, hangs or ends the process is reported with the check that it did so in, and is never green.
"""

import sys

if sys.path and sys.path[0] in ("", __import__("os").getcwd()):  # the working directory may have a timeit.py of its own
    sys.path.pop(0)

from .checks.run.supervisor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
