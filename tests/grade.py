"""Marks for a folder of hand-ins: one row of a CSV for each, in one command.

    python tests/grade.py a1 HANDINS --out marks.csv
    python tests/grade.py a1 HANDINS --hidden my_tests.py --out marks.csv       your own tests count
    too python tests/grade.py a1 HANDINS --student --out marks.csv      files are named by student
    number: 1234567.py

HANDINS holds one Python file for each student, see blank.py. Every hand-in runs in a process of its
own, in an empty folder, under a time limit: one that raises, ends the process or never ends is
marked with what happened, and grading goes on. This is no security boundary: a hand-in can do
whatever you can. Grade strangers' code in a container.
Columns     file, mark (percent of tests passed), passed, of, seconds, and why: what went wrong,
            first tests first
"""
from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from blank import ASSIGNMENTS

TESTS = Path(__file__).parent
# Where the tests of an assignment are: others need not be imported.
FILES = {"a1": ("test_noise", "test_networks", "test_variants"),
         "a2": ("test_networks", "test_training"), "a3": ("test_sampling",),
         "a4": ("test_segmentation",), "a5": ("test_audit",)}


def pytest_words(path, assignment, *words):
    """What pytest is called with to mark a hand-in, from any folder."""
    return ["-q", "-p", "no:cacheprovider", "-c", str(TESTS.parent / "pyproject.toml"), "--rootdir",
            str(TESTS.parent), "--impl", str(Path(path).resolve()), *words,
            *[str(TESTS / f"{name}.py") for name in FILES[assignment]]]


def grade(path, assignment, hidden=(), student=None, seconds=300):
    """Run an assignment's tests on a hand-in -> a row of the CSV."""
    row = {"file": Path(path).name, "mark": 0, "passed": 0, "of": 0, "seconds": 0, "why": ""}
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = pytest_words(path, assignment, "-m", assignment, "--blank-rest", "--junitxml",
                             str(report), *(["--student", student] if student else []),
                             *[str(Path(its).resolve()) for its in hidden])
        with open(Path(folder) / "out.txt", "w") as out:
            child = subprocess.Popen([sys.executable, "-m", "pytest", *words], cwd=folder,
                                     stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                     start_new_session=True)
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)        # what it started as well
                child.wait()
                row["why"] = f"did not end within {seconds} s"
        row["seconds"] = round(time.time() - started)
        if row["why"]:
            return row
        if not report.exists():
            said = re.findall(r"does not run: (.*)", (Path(folder) / "out.txt").read_text())
            return {**row, "why": "does not run: " + (said or ["it ended the process"])[0][:200]}
        cases = [case for case in ElementTree.parse(report).iter("testcase")
                 if case.find("skipped") is None]
    failed = [case for case in cases if case.find("failure") is not None
              or case.find("error") is not None]
    row["of"], row["passed"] = len(cases), len(cases) - len(failed)
    row["mark"] = round(100 * row["passed"] / max(1, len(cases)))
    said = [f"{case.get('name')}: {next(iter(case)).get('message', '').splitlines()[0][:80]}"
            for case in failed]
    row["why"] = "; ".join(dict.fromkeys(said[:5])) + (f"; and {len(said) - 5} more" if len(said)
                                                       > 5 else "")
    return row


def main():
    """Grade all files of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("assignment", choices=ASSIGNMENTS)
    parser.add_argument("folder", help="one .py file a student")
    parser.add_argument("--out", default="marks.csv")
    parser.add_argument("--hidden", nargs="*", default=[], help="files with more tests, marked "
                        "@pytest.mark.a1 and so on")
    parser.add_argument("--student", action="store_true", help="file names are student numbers")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of one hand-in")
    args = parser.parse_args()
    files = sorted(Path(args.folder).glob("*.py"))
    if not files:
        sys.exit(f"error: no .py files in {args.folder}; it should hold one for each student")
    with open(args.out, "w", newline="") as handle:
        writer = None
        for path in files:
            row = grade(path, args.assignment, args.hidden, path.stem if args.student else None,
                        args.seconds)
            if writer is None:
                writer = csv.DictWriter(handle, row)
                writer.writeheader()
            writer.writerow(row)
            handle.flush()
            print(f"{row['file']}: {row['mark']}% {row['why'][:100]}", flush=True)
    print(f"wrote: {args.out}")


if __name__ == "__main__":
    main()
