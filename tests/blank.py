"""Assignments, made from the library: the functions a student shall write, without their bodies.

    python tests/blank.py a1 --out student.py                       the same for everybody
    python tests/blank.py a1 --student 1234567 --out 1234567.py     with an exercise that differs
                                                                    by student number
    pytest --impl=student.py -m a1                                  how far along it is

A hand-in is that file, filled in, or one that holds some of its functions alone. hand_ins.py puts
its functions in the place of the library's; test_the_tests.py does so with wrong answers.
"""
from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Per assignment: what is blank, functions or methods. A test that marks them carries the name of
# the assignment as a pytest marker.
ASSIGNMENTS = {
    "a1": ["cosine_alpha_bar", "signal_sigma", "add_noise", "v_target", "split_v", "prior_error",
           "precondition"],
    "a2": ["one_hot", "sinusoid", "ResBlock.forward", "Attention.forward", "orthogonal",
           "EMA.advanced"],
    "a3": ["timesteps", "ddpm_step", "ddim_step", "dpmpp_step", "sample", "guided_v"],
    "a4": ["regions_of", "labels_of", "dice_loss", "dice", "sensitivity", "surface", "hd95",
           "components", "lesion_dice"],
    "a5": ["mean_head", "robust", "membership", "nearer_share"],
}
# Exercises of a1 that the library does not have: they differ by student number.
VARIANTS = ["your_target", "split_your_target"]
VARIANT_TEXT = '''

def your_target(x0, eps, signal, sigma):
    """Another target than v, your own: y = cos(theta + phi) eps - sin(theta + phi) x0, where
    signal = cos(theta), sigma = sin(theta) and phi = {phi:.6f}. With phi = 0 it were v.
    x0, eps (B, C, H, W); signal, sigma (B, 1, 1, 1)."""
    raise NotImplementedError("a1: your_target")


def split_your_target(x_t, y, signal, sigma):
    """x_t = signal x0 + sigma eps and y = your_target(x0, eps, signal, sigma) -> (x0, eps), at
    every noise level, the two ends included: two equations, two unknowns. (What is the
    determinant?)"""
    raise NotImplementedError("a1: split_your_target")
'''
HEAD = '''"""Assignment {assignment}: write the functions below.

Each docstring says all that is needed: what goes in, what comes out, the equation, its source.
How far along you are, in the folder of brainsyn:

    pytest --impl={file} -m {assignment}{student}

A test runs one of your functions at a time; all else is the library's. Imported below is what
the library's own versions use. Import more where you like.
"""
from __future__ import annotations

'''


def variant_angle(student):
    """phi of a student's own target, 0.2 to 1 radian, from the student number (a string) alone."""
    digest = hashlib.sha256(student.encode()).digest()
    return 0.2 + 0.8 * int.from_bytes(digest[:4], "big") / 2 ** 32


def home(name):
    """The file of the library that defines an exercise, "function" or "Class.method"."""
    definition = re.compile(rf"^(def|class) {name.split('.')[0]}\b", re.M)
    for path in [ROOT / "brainsyn.py", *sorted((ROOT / "kit").glob("*.py"))]:
        if definition.search(path.read_text(encoding="utf-8")):
            return path
    raise SystemExit(f"neither brainsyn.py nor kit has {name}")


def module_of(name):
    """The module in which an exercise stands, and where the hand-in's version is put in its
    place."""
    path = ROOT / "brainsyn.py" if name in VARIANTS else home(name)
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def find(tree, name):
    """The definition of "function" or "Class.method" in a module's syntax tree."""
    for part in name.split("."):
        tree, = [node for node in tree.body if getattr(node, "name", None) == part]
    return tree


def blank_function(assignment, name):
    """The library's text of an exercise with a raise in the place of its body; a method comes with
    its class."""
    source = home(name).read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    whole, function = find(tree, name.split(".")[0]), find(tree, name)
    if not ast.get_docstring(whole):
        raise SystemExit(f"{name} has no docstring: nobody could write it again")
    first_line = min(node.lineno for node in [whole, *whole.decorator_list]) - 1
    start = function.body[0]                    # the docstring, or the first statement
    kept = start.end_lineno if ast.get_docstring(function) else start.lineno - 1
    indent = " " * start.col_offset
    return "\n".join([*lines[first_line:kept],
                      f'{indent}raise NotImplementedError("{assignment}: {name}")',
                      *lines[function.end_lineno:whole.end_lineno]])


