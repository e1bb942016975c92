"""When things go wrong: killed, full disks, flipped bits, numbers that are not finite.
Nothing is lost, nothing damaged is used in silence, and the run that comes through ends where the
undisturbed one does."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import desk, devices, files, nifti, phantoms, pictures, runs, slices
import sample
import train_ddpm
import train_seg
from nursery import run_script

ROOT = Path(bs.__file__).parent
SHORT = ["--phantoms", "8", "--resolution", "16", "--width", "16", "--mults", "1", "--batch", "4",
         "--sample-every", "0", "--device", "cpu", "--steps", "16"]
# Runs main() of a script in a child of a process that has done nothing but import: a kill every
# second or so costs no import. Every other kill comes shortly after the child has saved something.
# argv: what the child runs, how often it is killed, a seed, then the script's own words.
NURSE = """
import os, random, signal, sys, time
import torch
import brainsyn, sample, train_ddpm
from kit import files, runs
torch.optim.SGD([torch.zeros(1)])               # the first optimiser imports half of PyTorch
what, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
main = {"train_ddpm": train_ddpm.main, "sample": sample.main}[what]
chance, killed, over = random.Random(seed), 0, False
runs.SAVE_EVERY = 0                             # a checkpoint every step
checkpoint = "runs/ddpm/checkpoint.pt"

def saved():
    return os.path.exists(checkpoint) and os.stat(checkpoint).st_mtime_ns

def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)

while True:
    before = saved()
    child = os.fork()
    if not child:
        files.run_script(lambda: main(sys.argv[4:]))
        os._exit(0)
    if killed < kills:
        soon = what == "train_ddpm" and killed % 2 and not over
        while soon and saved() == before and not ended(child):
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.2 if soon else 1.3))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    killed += os.WIFSIGNALED(status)
    over = over or not os.WIFSIGNALED(status)   # all steps are done: nothing more is saved
    if not os.WIFSIGNALED(status) and killed >= kills:
        print("killed", killed)
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def nursed(folder, what, kills, *arguments):
    """Run a script in `folder`, killed so often at random times and begun again; what it
    printed."""
    done = subprocess.run([sys.executable, "-c", NURSE, what, str(kills), "1",
                           *map(str, arguments)], cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def same_state(a, b):
    """Whether two states hold the same numbers, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    return a == b


def learned(folder):
    state = runs.load_checkpoint(folder)
    return {"moments": state["optimizer"]["state"], **{k: state[k]
                                                       for k in ("step", "weights", "ema",
                                                                 "trained_on")}}


@pytest.fixture
def here(tmp_path, monkeypatch, coarse_folder):
    """An empty folder to work in, where the phantoms are there already; signal handlers are put
    back."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/phantoms").mkdir(parents=True)
    os.symlink(coarse_folder, tmp_path / "runs/phantoms/A")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, coarse_folder):
    """An undisturbed run; the folder it lies in."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "runs/phantoms").mkdir(parents=True)
    os.symlink(coarse_folder, folder / "runs/phantoms/A")
    status, text = run_script(folder, "train_ddpm.py", *SHORT)
    assert status == 0, text
    return folder


@pytest.mark.slow
def test_kills_end_at_the_same_bits(straight, tmp_path):
    """Twenty times SIGKILL at random times, in reading, stepping, saving, drawing: the run that at
    last comes through has the weights, averages and moments of the undisturbed one, and no
    litter."""
    shutil.copytree(straight, tmp_path / "work", symlinks=True)
    shutil.rmtree(tmp_path / "work/runs/ddpm")
    text = nursed(tmp_path / "work", "train_ddpm", 20, *SHORT)
    assert "killed 20" in text and text.count("resumed") >= 10, text
    assert same_state(learned(straight / "runs/ddpm"), learned(tmp_path / "work/runs/ddpm"))
    assert not [p for p in (tmp_path / "work/runs/ddpm").rglob(".*")]
    steps = [row["step"] for row in runs.read_log(tmp_path / "work/runs/ddpm/log.csv")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_sampling_killed_half_way_goes_on(straight, tmp_path):
    """Finished cases are whole, a second run makes the rest, and all bytes are those of an
    undisturbed set."""
    command = ["--checkpoint", straight / "runs/ddpm", "--labels", straight / "runs/phantoms/A",
               "--count", "4", "--steps", "15", "--device", "cpu"]
    nursed(tmp_path, "sample", 0, *command, "--out", "whole")
    assert "killed 3" in nursed(tmp_path, "sample", 3, *command, "--out", "cut")
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*")
                   if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*")
                           if p.is_file())
    for name in names:
        if name.suffix != ".png":
            whole, cut = [(tmp_path / folder / name).read_bytes() for folder in ("whole", "cut")]
            assert whole == cut, name


def test_a_kill_inside_a_save_keeps_the_checkpoint(straight, tmp_path):
    """Half a checkpoint is written when the process dies: the one of before is there, whole."""
    shutil.copytree(straight / "runs/ddpm", tmp_path / "ddpm")
    code = """
