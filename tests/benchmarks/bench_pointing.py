"""Pointing game: `python -m tests.benchmarks.bench_pointing MODEL.keras [--dataset nih_9k] [--split test]`.

It says first how many boxes lie in which split. What is chosen is chosen on validation's boxes; of ChestX-ray14, whose
boxes all lie in the official test list, nothing can be. Each reading of the test is a line in
`5_results/<dataset>/test_readings.txt`.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from chestxray.config import PROFILES, SPLITS, Paths, Study
from chestxray.data import nih_tables
from chestxray.data.manifest import raw_side, read_manifest
from chestxray.evaluation import localisation
from chestxray.files import digest, make_folder
from chestxray.inference import engines
from chestxray.plots import interval
from chestxray.training.samples import load_split

BATCH = 32


def main() -> None:
    """Print how often maps, the centre and the fixed points lie in a box, and both differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dataset", default="nih_9k")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    chosen = parser.parse_args()
    study = Study(Paths(chosen.dataset), PROFILES["cpu"], 2024)
    manifest, boxes = read_manifest(study.paths), nih_tables.read_boxes(study.paths.raw)
    entries = nih_tables.read_entries(study.paths.raw, study.paths.label_map, strict=False).table
    side = nih_tables.box_side(boxes, raw_side(study.paths))
    parts = {split: localisation.targets(boxes, manifest[manifest["split"] == split], side) for split in SPLITS}
    outside = entries[~entries["patient"].isin(manifest["patient"])]
    parts["other patients"] = localisation.targets(boxes, outside, side)
    counts = {name: part["finding"].value_counts() for name, part in parts.items()}
    print("Images and findings with boxes:", pd.DataFrame(counts).fillna(0).astype(int), "", sep="\n")
    found = parts[chosen.split]
    if found.empty:
        raise SystemExit(f"no box in {chosen.split}: nothing can be chosen by boxes of {chosen.dataset}")
    if chosen.split == "test":
        readings = make_folder(study.paths.results) / "test_readings.txt"
        with readings.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M} bench_pointing {digest(chosen.model)}\n")
        print(f"Reading {len(readings.read_text().splitlines())} of the test; it chooses nothing.")
    samples, engine = load_split(study, chosen.split, selected=False), engines.start(chosen.model)
    place = pd.Series(range(len(samples)), index=samples.table["image"])
    pixels, findings = samples.x[samples.rows[place[found["image"]]]][..., 0], list(found["finding"])
    points = [
        localisation.peak(heat)
        for at in range(0, len(found), BATCH)
        for heat in engine.heat_maps(pixels[at : at + BATCH], findings[at : at + BATCH])
    ]
    fixed = localisation.fixed_points(parts["train"], parts["other patients"])
    table = localisation.localisation(localisation.hits(points, found, fixed))
    shown = table.apply(interval, axis=1).unstack("metric", sort=False)
    print(fixed, shown.join(localisation.better(table).add_prefix("beats ")).to_string(), sep="\n\n")


if __name__ == "__main__":
    main()
