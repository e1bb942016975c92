"""The shape of the code: sizes, imports, names, lines. These limits only go down."""
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import brainsyn as bs

ROOT = Path(bs.__file__).parent
SCRIPTS = ("train_ddpm", "train_seg", "sample")
# A module imports only from those before it.
ORDER = ("brainsyn", "devices", "files", "pictures", "nifti", "phantoms", "options", "slices",
         "checks", "metrics", "edits", "runs", "writing", "requests", "recipes", "judging",
         "label_training", "audit", "study", "desk", *SCRIPTS)
PATHS = {name: ROOT / (f"{name}.py" if name in ("brainsyn", *SCRIPTS) else f"kit/{name}.py")
         for name in ORDER}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items() if path.exists()}
# Lines of code: not blank, no comment, no docstring.
BOOK_CODE, BOOK_LINES, BOOK_WORDS = 650, 1300, 10_000
KIT_CODE, SCRIPT_LINES = 400, 300
ALL_CODE = 4608
COLUMNS = 100
PRONOUNS = set("""its who one both made ill theirs mine own it them they he she everyone nobody
                  somebody such ours whose""".split())


def documented(tree):
    """All nodes of a tree that may have a docstring."""
    return [node for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]


def code_lines(name):
    """How many lines of code a file has."""
    docstrings, code = set(), set()
    for node in documented(TREES[name]):
        if ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(PATHS[name].read_text()).readline):
        if token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def imported(tree):
    """Names of our own files that a tree imports at its top level, and how: [(file, statement)]."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            found += [(alias.name, ast.unparse(node)) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "kit":
            found += [(alias.name, ast.unparse(node)) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, ast.unparse(node)))
    return [(name, words) for name, words in found if name.split(".")[0] in (*ORDER, "kit")]


def bound_names(tree):
    """Names that functions, loops, assignments and arguments bind: {name: line}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = node.lineno
        elif isinstance(node, ast.arg):
            names[node.arg] = node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node.lineno
    return names


def fields(tree):
    """Names of attributes that are set, and of keyword arguments: {name: line}."""
    names = {node.attr: node.lineno for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return names | {node.arg: node.value.lineno for node in ast.walk(tree)
                    if isinstance(node, ast.keyword) and node.arg}


def test_the_list_of_files_is_whole():
    """A new module must take its place in the order."""
    there = {path.stem for path in (ROOT / "kit").glob("*.py")} - {"__init__"}
    assert there == set(ORDER) - {"brainsyn", *SCRIPTS}
    assert {path.stem for path in ROOT.glob("*.py")} == {"brainsyn", *SCRIPTS}


def test_the_book_is_read_in_two_hours():
    """Both models and all that trains and samples them, and no more."""
    text = PATHS["brainsyn"].read_text()
    size = code_lines("brainsyn"), len(text.splitlines()), len(text.split())
    limits = BOOK_CODE, BOOK_LINES, BOOK_WORDS
    assert all(n <= limit for n, limit in zip(size, limits)), f"{size} of {limits}"


@pytest.mark.parametrize("name", sorted(set(ORDER) - {"brainsyn", *SCRIPTS}))
def test_a_module_of_the_kit_is_one_topic(name):
    """What is longer is two."""
    assert code_lines(name) <= KIT_CODE


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_read_at_once(name):
    """All of its lines, those of its docstring too."""
    lines = len(PATHS[name].read_text().splitlines())
    assert lines <= SCRIPT_LINES, f"{lines} lines"


def test_all_code_together_does_not_grow():
    """The library and the scripts. What is added has to be taken away elsewhere."""
    sizes = {name: code_lines(name) for name in TREES}
    assert sum(sizes.values()) <= ALL_CODE, f"{sum(sizes.values())} lines of code: {sizes}"


@pytest.mark.parametrize("name", sorted(TREES))
def test_imports_go_one_way(name):
    """Read from the top of the list, nothing is used before it was read. The book imports nothing
    of ours, and nobody imports a script."""
    before = set(ORDER[:ORDER.index(name)]) - set(SCRIPTS)
    wrong = [words for module, words in imported(TREES[name]) if module not in before]
    assert not wrong


@pytest.mark.parametrize("name", sorted(TREES))
def test_calls_across_files_name_the_file(name):
    """`module.name(...)` says where a thing lives, and lets a test or a hand-in take its place."""
    froms = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom)]
    wrong = [ast.unparse(node) for node in froms
             if (node.module or "").split(".")[0] in ORDER or (node.module or "")[:4] == "kit."]
    assert not wrong