import os, sys
from pathlib import Path
from kit import runs
state = runs.load_checkpoint(sys.argv[1])
def half(path, state):
    Path(path).write_bytes(b"PK half")
    os.kill(os.getpid(), 9)
runs.save_state = half
runs.save_checkpoint(sys.argv[1], {**state, "step": 999})
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "ddpm")], cwd=ROOT)
    assert done.returncode == -9 and len(list((tmp_path / "ddpm").glob(".*.tmp"))) == 1
    assert runs.load_checkpoint(tmp_path / "ddpm")["step"] == 16
    with files.sole_writer(tmp_path / "ddpm"):
        assert not list((tmp_path / "ddpm").glob(".*.tmp"))


def test_a_run_resumes_at_every_boundary(straight, here, monkeypatch):
    """Stopped after each of the first three steps in turn, always gone on: the bits of the
    undisturbed run."""
    monkeypatch.setattr(train_ddpm.Images, "report", lambda *_: None)
    real = devices.step_if_finite

    def stop_after(*inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*inputs)

    monkeypatch.setattr(devices, "step_if_finite", stop_after)
    for step in range(1, 4):
        with pytest.raises(SystemExit) as left:
            train_ddpm.main(SHORT)
        assert left.value.code == 143 and runs.load_checkpoint("runs/ddpm")["step"] == step
    monkeypatch.setattr(devices, "step_if_finite", real)
    train_ddpm.main(SHORT)
    assert same_state(learned(straight / "runs/ddpm"), learned("runs/ddpm"))


@pytest.fixture
def two(straight, tmp_path):
    """A copy of the straight run's folder with two different checkpoints."""
    shutil.copytree(straight / "runs/ddpm", tmp_path / "ddpm")
    state = runs.load_checkpoint(tmp_path / "ddpm")
    del state["file"]
    runs.save_checkpoint(tmp_path / "ddpm", {**state, "step": 31})
    return tmp_path / "ddpm"


@pytest.mark.parametrize("kind", ["pt", "npz"])
def test_no_flipped_bit_is_loaded_in_silence(two, kind):
    """Fifty random bits: every one is either noticed, or the file still says exactly the same."""
    path, rng = two / "checkpoint.pt", np.random.default_rng(0)
    if kind == "npz":
        path = two.parent / "weights.npz"
        runs.publish(two, path)
    raw, noticed = path.read_bytes(), 0
    sound = runs.load_checkpoint(path)
    for bit in rng.integers(len(raw) * 8, size=50):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert same_state(runs.load_checkpoint(path),
                              sound), f"bit {bit} changed something in silence"
        except bs.BadInput:
            noticed += 1
    assert noticed >= 45


def test_a_truncated_checkpoint_falls_back(two):
    """Ten lengths: always the one before is used, and that is said."""
    path, raw, said = two / "checkpoint.pt", (two / "checkpoint.pt").read_bytes(), []
    for length in np.linspace(0, len(raw) - 1, 10).astype(int):
        path.write_bytes(raw[:length])
        assert runs.load_checkpoint(two, say=said.append)["step"] == 16
    assert len(said) == 10 and all("continuing from checkpoint.previous.pt, step 16" in text
                                   for text in said)


