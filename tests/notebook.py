"""Runs notebooks as plain Python, each in a process of its own, without Jupyter.

    python tests/notebook.py notebooks/0*.ipynb                 whether they run, and how long
    python tests/notebook.py --save notebooks/02_noise.ipynb    keeps what the cells print and draw

Code cells run in turn, in the notebook's folder. As in Jupyter the output of a cell is what it
prints, its figures, and the value of its last line if that is an expression.
"""
from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_cells(path):
    """[(cell, source)] of a notebook's code, and the notebook."""
    book = json.loads(Path(path).read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    return [(cell, "".join(cell["source"])) for cell in cells], book


def picture(figure):
    """A figure as a notebook's output, in 128 colours: a third of the size, and it looks the
    same."""
    from PIL import Image                       # matplotlib brings it
    drawn, kept = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=72, bbox_inches="tight")       # as Jupyter does
    few_colours = Image.open(drawn).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE)
    few_colours.save(kept, format="png", optimize=True)
    png = base64.b64encode(kept.getvalue()).decode() + "\n"
    return {"output_type": "display_data", "metadata": {},
            "data": {"image/png": png, "text/plain": ["<Figure>"]}}


def run_cell(source, names, place):
    """Run one cell's source in the namespace `names` -> outputs. place: for tracebacks."""
    import matplotlib.pyplot as plt
    tree, printed, value = ast.parse(source, place), io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, place, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), place, "eval"), names)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout",
                        "text": printed.getvalue().splitlines(keepends=True)})
    outputs += [picture(plt.figure(number)) for number in plt.get_fignums()]
    plt.close("all")
    if value is not None and not source.rstrip().endswith(";"):
        outputs.append({"output_type": "execute_result", "metadata": {}, "execution_count": None,
                        "data": {"text/plain": repr(value).splitlines(keepends=True)}})
    return outputs


def run_here(path, save):
    """Run a notebook in this process."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.show = lambda *_, **__: None
    path = Path(path).resolve()
    (cells, book), names = code_cells(path), {"__name__": "__main__"}
    os.chdir(path.parent)
    for number, (cell, source) in enumerate(cells, 1):
        outputs = run_cell(source, names, f"{path.name}, code cell {number}")
        cell["outputs"], cell["execution_count"] = outputs, number
        for output in outputs:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
    if save:
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run(path, save=False, seconds=None):
    """Run a notebook in a fresh process -> (exit status, what it said, seconds)."""
    started = time.time()
    words = [sys.executable, __file__, "--here", str(path)] + (["--save"] if save else [])
    done = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=seconds)
    return done.returncode, done.stdout, time.time() - started


def main():
    """Run notebooks; exit status 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="+")
    parser.add_argument("--save", action="store_true", help="write outputs into the notebooks")
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    failed = 0
    for path in args.notebooks:
        if args.here:
            run_here(path, args.save)
            continue
        status, said, seconds = run(path, args.save)
        failed += status != 0
        print(f"{path}: {'runs' if not status else 'FAILS'}, {seconds:.0f} s, "
              f"{Path(path).stat().st_size / 1000:.0f} kB")
        if status:
            print(said)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
