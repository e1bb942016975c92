"""The notebooks run, are short, and show the library as it is."""
import contextlib
import inspect
import io
import os
import re
import shutil
from pathlib import Path

import pytest

import brainsyn as bs
import notebook
import train_ddpm

ROOT = Path(bs.__file__).parent
BOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
by_name = pytest.mark.parametrize("book", BOOKS, ids=lambda path: path.stem)


def run_copy(folder, book, heads, monkeypatch, steps=None):
    """Run a copy of a notebook beside links to the library and to phantoms, which notebooks share
    where they lie side by side -> what it said; it must end well."""
    (folder / "notebooks/runs/phantoms").mkdir(parents=True)
    (folder / "notebooks/runs/phantoms/A").symlink_to(heads)
    for path in [*ROOT.glob("*.py"), *(ROOT / "notebooks").glob("*.md")]:
        (folder / ("notebooks" if path.suffix == ".md" else "") / path.name).symlink_to(path)
    shutil.copy(book, folder / "notebooks")
    if steps:
        monkeypatch.setenv("BRAINSYN_STEPS", str(steps))
    status, said, _ = notebook.run(folder / "notebooks" / book.name, seconds=900)
    assert status == 0, said
    return said


@by_name
def test_notebooks_run(tmp_path, many_phantoms, monkeypatch, book):
    """All cells, in a fresh process, with hardly any training."""
    run_copy(tmp_path, book, many_phantoms, monkeypatch, 6)


@pytest.mark.slow
@by_name
def test_notebooks_run_at_full_length(tmp_path, many_phantoms, monkeypatch, book):
    """As a reader runs them."""
    monkeypatch.delenv("BRAINSYN_STEPS", raising=False)
    run_copy(tmp_path, book, many_phantoms, monkeypatch)


@by_name
def test_source_shown_is_the_source_there_is(book):
    """What a notebook printed of the library when it was saved is what stands there today."""
    shown = 0
    for cell, source in notebook.code_cells(book)[0]:
        if source.startswith("bs.show(") or "inspect.getsource(" in source:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(source, {"bs": bs, "train_ddpm": train_ddpm, "inspect": inspect})
            kept = "".join("".join(its["text"]) for its in cell["outputs"] if its["output_type"]
                           == "stream")
            assert kept == printed.getvalue(), f"{book.name} is stale: python tests/notebook.py --save {book}"
            shown += 1
    assert shown, "every notebook shows some of the library"


@by_name
def test_notebooks_are_short_and_saved_after_a_whole_run(book):
    """Cells of 15 lines at most, without classes, magics or installs; all run once in order;
    pictures, under 500 kB."""
    cells, whole = notebook.code_cells(book)
    for number, (cell, source) in enumerate(cells, 1):
        lines = [line for line in source.splitlines() if line.strip()]
        assert len(lines) <= 15, f"{book.name}, code cell {number}: {len(lines)} lines"
        assert not re.search(r"^ *(class |[%!]|import pip)", source,
                             re.M), f"{book.name}, code cell {number}"
        assert max(map(len, lines)) <= 120, f"{book.name}, code cell {number}"
        assert cell["execution_count"] == number, f"{book.name}: not saved after a whole run"
    assert sum(output["output_type"] == "display_data" for cell, _ in cells
               for output in cell["outputs"]) >= 2
    assert book.stat().st_size <= 500_000
    last, first = ["".join(whole["cells"][at]["source"]) for at in (-1, 0)]
    assert last.count("\n1. **Predict, then run.**") == last.count(
        "\n2. **Change one line.**") == 1, book.name
    assert "\n3. **Swap in your own.**" in last and first.startswith(f"# {int(book.name[:2])} ")
    assert "Colab" in first and "git clone" in first and "install -r" in first


def test_all_notebooks_are_there():
    """One to nine, without a gap."""
    assert [int(book.name[:2]) for book in BOOKS] == list(range(1, len(BOOKS) + 1)) and len(
        BOOKS) >= 9
