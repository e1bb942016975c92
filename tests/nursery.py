"""Runs scripts as processes of their own without paying four seconds of imports for each.

One process imports what all scripts import and does nothing else; it forks a child for every run,
which gets its working directory, environment, arguments and output file and then runs the script as
__main__. It needs fork, which Windows has not.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOTHER = """
import gc, io, json, os, runpy, sys, traceback
sys.path.insert(0, sys.argv[1])
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot, nibabel, pytest, torch
import torch.utils.flop_counter
import brainsyn
from kit import judging, requests
# calls, where a command does not say how many
brainsyn.SAMPLING["steps"] = requests.SETTINGS["steps"] = 3
judging.DRAWS, judging.HEADS = 2, 1
judging.PATCHES = 5_000
os.fsync = lambda handle: None                  # no power is cut here: nobody waits for the disk
torch.optim.SGD([torch.zeros(1)])               # the first optimiser imports half of PyTorch
figure = matplotlib.figure.Figure()             # and the first picture half of matplotlib
axes, other = figure.subplots(1, 2)
axes.errorbar([1, 2], [2, 3], [1, 1], label="y")
axes.set(yscale="log", title="x")
axes.legend()
other.imshow([[0.0, 1.0]], "gray")
figure.tight_layout()
figure.savefig(io.BytesIO(), format="png")
tensors = io.BytesIO()
torch.save({"x": torch.zeros(1)}, tensors)
tensors.seek(0)
torch.load(tensors, weights_only=True)
gc.collect()
gc.freeze()                                     # children need not look through all that
for line in sys.stdin:
    job, children = json.loads(line), []
    for more in job["environments"]:
        child = os.fork()
        children.append(child)
        if child:
            continue
        os.chdir(job["folder"])
        os.environ.update(more)
        sys.path.insert(0, os.path.dirname(job["words"][0]))
        torch.set_num_threads(int(more.get("OMP_NUM_THREADS", torch.get_num_threads())))
        out = os.open(job["out"], os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv, status = job["words"], 0
        try:
            runpy.run_path(job["words"][0], run_name="__main__")
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    ends = [os.waitpid(child, 0)[1] for child in children]
    print(max(abs(os.waitstatus_to_exitcode(end)) for end in ends), flush=True)
"""
mothers = []


def run_script(folder, script, *words, environments=({},)):
    """Run a script of the repository, or one by its full path, in `folder` -> (exit status, what it
    printed, errors among it). environments: what to add to the environment, one dict for each of
    several processes at once."""
    words = [str(ROOT / script), *map(str, words)]
    if not mothers or mothers[0].poll() is not None:
        mothers[:] = [subprocess.Popen([sys.executable, "-c", MOTHER, str(ROOT)], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)]
    with tempfile.NamedTemporaryFile() as out:
        job = {"folder": str(folder), "out": out.name, "words": words,
               "environments": list(environments)}
        print(json.dumps(job), file=mothers[0].stdin, flush=True)
        status = mothers[0].stdout.readline()
        return int(status), Path(out.name).read_text()