def test_the_newest_deleted_or_both_damaged(two):
    """Deleted: the previous one. Both damaged: one sentence that names both, and the files are left
    alone."""
    (two / "checkpoint.pt").rename(two / "kept")
    assert runs.load_checkpoint(two)["step"] == 16
    (two / "checkpoint.pt").write_bytes(b"PK")
    (two / "checkpoint.previous.pt").write_bytes(b"")
    with pytest.raises(bs.BadInput, match="checkpoint.pt.*checkpoint.previous.pt"):
        runs.load_checkpoint(two)
    assert (two / "checkpoint.pt").read_bytes() == b"PK"
    assert (two / "checkpoint.previous.pt").read_bytes() == b""


@pytest.mark.parametrize("key", sorted(runs.HOLDS["ddpm"]))
def test_every_entry_of_a_checkpoint_is_needed(straight, two, key):
    """Without any one of them the file is refused: nothing is made up in its place."""
    state = runs.load_checkpoint(two)
    assert set(state) == runs.HOLDS["ddpm"] | {"file"}
    runs.save_state(two / "checkpoint.pt", {k: v for k, v in state.items()
                                            if k not in (key, "file")})
    with pytest.raises(bs.BadInput, match=key if key != "kind" else "no checkpoint of kind"):
        runs.load_checkpoint(two / "checkpoint.pt")


