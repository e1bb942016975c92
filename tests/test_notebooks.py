"""The notebooks run, are short, show the library as it is, and give no answers away before an
assignment."""
import ast
import contextlib
import io
import json
import re
import shutil
import types

import pytest

import blank
import notebook

ROOT = blank.ROOT
BOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
by_name = pytest.mark.parametrize("book", BOOKS, ids=lambda path: path.stem)


@pytest.mark.programs
@by_name
def test_notebooks_run(many_phantoms, tmp_path, monkeypatch, book):
    """All cells, in a fresh process, with hardly any training, in a copy beside links to the
    library and to phantoms, which notebooks share where they lie side by side."""
    folder = tmp_path
    (folder / "notebooks/runs/phantoms").mkdir(parents=True)
    (folder / "notebooks/runs/phantoms/A").symlink_to(many_phantoms)
    for path in [*ROOT.glob("*.py"), ROOT / "kit"]:
        (folder / path.name).symlink_to(path)
    for path in (ROOT / "notebooks").glob("*.md"):
        (folder / "notebooks" / path.name).symlink_to(path)
    shutil.copy(book, folder / "notebooks")
    monkeypatch.setenv("BRAINSYN_STEPS", "6")
    status, said, _ = notebook.run(folder / "notebooks" / book.name, seconds=900)
    assert status == 0, said


def imported(book):
    """The names that a notebook's import statements bring."""
    names = {}
    for _, source in notebook.code_cells(book)[0]:
        statements = [node for node in ast.walk(ast.parse(source))
                      if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in statements:
            with contextlib.suppress(ModuleNotFoundError):      # ipywidgets may be missing
                exec(ast.unparse(node), names)
    return names


def printed_by(source, names):
    """What a cell, or an expression of it, prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(source, names)
    return printed.getvalue()


@by_name
def test_source_shown_is_the_source_there_is(book):
    """What a notebook printed of the library when it was saved is what stands there today."""
    names, shown = imported(book), 0
    for cell, source in notebook.code_cells(book)[0]:
        kept = "".join("".join(output["text"]) for output in cell["outputs"]
                       if output["output_type"] == "stream")
        showing = re.findall(r"^pictures\.show\(.*\)$", source, re.M)
        if "inspect.getsource(" in source:
            showing.append(source)
        for statement in showing:
            assert printed_by(statement, names) in kept, (
                f"{book.name} shows source that has changed: "
                f"python tests/notebook.py --save notebooks/{book.name}")
        shown += len(showing)
    assert shown, "every notebook shows some of the library"


@by_name
def test_names_of_the_library_are_there(book):
    """What cells call, and what text and exercises tell to call, exists; and no cell gives a
    module's name to something else."""
    names = imported(book)
    modules = {name for name, value in names.items() if isinstance(value, types.ModuleType)
               and getattr(value, "__file__", "").startswith(str(ROOT))}
    for number, cell in enumerate(json.loads(book.read_text())["cells"]):
        text = "".join(cell["source"])
        pattern = rf"(?<![\w./])({'|'.join(modules)})\.(?!py\b)([A-Za-z]\w*)"
        for module, name in re.findall(pattern, text):
            assert hasattr(names[module], name) or re.search(rf"\b{module}\.{name} = ", text), (
                f"{book.name}, cell {number}: {module}.{name} does not exist")
        if cell["cell_type"] == "code":
            bound = {node.id for node in ast.walk(ast.parse(text))
                     if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            assert not bound & modules, f"{book.name}, cell {number}: {bound & modules} is a module"


@by_name
def test_notebooks_are_short_and_saved_after_a_whole_run(book):
    """Cells of 15 lines at most, without classes, magics or installs; all run once in order;
    pictures, under 500 kB."""
    cells, whole = notebook.code_cells(book)
    for number, (cell, source) in enumerate(cells, 1):
        place = f"{book.name}, code cell {number}"
        lines = [line for line in source.splitlines() if line.strip()]
        assert len(lines) <= 15, f"{place}: {len(lines)} lines"
        assert not re.search(r"^ *(class |[%!]|import pip)", source, re.M), place
        assert max(map(len, lines)) <= 120, place
        assert cell["execution_count"] == number, f"{book.name}: not saved after a whole run"
    outputs = [output for cell, _ in cells for output in cell["outputs"]]
    assert sum(output["output_type"] == "display_data" for output in outputs) >= 2
    assert book.stat().st_size <= 500_000
    last, first = ["".join(whole["cells"][at]["source"]) for at in (-1, 0)]
    for exercise in ("1. **Predict, then run.**", "2. **Change one line.**",
                     "3. **Swap in your own.**"):
        assert last.count(f"\n{exercise}") == 1, f"{book.name}: {exercise}"
    assert first.startswith(f"# {int(book.name[:2])} ")
    assert "Colab" in first and "git clone" in first and "install -r" in first


def test_all_notebooks_are_there():
    """One to nine, without a gap."""
    numbers = [int(book.name[:2]) for book in BOOKS]
    assert numbers == list(range(1, len(BOOKS) + 1)) and len(BOOKS) >= 9


def numbers_in(text):
    """"1-3" or "4, 5" -> the notebooks with these numbers."""
    books = []
    for part in text.split(","):
        ends = [int(end) for end in part.split("-")]
        books += BOOKS[ends[0] - 1:ends[-1]]
    return books


def course():
    """The table of TEACHING.md: [(assignment, books before, what it says of functions, books
    after)]."""
    text = (ROOT / "notebooks/TEACHING.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in text.splitlines()
            if re.match(r"\| a\d ", line)]
    return [(name[:2], numbers_in(before), functions, numbers_in(after))
            for name, before, functions, after, *_ in rows]


def answers_in(book, assignment):
    """The exercises of an assignment whose definition stands in a notebook, in a cell or in what it
    printed."""
    cells = json.loads(book.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = ["".join(part) for part in [cell["source"] for cell in cells]
             + [output.get("text", "") for output in outputs]]
    return [name for name in blank.ASSIGNMENTS[assignment] if any(
        re.search(rf"^\s*(def|class) ({name.replace('.', '|')})\b", text, re.M) for text in texts)]


def test_notebooks_before_an_assignment_hold_none_of_its_answers():
    """The course's table has every assignment, and names its functions. A notebook that shows
    answers comes after, and says so."""
    assert [row[0] for row in course()] == list(blank.ASSIGNMENTS)
    for assignment, before, functions, after in course():
        assert re.findall(r"`(.*?)`", functions) == blank.ASSIGNMENTS[assignment]
        for book in before:
            assert not answers_in(book, assignment), f"{book.name} gives away {assignment}"
        assert answers_in(after[0], assignment), f"{after[0].name} shows none: why is it after?"
        for book in after:
            first = "".join(json.loads(book.read_text())["cells"][0]["source"])
            assert f"after assignment {assignment}" in first, book.name