FILES = [path.relative_to(ROOT) for folder in (".", "kit", "tests", "tests/quality")
         for path in ROOT.glob(f"{folder}/*.py")]


@pytest.mark.parametrize("path", sorted(map(str, FILES)))
def test_lines_fit_a_page(path):
    """No line of code, comment or test has over 100 columns."""
    lines = enumerate((ROOT / path).read_text().splitlines(), 1)
    long = [number for number, line in lines if len(line) > COLUMNS]
    assert not long, f"lines {long} are longer than {COLUMNS} columns"


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_variable_hides_a_module(name):
    """A reader must be able to trust that `files.x` is in kit/files.py."""
    modules = {alias.asname or alias.name for node in ast.walk(TREES[name])
               if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    hidden = {bound: line for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)
              for bound, line in bound_names(node).items() if bound in modules}
    assert not hidden, f"{{name: line}} of what hides a module: {hidden}"


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_name_is_a_pronoun(name):
    """A name says what the thing is."""
    names = {**fields(TREES[name]), **bound_names(TREES[name])}
    pronouns = {bound: line for bound, line in names.items() if bound in PRONOUNS}
    assert not pronouns, f"{{name: line}}: {pronouns}"


@pytest.mark.parametrize("name", sorted(TREES))
def test_functions_and_classes_are_specified(name):
    """Every module, function, class and method says what it does: the docstrings are the exercise
    texts. Functions within functions, special methods and forward may be silent."""
    silent = [] if ast.get_docstring(TREES[name]) else [name]
    for parent in (TREES[name], *TREES[name].body):
        for node in parent.body if isinstance(parent, (ast.Module, ast.ClassDef)) else []:
            named = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "forward"
            if named and node.name[:2] != "__" and not ast.get_docstring(node):
                silent.append(node.name)
    assert not silent, f"no docstring: {silent}"


def prose(name):
    """The docstrings but the first, and the comments, of a file."""
    docstrings = [ast.get_docstring(node) or "" for node in documented(TREES[name])[1:]]
    tokens = tokenize.generate_tokens(io.StringIO(PATHS[name].read_text()).readline)
    return "\n".join([*docstrings, *(token.string for token in tokens
                                     if token.type == tokenize.COMMENT)])


def test_source_keys_used_are_the_keys_defined():
    """A reader must be able to look up every key in brackets, and none may be listed for show. The
    kit may also cite what the book lists."""
    listed = {name: set(re.findall(r"^    \[([A-Z+]+)\]", ast.get_docstring(TREES[name]), re.M))
              for name in TREES}
    defined = listed["brainsyn"]
    used = {name: set(re.findall(r"\[([A-Z][A-Z+]+)(?: eq[^\]]+)?\]", prose(name)))
            for name in TREES}
    assert used["brainsyn"] == defined, (f"only used: {used['brainsyn'] - defined}, only listed: "
                                         f"{defined - used['brainsyn']}")
    strangers = {name: keys - defined - listed[name] for name, keys in used.items()
                 if keys - defined - listed[name]}
    assert not strangers, strangers
    # what it is used for, who, when, where; its title
    entry = (r"^    \[[A-Z+]+\] +.+: .+ \d{4}, (arXiv \d{4}\.\d{5}|\S+\.\S+/\S+|.+ conference)\n"
             r" {14}\S.+$")
    assert len(re.findall(entry, bs.__doc__, re.M)) == len(defined)


def test_only_one_section_and_one_module_name_devices():
    """A new device is a change in one place: the book's section DEVICES, and kit/devices.py."""
    texts = {name: PATHS[name].read_text() for name in TREES if name != "devices"}
    sections = re.split(r"^# =+\n# +\d+ +", texts["brainsyn"].split('"""', 2)[2], flags=re.M)
    texts["brainsyn"] = "".join(part for part in sections if not part.startswith("DEVICES"))
    named = {name: re.findall(r"[\"'.](?:cuda|mps|xla)\b", text) for name, text in texts.items()}
    assert not any(named.values()), {name: words for name, words in named.items() if words}
