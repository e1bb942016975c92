"""Marks for a folder of hand-ins: one row of a CSV for each, in one command.

    python tests/grade.py a1 HANDINS --out marks.csv
    python tests/grade.py a1 HANDINS --hidden my_tests.py --out marks.csv   your own tests count too
    python tests/grade.py a1 HANDINS --student --out marks.csv  files are named by student number:
                                                                1234567.py

HANDINS holds one Python file for each student, see blank.py. Every hand-in runs in a process of its
own, in an empty folder, under a time limit: one that raises, ends the process or never ends is
marked with what happened, and grading goes on. This is no security boundary: a hand-in can do
whatever you can. Grade strangers' code in a container.

Each test runs with one function of the hand-in, all else being the library's, so that a mistake
costs its own function alone.

Columns     file
            mark: mean over the functions of the assignment, in percent
            a column for each function: percent of its tests passed, 0 where it is not in the file
            seconds
            why: what went wrong, first tests first
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

import blank

TESTS = Path(__file__).parent


def pytest_words(path, assignment, *words):
    """Arguments of a pytest that marks a hand-in, from any folder: options, then the files that
    hold tests of the assignment."""
    marker = re.compile(rf"^@pytest\.mark\.{assignment}\b", re.M)
    files = [str(file) for file in sorted(TESTS.glob("test_*.py"))
             if marker.search(file.read_text(encoding="utf-8"))]
    root = TESTS.parent
    return ["-q", "--tb=native", "-p", "no:cacheprovider", "-c", str(root / "pyproject.toml"),
            "--rootdir", str(root), f"--impl={Path(path).resolve()}", *words, *files]


def run_tests(words, folder, seconds):
    """Run pytest in a folder -> (what it printed, whether it ended within so many seconds)."""
    out = Path(folder) / "out.txt"
    with open(out, "w") as handle:
        child = subprocess.Popen([sys.executable, "-m", "pytest", *words], cwd=folder,
                                 stdin=subprocess.DEVNULL, stdout=handle, stderr=handle,
                                 start_new_session=True)
        try:
            child.wait(seconds)
            ended = True
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)        # with what it started
            child.wait()
            ended = False
    return out.read_text(errors="replace"), ended


def read_report(path):
    """pytest's report -> [(exercise or None, test, None or why it failed)]; tests left out are
    not in it."""
    results = []
    for case in ElementTree.parse(path).iter("testcase"):
        properties = {item.get("name"): item.get("value") for item in case.iter("property")}
        fault = next((part for part in case if part.tag in ("failure", "error")), None)
        if case.find("skipped") is None:
            why = None if fault is None else fault.get("message", "")
            results.append((properties.get("exercise"), case.get("name").split("[")[0], why))
    return results


def first_reasons(failures, count=5):
    """[(exercise, test, message)] -> the first reasons in words, one for each test."""
    words = {}
    for exercise, test, message in failures:
        line = (message or "no message").splitlines()[0]
        if line.startswith("NotImplementedError"):
            line = "not written yet"
        line = line.removeprefix("AssertionError: ")
        words.setdefault((exercise, test), f"{exercise or test}: {line[:150]}")
    reasons = list(dict.fromkeys(words.values()))
    more = f"; and {len(reasons) - count} more" if len(reasons) > count else ""
    return "; ".join(reasons[:count]) + more


def grade(path, assignment, hidden=(), student=None, seconds=300):
    """Run an assignment's tests on a hand-in -> a row of the CSV."""
    exercises = blank.ASSIGNMENTS[assignment] + (blank.VARIANTS if student else [])
    row = {"file": Path(path).name, "mark": 0, **dict.fromkeys(exercises, 0), "seconds": 0,
           "why": ""}
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", assignment, f"--junitxml={report}"]
        if student:
            options += ["--student", student]
        own_tests = [str(Path(file).resolve()) for file in hidden]
        words = pytest_words(path, assignment, *options, *own_tests)
        printed, ended = run_tests(words, folder, seconds)
        row["seconds"] = round(time.time() - started)
        if not ended:
            return {**row, "why": f"did not end within {seconds:g} s"}
        if not report.exists():
            said = re.search(r"does not run: (.*)", printed)
            reason = said.group(1) if said else "it ended the process"
            return {**row, "why": f"does not run: {reason[:200]}"}
        results = read_report(report)
    for exercise in exercises:
        passed = [why is None for name, _, why in results if name == exercise]
        row[exercise] = round(100 * sum(passed) / max(1, len(passed)))
    row["mark"] = round(sum(row[exercise] for exercise in exercises) / len(exercises))
    lacking = [(exercise, "", "not in the file") for exercise in exercises
               if all(name != exercise for name, _, _ in results)]
    row["why"] = first_reasons([result for result in results if result[2] is not None] + lacking)
    return row


def main():
    """Grade all files of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("assignment", choices=blank.ASSIGNMENTS)
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
    with open(args.out, "w", newline="", encoding="utf-8") as handle:
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
