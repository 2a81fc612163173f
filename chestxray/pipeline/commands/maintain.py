"""Maintenance: the commands that write what is committed, `chestxray maintain …`."""

from __future__ import annotations

import argparse

from chestxray.config import PROFILES, REFERENCE, REPOSITORY, open_study
from chestxray.pipeline.commands.command import Commands, add_command, known, without_greetings


def add_commands(commands: Commands) -> None:
    """Add `maintain` with its own commands to the command line."""
    top = commands.add_parser("maintain", help="write what is committed: reference, README's table, notebooks' buttons")
    maintenance = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_command(maintenance, "stamp", run_stamp)
    publish = add_command(maintenance, "publish", run_publish)
    publish.add_argument("--dataset", required=True, metavar="DIR", help="the dataset of the run; not phantom")
    publish.add_argument("--profile", default="cpu", choices=PROFILES, help="the profile of the run (default: cpu)")
    add_command(maintenance, "demonstrate", run_demonstrate)


def run_stamp(chosen: argparse.Namespace) -> int:
    """Write the notebooks' buttons and set-up cells, the README's results table, model card and data sheet."""
    from chestxray import files
    from chestxray.pipeline import documents, notebooks

    for path in notebooks.find():
        before = notebooks.read(path)
        place = path.relative_to(REPOSITORY).as_posix()
        after = notebooks.normalise(notebooks.stamp(before, place), keep_stderr=True)
        if after != before:
            notebooks.write(path, after)
            print(f"stamped {place}")
    readme = REPOSITORY / "README.md"
    filled = {readme: documents.fill_results(readme.read_text("utf-8"))}
    filled |= {REFERENCE.parent / name: text for name, text in documents.render(REFERENCE).items()}
    for path, text in filled.items():
        if not path.exists() or path.read_text("utf-8") != text:
            files.atomic_write(path, text.encode())
            print(f"filled {path.relative_to(REPOSITORY).as_posix()}")
    return 0


def run_publish(chosen: argparse.Namespace) -> int:
    """Copy a finished run's numbers, figures and ensemble to 5_results/reference."""
    with without_greetings():
        from chestxray.pipeline import reference

    count, size, departure = reference.publish(open_study(known(chosen.dataset), chosen.profile, seed=0))
    print(
        f"5_results/reference: {count} files, the ensemble {size / 1e6:.1f} MB; its probabilities depart by at most "
        f"{departure:.1e} from those as trained"
    )
    return run_stamp(chosen)


def run_demonstrate(chosen: argparse.Namespace) -> int:
    """Execute the notebook for one's own radiographs with the committed reference, in place."""
    from chestxray.pipeline import notebooks, stages
    from chestxray.pipeline.execution import Execution

    for name in stages.BESIDE:
        execution = Execution(REPOSITORY / name, {})
        with without_greetings():
            execution.run()
        notebooks.write(REPOSITORY / name, notebooks.normalise(execution.notebook))
        print(f"refreshed {name}")
    return 0
