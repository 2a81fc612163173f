"""Set-up: what a notebook's first cell runs, by path, before the package can be imported."""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

if __name__ == "<run_path>":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's greetings would stand above the first output
    search = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(REPOSITORY) not in search:  # so that `!python -m chestxray` works in any folder
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), *search]))
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))

    from chestxray.pipeline import environment

    environment.prepare_kernel()
