"""The table of faults holds what the tests cause, and is held to what they see."""

from pathlib import Path

import faults
import pytest


def test_every_fault_of_the_table_is_caused_by_a_test_of_its_section():
    modules = {heading: Path(__file__).parent / f"{module}.py" for module, heading in faults.SECTIONS.items()}
    rows = faults.read()
    assert len(rows) > 50 and {row.section for row in rows} == set(modules)
    for row in rows:
        assert f'"{row.name}"' in modules[row.section].read_text("utf-8"), f"{row.name!r}: {faults.TABLE.name} is old"


def test_it_says_how_to_write_it_anew():
    text = faults.TABLE.read_text("utf-8")
    assert all(f"tests/{module}.py" in text for module in faults.SECTIONS)


def test_writing_and_reading_agree(tmp_path, monkeypatch):
    rows = [faults.Fault(heading, f"a | {number}", "said (b)", "x.png (3 B)") for number, heading in
            enumerate(faults.SECTIONS.values())]  # fmt: skip
    monkeypatch.setattr(faults, "SEEN", rows)
    monkeypatch.setattr(faults, "TABLE", tmp_path / "faults.md")
    faults.write(tmp_path / "faults.md")
    assert list(faults.read.__wrapped__()) == rows


def test_only_numbers_and_the_words_of_libraries_may_differ():
    assert faults.plain("1,234 bytes, broken (bad magic (0x1f)); fetch") == faults.plain("9 bytes, broken (no); fetch")
    assert faults.plain("broken (x); fetch") != faults.plain("broken (x); download")


def test_a_fault_that_reads_otherwise_is_noticed(tmp_path, monkeypatch):
    monkeypatch.delenv("CHESTXRAY_FAULTS", raising=False)
    monkeypatch.setattr(faults, "SEEN", [])
    row = next(row for row in faults.read() if row.section == "Datasets from Kaggle" and row.left == "nothing")
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/data/test_kaggle.py::test_x (call)")
    faults.note(row.name, row.said, tmp_path)
    for name, said in ((row.name, "other words"), ("another fault", row.said)):
        with pytest.raises(AssertionError, match="write it anew"):
            faults.note(name, said, tmp_path)
    (tmp_path / "left.png").write_bytes(b"")
    with pytest.raises(AssertionError, match="out of date"):
        faults.note(row.name, row.said, tmp_path)
