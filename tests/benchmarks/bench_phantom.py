"""Measure how fast phantoms are drawn and written: `python tests/benchmarks/bench_phantom.py [workers]`."""

import os
import sys
import tempfile
import time
from pathlib import Path

from chestxray.data import phantom

IMAGES = {64: 1200, 256: 600, 1024: 24}


def main() -> None:
    """Print a table: images a second with all workers, and processor seconds an image in one process."""
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else len(os.sched_getaffinity(0))
    print(f"{'px':>5} {'images':>7} {'workers':>8} {'images/s':>9} {'CPU ms/image':>13}")
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_dataset(Path(folder) / "warm", 8 * workers, 64, 0, workers)
        for size, images in IMAGES.items():
            started = time.perf_counter()
            phantom.write_dataset(Path(folder) / str(size), images, size, 0, workers)
            rate = images / (time.perf_counter() - started)
            alone, few = time.process_time(), max(images // 20, 2)
            phantom.write_dataset(Path(folder) / f"{size}_alone", few, size, 1, 1)
            cost = (time.process_time() - alone) / few * 1000
            print(f"{size:>5} {images:>7} {workers:>8} {rate:>9.1f} {cost:>13.1f}")


if __name__ == "__main__":
    main()
