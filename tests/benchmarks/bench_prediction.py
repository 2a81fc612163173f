"""How fast answers come, as ratios of one run, with memory and the agreement of the engines.

Run it as `python -m tests.benchmarks.bench_prediction FOLDER`, with a folder of radiographs. It prints a table: start
to first answer, images a second against Keras's `predict` one image at a time, peak memory at 100 and 1,000 files, and
the largest difference of a probability between Keras and ONNX. Other work on the machine moves the times, so
each is the best of several; the ratios are what counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from chestxray.images import pixels
from chestxray.inference import engines, reader
from chestxray.inference.batch import predict_files

STARTS = 5
IMAGES = 96
REPEATS = 3
MANY = (100, 1000)
"""Files in the two runs whose peak memory is measured."""

_MEMORY = """
import resource, sys
from pathlib import Path
from chestxray.inference import reader
from chestxray.inference import batch
files = [Path(line) for line in Path(sys.argv[1]).read_text().splitlines()]
batch.predict_files(files, Path(sys.argv[2]), reader.load())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def start(files: list[Path], out: Path, *options: str) -> float:
    """Seconds of the command from start to end with one file, the best of some."""
    command = [sys.executable, "-m", "chestxray", "predict", str(files[0]), "--out", str(out), *options]
    taken = []
    for _ in range(STARTS if not options else 2):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return min(taken)


def peak(files: list[Path], folder: Path) -> int:
    """Peak memory of a process that answers for files, megabytes."""
    listed = folder / "files.txt"
    listed.write_text("\n".join(map(str, files)))
    command = [sys.executable, "-c", _MEMORY, str(listed), str(folder / "p.csv")]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) // 1024


def main(folder: Path) -> None:
    """Measure, and print the table."""
    files = sorted(folder.rglob("*.png"))
    some = (files * -(-IMAGES // len(files)))[:IMAGES]
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as place:
        out, empty = Path(place) / "p.csv", Path(place) / "cache"
        first = start(files, out)
        rows.append(("start to first answer, onnx, s", f"{first:.2f}"))
        os.environ[engines.CACHE_VARIABLE] = str(empty)
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "chestxray", "predict", str(files[0]), "--out", str(out)],
            check=True,
            capture_output=True,
        )
        rows.append(("the same, graph not yet made, s", f"{time.perf_counter() - began:.2f}"))
        slow = start(files, out, "--engine", "keras")
        rows.append(("start to first answer, keras, s", f"{slow:.2f} ({slow / first:.1f} × as long)"))
        many = files * -(-max(MANY) // len(files))
        peaks = ", ".join(str(peak(many[:number], Path(place))) for number in MANY)
        rows.append((f"peak memory at {' and '.join(f'{number:,}' for number in MANY)} files, MB", peaks))

        asked = reader.load()
        model = engines.load_keras(engines.reference_model())

        def one_by_one(files: list[Path]) -> None:
            for file in files[: IMAGES // 4]:
                square = pixels.prepare_pixels(pixels.decode(file), asked.engine.side)
                model.predict(square[None, ..., None].astype(np.float32), verbose=0)

        one_by_one(some[:8])
        # In turn, so that other work on the machine meets both alike.
        streams, singles = [], []
        for _ in range(REPEATS):
            began = time.perf_counter()
            predict_files(some, out, asked)
            streams.append(len(some) / (time.perf_counter() - began))
            began = time.perf_counter()
            one_by_one(some)
            singles.append(IMAGES // 4 / (time.perf_counter() - began))
        ratio = max(streams) / max(singles)
        rows.append(("images/s, chestxray predict", f"{max(streams):.1f}"))
        rows.append(("images/s, Keras predict one by one", f"{max(singles):.1f} (ratio {ratio:.1f})"))

        stack = np.stack([pixels.prepare_pixels(pixels.decode(file), asked.engine.side) for file in some[:64]])
        batch = stack[..., None].astype(np.float32)
        expected, found = model.predict_on_batch(batch), asked.engine.scores(stack)
        apart = max(np.abs(getattr(found, name) - values).max() for name, values in expected.items())
        rows.append(("largest difference, onnx and keras", f"{apart:.1e}"))
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
