"""Measure stage 2.1's preparation of radiographs: `python tests/benchmarks/bench_preprocessing.py --images FOLDER`.

Two questions, a table each.

How fast? `preparation.store_images` on all cores, on radiographs of native size, beside (a) a plain loop in one process
(`Image.open`, `convert("L")`, `resize`, `save` with Pillow's defaults) and (b) decoding alone on all cores. The three
take turns, and what counts are the ratios within a turn, so that a machine that slows down slows all three. Asked:
at least 1.7 times (a), and at least 80 % of (b).

How does it grow? Peak memory and time (median of three) of a process that prepares 100, 1,000 and 10,000 images. These
are 300 phantoms of 64 px under many names (hard links), because only their number matters here.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import joblib
from PIL import Image

from chestxray import files
from chestxray.data import phantom, preparation, sources
from chestxray.images import pixels

SIZE = 128
COUNTS = (100, 1_000, 10_000)
DRAWN = 300
ALONE = "--prepare"


def seconds(work: Callable[[], object]) -> float:
    """How long a piece of work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plain_loop(paths: list[Path], folder: Path) -> None:
    """What one would write in five minutes."""
    for path in paths:
        with Image.open(path) as image:
            image.convert("L").resize((SIZE, SIZE)).save(folder / path.name)


def decode_alone(paths: list[Path], cores: int) -> None:
    """The part that nobody can leave out, on all cores in the same way."""
    batches = [paths[start : start + 4] for start in range(0, len(paths), 4)]
    jobs = (joblib.delayed(lambda batch: [pixels.decode(path) for path in batch])(batch) for batch in batches)
    joblib.Parallel(n_jobs=cores, prefer="threads")(jobs)


def compare(paths: list[Path], turns: int, cores: int) -> None:
    """Print how the three ways stand to each other."""
    named = {path.name: path for path in paths}
    with tempfile.TemporaryDirectory() as place:
        store, loop = Path(place, "store"), Path(place, "loop")
        ways: dict[str, Callable[[], object]] = {
            "store_images": lambda: preparation.store_images(named, store, SIZE, cores),
            "plain loop": lambda: plain_loop(paths, loop),
            "decode alone": lambda: decode_alone(paths, cores),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(turns + 1):  # the first warms the disk's cache and doesn't count
            order = list(ways)[turn % 3 :] + list(ways)[: turn % 3]
            for name in order:
                files.remove(store)
                files.remove(loop)
                files.make_folder(loop)
                spent = seconds(ways[name])
                if turn:
                    taken[name].append(spent)
    print(f"{len(paths)} radiographs, {cores} cores, {turns} turns\n")
    print(f"{'':<14} {'images/s':>9} {'range':>15}")
    for name, spent in taken.items():
        rates = sorted(len(paths) / one for one in spent)
        print(f"{name:<14} {statistics.median(rates):>9.1f} {rates[0]:>7.1f}–{rates[-1]:.1f}")
    print(f"\n{'store_images to':<16} {'ratio':>6} {'range':>12} {'asked':>6}")
    for name, asked in (("plain loop", 1.7), ("decode alone", 0.8)):
        ratios = sorted(other / own for own, other in zip(taken["store_images"], taken[name], strict=True))
        print(f"{name:<16} {statistics.median(ratios):>6.2f} {ratios[0]:>6.2f}–{ratios[-1]:.2f} {asked:>6.2f}")


def grow() -> None:
    """Print memory and time against the number of images, each in a process of its own."""
    print(f"\n{'images':>7} {'s':>7} {'s/1,000':>8} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as place:
        phantom.write_dataset(Path(place, "drawn"), DRAWN, 64, 0)
        drawn = list(sources.find_images(Path(place, "drawn")).values())
        for count in COUNTS:
            folder = files.make_folder(Path(place, str(count)))
            for number in range(count):
                files.link(drawn[number % DRAWN], folder / f"{number:08d}.png")
            command = [sys.executable, __file__, ALONE, str(folder)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")


def prepare_alone(folder: Path) -> None:
    """Prepare a folder and print one row of the table."""
    paths = {path.name: path for path in folder.iterdir()}
    store = folder.with_name(f"{folder.name} store")
    some = dict(list(paths.items())[:50])
    preparation.store_images(some, store, 32)  # what is loaded at the first image is no cost of an image
    taken = []
    for _ in range(3):
        files.remove(store)
        taken.append(seconds(lambda: preparation.store_images(paths, store, 32)))
    spent = statistics.median(taken)
    print(f"{len(paths):>7,} {spent:>7.2f} {spent / len(paths) * 1000:>8.2f} {peak():>8.1f}")


def peak() -> float:
    """Peak memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts what the parent had in `ru_maxrss`
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, default=os.environ.get("CHESTXRAY_NIH_NATIVE"), help="radiographs")
    parser.add_argument("--turns", type=int, default=7, help="how often each way is measured (default: 7)")
    parser.add_argument("--only", choices=("speed", "growth"), help="one of the tables")
    parser.add_argument(ALONE, type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.prepare:
        return prepare_alone(chosen.prepare)
    if chosen.only != "growth":
        if chosen.images is None:
            parser.error("give a folder of radiographs by --images or CHESTXRAY_NIH_NATIVE")
        found = sorted(path for path in Path(chosen.images).rglob("*") if path.suffix.lower() in sources.IMAGE_SUFFIXES)
        compare(found, chosen.turns, len(os.sched_getaffinity(0)))
    if chosen.only != "speed":
        grow()
    return None


if __name__ == "__main__":
    main()
