"""An assignment, made from brainsyn.py: the same file without the bodies of the functions that a
student shall write.

    python tests/blank.py a1 > student.py                       docstrings stay: each is the
    exercise's text python tests/blank.py a1 --student 1234567 > student.py     with an exercise
    that differs by student number pytest --impl student.py -m a1                              how
    far along it is

A hand-in is that file, filled in, or one that holds some of its functions alone; what they need of
brainsyn.py is there without an import. --impl puts its functions in the place of brainsyn's, so
that networks, samplers and training run with them; functions that it lacks are the library's, with
--blank-rest, as in grading, they are blank.
"""
from __future__ import annotations

import argparse
import ast
import hashlib
import sys
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "brainsyn.py"
# Per assignment: what is blank, functions or methods; the tests that mark it carry its name as a
# marker.
ASSIGNMENTS = {"a1": ["cosine_alpha_bar", "signal_sigma", "add_noise", "v_target", "split_v",
                      "min_snr_weight", "prior_error", "precondition"],
               "a2": ["one_hot", "sinusoid", "ResBlock.forward", "Attention.forward", "orthogonal",
                      "EMA.advanced"], "a3": ["timesteps", "ddpm_step", "ddim_step", "dpmpp_step",
                                              "sample", "guided_v", "volume_noise"],
               "a4": ["regions_of", "labels_of", "dice_loss", "dice", "sensitivity", "surface",
                      "hd95", "components", "lesion_dice"],
               "a5": ["mean_head", "robust", "membership", "nearer_share"],}
VARIANT = '''

def your_target(x0, eps, signal, sigma):
    """Another target than v, your own: y = cos(theta + phi) eps - sin(theta + phi) x0, where signal = cos(theta),
    sigma = sin(theta) and phi = {phi:.6f}. With phi = 0 it were v. x0, eps (B, C, H, W); signal, sigma (B, 1, 1, 1)."""
    raise NotImplementedError("a1: your_target")


def split_your_target(x_t, y, signal, sigma):
    """x_t = signal x0 + sigma eps and y = your_target(x0, eps, signal, sigma) -> (x0, eps), at every noise level, the
    two ends included: two equations, two unknowns. (What is the determinant?)"""
    raise NotImplementedError("a1: split_your_target")
'''


def variant_angle(student):
    """phi of a student's own target, 0.2 to 1 radian: a pure function of the student number (a
    string)."""
    return 0.2 + 0.8 * int.from_bytes(hashlib.sha256(student.encode()).digest()[:4],
                                      "big") / 2 ** 32


def find(tree, name):
    """The definition of "function" or "Class.method" in a module's syntax tree, and of what its
    docstring is."""
    where, owner = tree, None
    for part in name.split("."):
        found = [node for node in where.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                 and node.name == part]
        if not found:
            raise SystemExit(f"brainsyn.py has no {name}")
        where, owner = found[0], where
    if not ast.get_docstring(where) and not (isinstance(owner, ast.ClassDef)
                                             and ast.get_docstring(owner)):
        raise SystemExit(f"{name} has no docstring: nobody could write it again")
    return where


def blank(source, assignment):
    """The text of brainsyn.py without the bodies of an assignment's functions."""
    tree, lines = ast.parse(source), source.splitlines()
    for name in ASSIGNMENTS[assignment]:
        node = find(tree, name)
        first, last = node.body[0].end_lineno if ast.get_docstring(node) else node.body[
            0].lineno - 1, node.end_lineno
        indent = " " * node.body[0].col_offset
        lines[first:last] = [f'{indent}raise NotImplementedError("{assignment}: {name}")'] + [
            None] * (last - first - 1)
    return "\n".join(line for line in lines if line is not None) + "\n"


def home(name):
    """The module in which the library keeps a function of an assignment."""
    import brainsyn as bs
    from kit import audit, metrics
    return next((module for module in (bs, metrics, audit) if hasattr(module, name)), bs)


def hand_in(path, assignment, strict=False):
    """The functions of an assignment that a student's file defines: {name: function or class}. The
    file is run with brainsyn's names already there. strict: those it does not define are there too,
    blank."""
    import brainsyn as bs
    from kit import audit, metrics
    everything = {**vars(metrics), **vars(audit), **vars(bs)}
    its, blanks = dict(everything), dict(everything)
    exec(compile(Path(path).read_text(), str(path), "exec"), its)
    wanted = {name.split(".")[0] for name in ASSIGNMENTS[assignment]}
    if strict:
        exec(compile(blank(LIBRARY.read_text(), assignment), "blank", "exec"), blanks)
    own = {name: its[name] for name in wanted | {"your_target", "split_your_target"}
           if name in its and its[name] is not everything.get(name)}
    return {**({name: blanks[name] for name in wanted} if strict else {}), **own}


def main():
    """Print the assignment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("assignment", choices=ASSIGNMENTS)
    parser.add_argument("--student", help="student number; a1 only: adds an exercise of its own")
    args = parser.parse_args()
    if args.student and args.assignment != "a1":
        parser.error("--student: only a1 differs by student number")
    sys.stdout.write(blank(LIBRARY.read_text(), args.assignment))
    if args.student:
        sys.stdout.write(VARIANT.format(phi=variant_angle(args.student)))


if __name__ == "__main__":
    main()
