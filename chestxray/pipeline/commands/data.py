"""Commands for datasets: plan, verify, pack, unpack."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chestxray.config import NIH_9K, PROFILES, Paths, StudyError, dataset_name, source_folder
from chestxray.pipeline.commands.command import Commands, add_command, check_seed


def add_commands(commands: Commands) -> None:
    """Add the commands for datasets to the command line."""
    plan = add_command(commands, "plan", run_plan)
    file = {"type": Path, "metavar": "FILE"}
    plan.add_argument("--metadata", required=True, help="the image table, Data_Entry_2017*", **file)
    plan.add_argument("--train-val", help="default: train_val_list.txt beside the table, if there", **file)
    plan.add_argument("--test", help="default: test_list.txt beside the table, if there", **file)
    plan.add_argument("--out", default=Path("manifest.csv"), help="the table to write (default: %(default)s)", **file)
    most = "at most this many No_finding images are selected (default: %(default)s, as in the gpu profile)"
    plan.add_argument("--no-finding", type=int, default=PROFILES["gpu"].no_finding, metavar="N", help=most)
    share = "share of train_val held out for validation, 0 to 1 (default: %(default)s, as in the gpu profile)"
    plan.add_argument("--valid-share", type=float, default=PROFILES["gpu"].valid_share, metavar="S", help=share)
    plan.add_argument("--seed", type=int, default=2024, help="seeds every random choice (default: %(default)s)")
    verify = add_command(commands, "verify", run_verify, root=True)
    verify.add_argument("dataset", metavar="DATASET|DIR", help="a dataset, or a folder in the NIH layout")
    which = "decode a random sample, or every image"
    verify.add_argument("--verify", choices=("sample", "full"), default="sample", help=which)
    verify.add_argument("--report", help="write all that is wrong to a CSV table", **file)
    for command in (plan, verify):
        command.add_argument("--labels", help="a table of two columns that maps own labels to the study's", **file)
    pack = add_command(commands, "pack", run_pack, root=True)
    pack.add_argument("dataset", metavar="DATASET", help="a dataset that stage 2.1 has prepared")
    pack.add_argument("--out", type=Path, metavar="FILE", help="the archive (default: 1_Datasets/DATASET.tar)")
    unpack = add_command(commands, "unpack", run_unpack, root=True)
    unpack.add_argument("archive", type=Path, metavar="FILE", help="an archive that pack wrote")


def run_plan(chosen: argparse.Namespace) -> int:
    """Show who would be in train, validation and test; needs no images.

    Split and select a table's images as stage 2.1 does, by the lists beside it if there are any; show the counts, and
    write the manifest.
    """
    check_seed(chosen.seed)
    if (chosen.train_val is None) != (chosen.test is None):
        raise StudyError(
            "--train-val and --test: only one of them is given; give both, or neither to take those beside the table"
        )
    if not 0 <= chosen.valid_share < 1:
        raise StudyError(f"--valid-share {chosen.valid_share}: give a number from 0 to below 1")
    if chosen.no_finding < 0:
        raise StudyError(f"--no-finding {chosen.no_finding}: give 0 or more")
    if not chosen.metadata.is_file():
        what = "is a folder" if chosen.metadata.is_dir() else "no such file"
        raise StudyError(f"{chosen.metadata}: {what}; give the image table, such as Data_Entry_2017_v2020.csv")
    if chosen.out.is_dir():
        raise StudyError(f"{chosen.out}: is a folder; --out takes the name of a file")
    from chestxray import files
    from chestxray.data import nih_tables, own_tables, splits
    from chestxray.pipeline import documents

    folder, names = chosen.metadata.parent, (*nih_tables.LIST_NAMES, nih_tables.VALID_NAME)
    beside = [own_tables.in_any_case(folder, name) for name in (*names, nih_tables.BOXES_NAME)]
    files.keep_apart(chosen.out, [chosen.metadata, chosen.train_val, chosen.test, chosen.labels, *beside])
    entries = nih_tables.read_entries(chosen.metadata, chosen.labels)
    if chosen.test:
        lists = nih_tables.read_lists_for(entries, chosen.train_val, chosen.test)
    else:
        own_tables.refuse_links_to_nothing(folder)
        lists = nih_tables.read_lists(folder, entries)
    planned = splits.plan(entries.table, lists, chosen.valid_share, chosen.no_finding, chosen.seed)
    files.atomic_write(chosen.out, planned.to_csv(index=False, lineterminator="\n").encode())
    print(*splits.describe(entries, planned, lists), sep="\n")
    if lists and not chosen.test:
        print(f"Taken from beside the table: {', '.join(path.name for path in beside[: len(lists)])}")
    for title, table in splits.tables(planned).items():
        cells = table.map(lambda value: value if isinstance(value, str) else f"{value:,}").values.tolist()
        print(f"\n{title}")
        documents.print_rows([list(table.columns), *cells])
    print(f"\n{chosen.out}: {len(planned):,} rows")
    return 0


def run_verify(chosen: argparse.Namespace) -> int:
    """Check a dataset: all there, nothing broken.

    Compare the raw images with their table, and name each that is missing or broken.
    """
    from chestxray import files
    from chestxray.data import integrity, kaggle, own_tables

    raw, whole, labels, paths = source_folder(chosen.dataset), None, chosen.labels, Paths(dataset_name(chosen.dataset))
    if raw is None:
        raw, whole, labels = paths.raw, kaggle.DATASETS.get(chosen.dataset), labels or paths.label_map
        if not raw.exists():
            raise StudyError(
                f"dataset {chosen.dataset!r}: no such folder, and none of this name under 1_Datasets; give a folder, "
                "or run stage 1 of a dataset first"
            )
    if chosen.report:
        files.keep_apart(chosen.report, [raw, labels], "--report")
    report = integrity.verify(raw, whole, chosen.verify == "full", reference=paths.dataset == NIH_9K, labels=labels)
    print(*report.lines(), sep="\n")
    if chosen.report:
        table = own_tables.rejections_frame(report.faults)
        files.atomic_write(chosen.report, table.to_csv(index=False, lineterminator="\n").encode())
        print(f"{chosen.report}: {len(table):,} lines")
    return 1 if report.faults else 0


def run_pack(chosen: argparse.Namespace) -> int:
    """Pack a prepared dataset into one file.

    Write what stages 2.2 to 5 need of a prepared dataset to one archive, with checksums.
    """
    from chestxray import files
    from chestxray.data import archive

    paths = Paths(dataset_name(chosen.dataset))
    packed = archive.pack(paths, chosen.out)
    print(f"{files.shown(packed)}: {files.gigabytes(packed.stat().st_size)}, {_contents(archive.summary(paths))}")
    print(f"SHA-256 {files.digest(packed)}")
    return 0


def run_unpack(chosen: argparse.Namespace) -> int:
    """Unpack it on another machine.

    Check an archive and unpack it into 1_Datasets. Goes on where an earlier call was stopped.
    """
    from chestxray import files
    from chestxray.data import archive

    paths, kept = archive.unpack(chosen.archive)
    done = archive.summary(paths)
    print(f"{files.shown(paths.data)}: {_contents(done)}" + (f"; {kept:,} files were there already" if kept else ""))
    fitting = [name for name, profile in PROFILES.items() if profile.image_size == done.image_size]
    size = f"--profile {fitting[0]}" if fitting else f"--set image_size={done.image_size}"
    print(f"Go on with: chestxray run --dataset {paths.dataset} {size}")
    return 0


def _contents(done: Any) -> str:
    """What a dataset holds, in words; `done` is an `archive.Summary`."""
    augmented = f"{done.augmented:,} augmented files" if done.augmented else "no augmented files (run stage 2.2)"
    return f"{done.images:,} radiographs of {done.image_size} px, {augmented}, data fingerprint {done.fingerprint}"