def test_a_network_that_is_no_longer_made_is_refused(tmp_path):
    """Of former versions: a segmenter with a ResNet-50, a generator without neighbours."""
    state = dict.fromkeys(runs.HOLDS["segmenter"]) | {"kind": "segmenter",
                                                      "network": {"depth": 50}}
    runs.save_state(tmp_path / "best.pt", state)
    with pytest.raises(bs.BadInput, match="best.pt: ResNets other than 18 and 34 are gone"):
        runs.load_segmenter(tmp_path, torch.device("cpu"))
    state = dict.fromkeys(runs.HOLDS["ddpm"]) | {"kind": "ddpm", "network": {"channels": 4}}
    runs.save_state(tmp_path / "checkpoint.pt", state)
    with pytest.raises(bs.BadInput, match="checkpoint.pt: of a former version"):
        runs.load_generator(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("part", ["weights", "ema", "optimizer", "exp_avg_sq", "momentum"])
def test_half_a_state_is_not_resumed(straight, here, part):
    """A tensor missing inside an entry: one sentence, nothing trained."""
    shutil.copytree(straight / "runs/ddpm", here / "runs/ddpm")
    state = runs.load_checkpoint("runs/ddpm")
    del state["file"]
    if part in ("exp_avg_sq", "momentum"):
        moments = state["optimizer"]["state"].values()
        del next(tensors for tensors in moments if part in tensors)[part]
    elif part == "optimizer":
        del state["optimizer"]["state"][3]
    else:
        del state[part]["last.weight" if "last.weight" in state[part] else sorted(state[part])[0]]
    runs.save_state("runs/ddpm/checkpoint.pt", state)
    with pytest.raises(bs.BadInput, match="does not fit"):
        train_ddpm.main([*SHORT[:-1], "31"])


def test_a_full_disk_arrives_as_an_oserror(coarse_folder, tmp_path, monkeypatch):
    """/dev/full accepts nothing: no checkpoint and no case of the cache."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError):
        runs.save_state("/dev/full", {"a": torch.zeros(10 ** 6)})
    monkeypatch.setattr(files, "replace_file", lambda path, write: write("/dev/full"))
    with pytest.raises(OSError):
        slices.remember(tmp_path, "tumour", lambda case: {"a": torch.zeros(10 ** 6)},
                        nifti.find_cases(coarse_folder)[0])


@pytest.mark.parametrize("write", [lambda path: Path("/dev/full").write_bytes(b"a"),
                                   lambda path: (path / "a").write_text("a")])
def test_what_cannot_be_written_is_named(tmp_path, write):
    """The operating system names no file where the disk is full, and else the temporary one."""
    with pytest.raises(OSError, match="/log.csv'") as refused:
        files.replace_file(tmp_path / "log.csv", write)
    assert ".tmp" not in str(refused.value)


def test_a_picture_that_cannot_be_drawn_costs_a_note(tmp_path, monkeypatch, capsys):
    """Whatever is wrong, a run ends with its figures; a notebook is told."""
    def refuse(*_, **more):
        raise RuntimeError("no font")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", refuse)
    files.write_csv(tmp_path / "log.csv", [{"step": 1, **dict.fromkeys(runs.QUARTERS, 0.5)}])
    runs.report(SimpleNamespace(out=str(tmp_path)), SimpleNamespace(step=1, seconds=1.0),
                bs.SAMPLING,
                {"fine_power_ratio": 0.9}, ["fine detail 0.9"])
    pictures.plot_rows(tmp_path / "samples.png", [[torch.zeros(4, 4)]], [""], "tumour")
    text = capsys.readouterr().out
    assert "fine detail 0.9" in text and "wrote: " + str(tmp_path / "closing.json") in text
    for name in ("curves.png", "samples.png"):
        assert f"{name} could not be written (no font); the run goes on" in text
        assert f"wrote: {tmp_path / name}" not in text
    monkeypatch.setattr(matplotlib.figure.Figure, "suptitle", refuse)
    with pytest.raises(RuntimeError, match="no font"):
        pictures.plot_rows(None, [[torch.zeros(4, 4)]], [""], "tumour")


def test_a_script_started_from_a_notebook_draws_into_files(monkeypatch):
    """Jupyter names a backend in the environment of all that it starts."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    files.run_script(lambda: None)
    assert os.environ["MPLBACKEND"] == "Agg"


def test_a_terminal_without_a_letter_gets_another(monkeypatch):
    """LC_ALL=C: "±" and names of cases are printed as far as that goes."""
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    files.run_script(lambda: print("Dice 0.8 ± 0.1", flush=True))
    assert screen.buffer.getvalue() == b"Dice 0.8 ? 0.1\n"


def test_signals_are_left_alone_outside_the_main_thread():
    """Gradio and Streamlit call a training in a thread, where Python sets no handlers."""
    caught = []
    thread = threading.Thread(target=lambda: caught.append(files.catch_signals()))
    thread.start()
    thread.join()
    assert caught == [[]]


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_no_training(straight, here, monkeypatch, capsys):
    """From step 2 on nothing can be written: it is said, training goes on, the checkpoint of before
    stays; the last save must succeed, and once there is room again the run ends with the bits of
    the undisturbed one."""
    real, full = runs.save_state, [True]

    def save_state(path, state):
        if full and state["step"] > 1:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(path, state)

    monkeypatch.setattr(runs, "save_state", save_state)
    monkeypatch.setattr(runs, "SAVE_EVERY", 0)
    with pytest.raises(OSError, match="No space"):
        train_ddpm.main(SHORT)
    assert ("note: the checkpoint could not be written ([Errno 28] No space left on device: "
            "'runs/ddpm/checkpoint.pt'); the run goes on") in capsys.readouterr().out
    assert runs.load_checkpoint("runs/ddpm")["step"] == 1 and not list(Path("runs/ddpm").glob(".*"))
    full.clear()
    train_ddpm.main(SHORT)
    assert same_state(learned(straight / "runs/ddpm"), learned("runs/ddpm"))


@pytest.mark.slow
def test_a_segmenter_that_cannot_keep_its_best_goes_on(here, monkeypatch, capsys):
    """best.pt cannot be written in the first validation: it is said, and a later one writes it."""
    monkeypatch.setattr(train_seg, "finish_report", lambda *_: None)
    real, tried = files.replace_file, []

    def refuse(path, write):
        if Path(path).name == "best.pt":
            tried.append(path)
            if len(tried) == 1:
                raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(files, "replace_file", refuse)
    monkeypatch.setattr(train_seg, "validate", lambda *_: 0.5)
    train_seg.main(["--phantoms", "8", "--resolution", "32", "--batch", "4", "--steps", "4",
                    "--validate-every", "2", "--device", "cpu"])
    assert "note: best.pt could not be written" in capsys.readouterr().out and len(tried) == 2
    assert runs.load_checkpoint("runs/seg", "segmenter", names=("best.pt",))["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["damaged", "deleted"])
def test_a_best_that_cannot_be_used_is_made_again(here, monkeypatch, how):
    """A run resumed at its end with best.pt damaged or gone validates again instead of failing."""
    monkeypatch.setattr(train_seg, "finish_report", lambda *_: None)
    command = ["--phantoms", "8", "--resolution", "32", "--batch", "4", "--steps", "2", "--device",
               "cpu"]
    train_seg.main(command)
    best = Path("runs/seg/best.pt")
    best.write_bytes(best.read_bytes()[:999]) if how == "damaged" else best.unlink()
    train_seg.main(command)
    assert runs.load_checkpoint("runs/seg", "segmenter", names=("best.pt",))["step"] == 2


@pytest.mark.slow
def test_the_best_of_a_deleted_run_does_not_stay(here, monkeypatch):
    """A folder whose checkpoints were deleted is begun anew: an old best.pt, however good, is not
    taken for this run's."""
    monkeypatch.setattr(train_seg, "finish_report", lambda *_: None)
    command = ["--phantoms", "8", "--resolution", "32", "--batch", "4", "--device", "cpu"]
    monkeypatch.setattr(train_seg, "validate", lambda *_: 0.9)
    train_seg.main([*command, "--steps", "2"])
    for path in Path("runs/seg").glob("checkpoint*.pt"):
        path.unlink()
    monkeypatch.setattr(train_seg, "validate", lambda *_: 0.1)
    train_seg.main([*command, "--steps", "3"])
    assert runs.load_checkpoint("runs/seg", "segmenter", names=("best.pt",))["step"] == 3


def test_a_limit_on_file_size_is_one_sentence(straight, tmp_path):
    """The operating system's own refusal, at the checkpoint of step 1: exit 2, one line, nothing
    half-written, no empty folder."""
    shutil.copytree(straight, tmp_path / "work", symlinks=True)
    shutil.rmtree(tmp_path / "work/runs/ddpm")
    code = ("import resource, sys, train_ddpm\nfrom kit import files\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
            "files.run_script(lambda: train_ddpm.main(sys.argv[1:]))\n")
    done = subprocess.run([sys.executable, "-c", code, *SHORT], cwd=tmp_path / "work", text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large: 'runs/ddpm/checkpoint.pt'" in done.stderr
    assert not (tmp_path / "work/runs/ddpm").exists()


def test_a_folder_that_takes_nothing_is_one_sentence(tmp_path):
    """/proc is read-only even for root."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    done = subprocess.run([sys.executable, ROOT / "train_ddpm.py", *SHORT, "--out",
                           "/proc/nothing"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "/proc/nothing" in done.stderr


@pytest.mark.parametrize("script", [train_ddpm, train_seg, sample])
def test_one_writer_a_folder(here, script):
    """A second process in the same folder is refused at once, and changes nothing there."""
    out = here / "runs/busy"
    with files.sole_writer(out):
        with pytest.raises(bs.BadInput, match="another process writes there"):
            script.main(["--out", str(out), "--device", "cpu"])
        assert not list(out.iterdir())
    assert not out.exists(), "a folder that nothing came of is taken away again"


SHARED = """
from kit import files, nifti, phantoms, slices
def main():
    phantoms.make_phantoms("A", 2, scale=2)
    slices.build_cache(nifti.find_cases("A"), "cache", 16, 192.0, "tumour")
files.run_script(main)
"""


@pytest.mark.slow
def test_two_first_runs_at_once(tmp_path):
    """Both make the same phantoms and the same cache: both end well, and nothing is left behind."""
    (tmp_path / "program.py").write_text(SHARED)
    status, text = run_script(tmp_path, tmp_path / "program.py", environments=({}, {}))
    assert status == 0 and text.count("cache: 2 cases") == 2, text
    assert not list(tmp_path.rglob(".*")) and len(list((tmp_path / "A").iterdir())) == 2


def test_a_folder_made_by_another_process_stays(tmp_path):
    """The slower of two makers of a phantom uses what the faster made."""
    case = phantoms.write_phantom(tmp_path, 0, scale=4)
    marked = case / "of the first"
    marked.touch()
    assert phantoms.write_phantom(tmp_path, 0, scale=4) == case and marked.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("make", [lambda folder, cases: phantoms.make_phantoms(folder, 1, scale=4),
                                  lambda folder, cases: slices.build_cache(cases, folder, 16, 192.0,
                                                                           "tumour")])
def test_litter_of_the_dead_goes(coarse_folder, tmp_path, make):
    """Killed in the middle of a phantom or of the cache: a later run clears up. What a living
    process writes is left alone."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    litter, busy = [tmp_path / f".BraTS-PHA-00009-000.{number}.tmp"
                    for number in (dead.pid, os.getppid())]
    busy.mkdir()
    litter.mkdir()
    (litter / "half.nii.gz").touch()
    make(tmp_path, nifti.find_cases(coarse_folder)[:2])
    assert busy.exists() and not litter.exists()


class Spoiled:
    """step_if_finite with the loss or the norm of some calls spoiled."""

    def __init__(self, calls, what="loss"):
        self.calls, self.what, self.count, self.real = calls, what, 0, devices.step_if_finite

    def __call__(self, device, optimizer, losses, norm):
        self.count += 1
        if self.count in self.calls and self.what == "loss":
            losses = losses * float("nan")
        if self.count in self.calls and self.what == "gradient":
            norm = norm + float("inf")
        return self.real(device, optimizer, losses, norm)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(what):
    """Weights and moments stay as they are; a sound step changes them."""
    net = torch.nn.Linear(2, 2)
    optimizer = bs.make_optimizer(net, 0.1, torch.device("cpu"))
    for bad in (False, True, False):
        net(torch.ones(1, 2)).sum().backward()
        before = [p.clone() for p in net.parameters()]
        moments = [tensor.clone() for tensor in devices.state_of(optimizer)]
        loss = torch.tensor([float("nan") if bad and what == "loss" else 1.0])
        norm = torch.tensor(float("inf") if bad and what == "gradient" else 1.0)
        assert devices.step_if_finite(torch.device("cpu"), optimizer, loss, norm) != bad
        assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before)) == bad
        if bad:
            after = devices.state_of(optimizer)
            assert all(torch.equal(a, b) for a, b in zip(moments, after))


