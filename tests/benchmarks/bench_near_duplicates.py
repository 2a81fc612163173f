"""Measure how near-duplicates differ from chests that look alike: `python tests/benchmarks/bench_near_duplicates.py`.

`--dataset NAME` names a dataset that stage 2.1 has prepared. Three tables. The distance of hashes of all pairs of
different patients, of all pairs of one patient (true re-takes, days or years apart), and of 400 radiographs and altered
copies of them. The likeness of the pixels of all pairs within the distance that the check looks at, and of the copies.
And what the check costs: per image and pair here, and the search among 112,120 random hashes, the size of the whole
set, with the largest memory that took.
"""

from __future__ import annotations

import argparse
import io
import resource
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
from PIL import Image

from chestxray.config import open_study
from chestxray.data import near_duplicates
from chestxray.data.manifest import read_manifest, store_path
from chestxray.images.pixels import decode

WHOLE_SET = 112_120
COPIES = 400
LIMITS = (20, 30, 40, 50, 60, 80)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """The image after JPEG compression."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def moved(pixels: np.ndarray, right: int, down: int) -> np.ndarray:
    """The image moved, black where nothing was."""
    return np.asarray(Image.fromarray(pixels).transform(pixels.shape[::-1], Image.AFFINE, (1, 0, -right, 0, 1, -down)))


def halved(pixels: np.ndarray) -> np.ndarray:
    """The image at half the size and back."""
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((image.width // 2, image.height // 2), Image.BOX).resize(image.size, Image.BILINEAR))


ALTERED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "JPEG, quality 75": lambda pixels: jpeg(pixels, 75),
    "JPEG, quality 50": lambda pixels: jpeg(pixels, 50),
    "15 % brighter": lambda pixels: np.clip(pixels * 1.15, 0, 255).astype(np.uint8),
    "15 % darker": lambda pixels: (pixels * 0.85).astype(np.uint8),
    "gamma 1.2": lambda pixels: (255 * (pixels / 255) ** 1.2).astype(np.uint8),
    "half the size": halved,
    "moved by 1 px": lambda pixels: moved(pixels, 1, 1),
    "moved by 2 px": lambda pixels: moved(pixels, 2, 0),
    "moved by 2, 2 px": lambda pixels: moved(pixels, 2, -2),
}


def all_distances(hashes: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many pairs have each distance: of different patients, and of one."""
    bits = hashes.shape[1]
    signs = np.where(hashes, np.float32(1), np.float32(-1))
    counts = np.zeros((2, bits + 1), np.int64)
    for top in range(0, len(signs), 2000):
        distance = ((bits - signs[top : top + 2000] @ signs.T) / 2).astype(np.int64)
        later = np.arange(len(signs)) > np.arange(top, top + len(distance))[:, None]
        same = patients[top : top + 2000, None] == patients
        for row, group in enumerate((~same, same)):
            counts[row] += np.bincount(distance[later & group], minlength=bits + 1)
    return counts[0], counts[1]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="phantom")
    study = open_study(parser.parse_args().dataset, "cpu", 2024)
    manifest = read_manifest(study.paths)
    paths = [store_path(study.paths.store, image) for image in manifest["image"]]
    patients = pd.factorize(manifest["patient"])[0]
    started, cpu = time.perf_counter(), time.process_time()
    hashes = near_duplicates.perceptual_hashes(paths)
    spent = time.process_time() - cpu
    print(
        f"{len(paths):,} images hashed in {time.perf_counter() - started:.1f} s, {1e3 * spent / len(paths):.2f} ms of"
    )
    print("processor an image")

    different, same = (counts.cumsum() for counts in all_distances(hashes, patients))
    chosen = np.random.default_rng(0).choice(len(paths), min(COPIES, len(paths)), replace=False)
    originals = [decode(paths[place]) for place in chosen]
    rows = {
        f"different patients, {different[-1]:,} pairs": [different[limit] for limit in LIMITS],
        f"one patient, {same[-1]:,} pairs": [same[limit] for limit in LIMITS],
    }
    like = {}
    for name, alter in ALTERED.items():
        copies = [np.ascontiguousarray(alter(pixels)) for pixels in originals]
        off = np.array(
            [
                (near_duplicates.perceptual_hash(copy) != hashes[place]).sum()
                for copy, place in zip(copies, chosen, strict=True)
            ]
        )
        rows[f"{name}, {len(off)} copies"] = [(off <= limit).sum() for limit in LIMITS]
        details = [
            (near_duplicates.detail(a), near_duplicates.detail(b)) for a, b in zip(originals, copies, strict=True)
        ]
        like[name] = [near_duplicates.likeness(*pair) for pair in details]
    print("\nPairs within so many bits of 256")
    print(pd.DataFrame(rows, index=LIMITS).T.to_string())

    spent = compared = 0
    for name, owners, wanted in (
        ("different patients within 60 bits", patients, None),
        ("one patient within 60 bits", np.arange(len(patients)), patients),
    ):
        pairs = near_duplicates.close_pairs(hashes, owners)
        if wanted is not None:
            pairs = pairs[wanted[pairs["first"]] == wanted[pairs["second"]]]
        cpu = time.process_time()
        like[f"{name}: {len(pairs):,}"] = [
            near_duplicates.likeness(
                *(near_duplicates.detail(decode(paths[place])) for place in (pair.first, pair.second))
            )
            for pair in pairs.itertuples()
        ]
        spent, compared = spent + time.process_time() - cpu, compared + len(pairs)
    print(f"\nLikeness ({1e3 * spent / max(compared, 1):.2f} ms of processor a pair, both decoded)")
    table = {name: np.percentile(values, [0, 1, 5, 50, 95, 99, 100]) for name, values in like.items() if values}
    print(pd.DataFrame(table, index=["least", "1 %", "5 %", "50 %", "95 %", "99 %", "most"]).T.round(3).to_string())

    random = np.random.default_rng(0).random((WHOLE_SET, hashes.shape[1])) < 0.5
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    total = len(near_duplicates.close_pairs(random, np.arange(WHOLE_SET)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\n{WHOLE_SET:,} random hashes searched in {time.perf_counter() - started:.0f} s,")
    print(f"{time.process_time() - cpu:.0f} s of processor, {total} pairs; peak memory {after / 1024:,.0f} MB,")
    print(f"{(after - before) / 1024:,.0f} MB more than before")


if __name__ == "__main__":
    main()