def import_statements(path):
    """{name: statement that imports it} for all that a module of the library imports or defines."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    statements = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            statements[node.name] = f"from {module} import {node.name}"
            changed = [name for part in ast.walk(node) if isinstance(part, ast.Global)
                       for name in part.names]  # such as REGIONS, which use_names sets
            statements |= {name: f"from {module} import {name}" for name in changed}
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                statements[ast.unparse(target)] = f"from {module} import {ast.unparse(target)}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                statements[alias.asname or alias.name] = ast.unparse(ast.Import([alias]))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                statement = ast.unparse(ast.ImportFrom(node.module, [alias], node.level))
                statements[alias.asname or alias.name] = statement
    return statements


def imports_of(assignment):
    """Lines that import what the library's versions of an assignment's exercises use: first of the
    standard library, then of other packages, then of brainsyn."""
    outer = {name.split(".")[0] for name in ASSIGNMENTS[assignment]}
    groups = {"standard": set(), "other": set(), "ours": set()}
    for name in outer:
        path = home(name)
        statements = import_statements(path)
        definition = find(ast.parse(path.read_text(encoding="utf-8")), name)
        used = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
        for statement in [statements[name] for name in used - outer if name in statements]:
            package = re.split(r"[ .]", statement)[1]
            group = ("ours" if package in ("brainsyn", "kit") else
                     "standard" if package in sys.stdlib_module_names else "other")
            groups[group].add(statement)
    # "import x" before "from x import y"
    ordered = [sorted(group, key=lambda line: (line[0] == "f", line)) for group in groups.values()]
    return "\n\n".join("\n".join(group) for group in ordered if group)


def blank(assignment, student=None, file="student.py"):
    """The text of an assignment, for the file of that name: head, imports, functions without
    bodies."""
    names = ASSIGNMENTS[assignment]
    text = HEAD.format(assignment=assignment, file=file,
                       student=f" --student {student}" if student else "")
    text += imports_of(assignment) + "\n\n\n"
    text += "\n\n\n".join(blank_function(assignment, name) for name in names) + "\n"
    if student:
        text += VARIANT_TEXT.format(phi=variant_angle(student))
    return text


def is_blank(function):
    """Whether a function does nothing but raise NotImplementedError."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and code.co_names == ("NotImplementedError",)


def read_hand_in(path):
    """The exercises that a student's file defines: {exercise: function or class}.

    The file is run with the names of the modules there. Where one of its functions calls another
    that is still blank, it gets the library's.
    """
    exercises = [*sum(ASSIGNMENTS.values(), []), *VARIANTS]
    library = {}
    for name in exercises:
        library = {**vars(module_of(name)), **library}
    module = sys.modules["hand_in"] = types.ModuleType("hand_in")
    names = vars(module)
    names.update((name, value) for name, value in library.items() if not name.startswith("__"))
    exec(compile(Path(path).read_bytes(), str(path), "exec"), names)
    found = {}
    for name in exercises:
        outer, *method = name.split(".")
        written = names.get(outer)
        if written is not library.get(outer):
            found[name] = written
            if is_blank(getattr(written, method[0]) if method else written):
                names[outer] = library.get(outer)
    return found


def main():
    """Write or print an assignment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("assignment", choices=ASSIGNMENTS)
    parser.add_argument("--out", help="file to write, in UTF-8 (default: the screen)")
    parser.add_argument("--student", help="student number; a1 only: adds an exercise of its own")
    args = parser.parse_args()
    if args.student and args.assignment != "a1":
        parser.error("--student: only a1 differs by student number")
    text = blank(args.assignment, args.student, args.out or "student.py")
    if not args.out:
        sys.stdout.write(text)
    elif Path(args.out).exists():
        parser.error(f"--out {args.out}: the file is there already, and may hold somebody's work; "
                     "move it away or take another name")
    else:
        Path(args.out).write_text(text, encoding="utf-8")
        print(f"wrote: {args.out}")


if __name__ == "__main__":
    main()