def test_a_batch_that_is_not_finite_is_named(here, monkeypatch, capsys):
    """NaN in the pictures of one batch: the step and its cases are named, the network is not
    touched, and the log has no NaN."""
    monkeypatch.setattr(train_ddpm.Images, "report", lambda *_: None)
    real, calls = slices.Cache.batch, []

    def batch(cache, rows, mirror=None, around=0):
        x0, classes, place = real(cache, rows, mirror, around)
        if mirror is not None:                  # a training batch
            calls.append(cache.names(rows))
            if len(calls) == 5:
                x0[1, 6, 3, 4] = float("nan")
        return x0, classes, place

    monkeypatch.setattr(slices.Cache, "batch", batch)
    train_ddpm.main([*SHORT[:-1], "8"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert lines == ["step 00005 | loss or gradient not finite, nothing learned | cases "
                     f"{', '.join(calls[4])}"]
    state = runs.load_checkpoint("runs/ddpm")
    assert state["step"] == 8 and all(p.isfinite().all() for p in state["weights"].values())
    assert all(np.isfinite(row["loss"]) for row in runs.read_log("runs/ddpm/log.csv"))


@pytest.mark.parametrize("script", [train_ddpm,
                                    pytest.param(train_seg, marks=pytest.mark.slow)])
def test_a_run_that_stays_bad_ends_with_advice(here, monkeypatch, script):
    """Nothing finite from step 6 on: after three such steps the run ends and says what to try. The
    checkpoint is sound, and none is written of a step that was not."""
    monkeypatch.setattr(runs, "SAVE_EVERY", 0)
    monkeypatch.setattr(devices, "step_if_finite", Spoiled(set(range(6, 99)), "gradient"))
    short = SHORT if script is train_ddpm else ["--phantoms", "8", "--resolution", "32", "--batch",
                                                "4", "--device", "cpu", "--steps", "30", "--out",
                                                "runs/ddpm"]
    with pytest.raises(bs.BadInput, match="step 8: .*three in a row.*--lr.*the same command"):
        script.main(short)
    state = runs.load_checkpoint("runs/ddpm", "ddpm" if script is train_ddpm else "seg")
    assert state["step"] == 5 and all(p.isfinite().all() for p in state["weights"].values())


def test_the_same_command_continues_after_bad_steps(straight, here, monkeypatch, capsys):
    """Steps 10 to 12 fail once (a hardware hiccup): the run ends; begun again it goes on from the
    last checkpoint, and ends with the bits of the undisturbed run."""
    monkeypatch.setattr(train_ddpm.Images, "report", lambda *_: None)
    monkeypatch.setattr(runs, "SAVE_EVERY", 0)
    monkeypatch.setattr(devices, "step_if_finite", Spoiled({10, 11, 12}))
    with pytest.raises(bs.BadInput, match="three in a row"):
        train_ddpm.main(SHORT)
    train_ddpm.main(SHORT)
    text = capsys.readouterr().out
    assert text.count("not finite") == 3 and "resumed: runs/ddpm at step 9" in text
    assert same_state(learned(straight / "runs/ddpm"), learned("runs/ddpm"))


def test_a_flipped_bit_in_the_cache_is_noticed(coarse_folder, tmp_path, capsys):
    """Slices are memory-mapped and never parsed, so nothing else would notice: the cache is made
    anew."""
    cases = nifti.find_cases(coarse_folder)[:6]
    cache = slices.build_cache(cases, tmp_path, 16, 192.0, "tumour")
    path = next(tmp_path.rglob("*-tumour-*"))
    rows, raw = np.array(cache.rows), bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 8
    path.write_bytes(raw)
    again = slices.build_cache(cases, tmp_path, 16, 192.0, "tumour")
    assert np.array_equal(again.rows, rows) and "a bit has flipped" in capsys.readouterr().out


def test_published_weights_are_plain_arrays_and_sample_the_same(straight, tmp_path, capsys):
    """An .npz without pickle gives the same cases as the checkpoint it came from; its sha256 is
    printed; a pickle inside is refused."""
    desk.main(["--publish", str(straight / "runs/ddpm"), str(tmp_path / "weights.npz")])
    assert f"sha256 {files.file_hash(tmp_path / 'weights.npz')}" in capsys.readouterr().out
    runs.publish(tmp_path / "weights.npz", tmp_path / "again.npz")
    for source, out in ((straight / "runs/ddpm", "a"), (tmp_path / "again.npz", "b")):
        sample.main(["--checkpoint", str(source), "--labels", str(straight / "runs/phantoms/A"),
                     "--count", "1", "--steps", "3", "--out", str(tmp_path / out), "--device",
                     "cpu"])
    for path in (tmp_path / "a").rglob("*.nii.gz"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert "optimizer" not in json.loads(arrays["about"].item()) and all(a.dtype != object
                                                                         for a in arrays.values())

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it went off",)

    np.savez(tmp_path / "bomb.npz", **arrays, bomb=np.array([Bomb()], dtype=object))
    with pytest.raises(bs.BadInput, match="bomb.npz"):
        runs.load_checkpoint(tmp_path / "bomb.npz")
    assert not (tmp_path / "it went off").exists()
