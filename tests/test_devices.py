"""kit/devices.py: one loop on every device, and the same numbers from any number of them.

Several processes are tested with gloo on the CPU; XLA on torch_xla's CPU client, where torch_xla is
installed (PJRT_DEVICE=CPU, CPU_NUM_DEVICES=4 makes four devices of one CPU). What needs a TPU or a
GPU is not tested.
"""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import brainsyn as bs
from kit import devices, nifti, runs
from nursery import run_script

ROOT = Path(bs.__file__).parent
DDPM = ["--phantoms", "8", "--resolution", "24", "--width", "16", "--mults", "1", "2", "--batch",
        "4", "--sample-every", "0", "--seed", "3", "--steps", "12", "--precision", "float32"]
SEG = ["--phantoms", "8", "--resolution", "32", "--batch", "8", "--seed", "3", "--steps", "4",
       "--validate-every", "4", "--precision", "float32"]
needs_xla = pytest.mark.skipif(not importlib.util.find_spec("torch_xla"),
                               reason="torch_xla is not installed here")
# Runs a script and says after every step what its loss was and how many graphs XLA has compiled so
# far.
WATCH = """
import sys
import brainsyn
from kit import devices, files, runs
brainsyn.SAMPLING["steps"] = 3
after_step = runs.Run.after_step
def watched(run, finite, losses, *more):
    if "torch_xla" in sys.modules:
        import torch_xla.debug.metrics as met
        print("compiled", met.metric_data("CompileTime")[0], flush=True)
    after_step(run, finite, losses, *more)
    if devices.first_process():
        print("loss was", devices.to_host(run.losses[-1]).mean().item(), flush=True)
runs.Run.after_step = watched
files.run_script(__import__(sys.argv.pop(1)).main)
"""


def start(folder, program, *words, processes=1, xla_cores=None, status=0, torchrun=False):
    """Run Python text as a process of its own, or as several (with torchrun, or as torchrun would
    start them), or on so many XLA devices of the CPU; returns what it printed."""
    (folder / "program.py").write_text(program)
    if xla_cores or torchrun:
        launcher, more = [], {"OMP_NUM_THREADS": "1"}
        if torchrun:
            launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        if xla_cores:
            more = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(xla_cores),
                    "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        done = subprocess.run([sys.executable, *launcher, "program.py", *map(str, words)],
                              cwd=folder, text=True, timeout=600,
                              env={**os.environ, "PYTHONPATH": str(ROOT), **more},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        left, text = done.returncode, done.stdout
    else:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                  "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
                  "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                 for rank in range(processes)]
        left, text = run_script(folder, folder / "program.py", *words,
                                environments=ranks if processes > 1 else [{"OMP_NUM_THREADS": "1"}])
    assert (left == 0) == (status == 0), text
    return text


def run(folder, *words, xla_cores=None, **how):
    """A script of the repository with its arguments, watched."""
    return start(folder, WATCH, *words, "--device", "xla" if xla_cores else "cpu",
                 xla_cores=xla_cores, **how)


def losses(text):
    """The loss after every step."""
    return [float(value) for value in re.findall(r"loss was (\S+)\n", text)]


def furthest(one, other, part="weights"):
    """Largest difference of any number in two runs' checkpoints."""
    a, b = runs.load_checkpoint(one), runs.load_checkpoint(other)
    assert a["step"] == b["step"] and a[part].keys() == b[part].keys()
    return max((a[part][k].double() - b[part][k].double()).abs().max().item() for k in a[part])


@pytest.fixture(scope="module")
def plain(tmp_path_factory, lay_phantoms):
    """A folder with twelve steps of train_ddpm.py in one process on the CPU, in runs/plain; what it
    printed."""
    folder = lay_phantoms(tmp_path_factory.mktemp("devices"), 8)
    return folder, run(folder, "train_ddpm", *DDPM, "--out", "runs/plain")


@pytest.fixture(scope="module")
def plain_seg(plain):
    """The same folder with four steps of train_seg.py in runs/plain_seg; what that printed."""
    return plain[0], run(plain[0], "train_seg", *SEG, "--out", "runs/plain_seg")


def test_a_device_that_is_not_there_is_said():
    """Asked for by name and missing: one sentence, never a silent fall-back."""
    if not importlib.util.find_spec("torch_xla"):
        with pytest.raises(bs.BadInput, match="requirements-tpu.txt"):
            devices.pick_device("xla")
    for name, there in (("cuda", torch.cuda.is_available()),
                        ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(bs.BadInput, match=f"--device {name}"):
                devices.pick_device(name)


def test_parts_are_joined_in_order():
    """However many rows a call takes, each row's answer lands in its place."""
    rows = torch.arange(7.0)
    for batch in (1, 3, 7, 10):
        assert torch.equal(bs.in_parts(torch.device("cpu"), lambda a, b: a * b, batch, rows, rows),
                           rows ** 2)


def test_what_is_saved_keeps_its_form_and_no_graph():
    """Nested dicts, lists and tuples keep their shape; what is no tensor passes."""
    tree = {"a": [torch.ones(2, requires_grad=True), 3], "b": {0: (torch.zeros(1), "x", None)}}
    out = devices.to_host(tree)
    assert not out["a"][0].requires_grad and out["a"][1] == 3 and out["b"][0][1:] == ("x", None)


def test_asked_precision_is_what_layers_compute_in():
    """float32 stays float32 where bfloat16 would be faster, and the other way round."""
    layer, cpu = torch.nn.Linear(3, 2), torch.device("cpu")
    for precision in ("float32", "bfloat16"):
        with bs.fast_math(cpu, precision):
            assert layer(torch.ones(1, 3)).dtype == getattr(torch, precision)


@pytest.mark.programs
def test_the_bench_times_a_step(tmp_path):
    """The README's line, shortened: one row with the size of the default network and rates above
    0."""
    done = subprocess.run([sys.executable, ROOT / "tests/bench_devices.py", "--device", "cpu",
                           "--resolutions", "16", "--batch", "1", "--steps", "1"], cwd=tmp_path,
                          text=True, timeout=300, capture_output=True)
    row = [cell.strip() for cell in done.stdout.splitlines()[-1].split("|")[1:-1]]
    assert done.returncode == 0, done.stdout + done.stderr
    assert row[:3:2] == ["ours", "16"] and row[3] == "3.5", row
    assert float(row[4]) > 0 and float(row[8]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_two_processes_give_the_weights_of_one(plain, torchrun):
    """The same global batch, half of it each: the same weights, EMA and losses up to the order of
    sums."""
    folder, alone = plain
    out = f"runs/two_{torchrun}"
    text = run(folder, "train_ddpm", *DDPM, "--out", out, processes=2, torchrun=torchrun)
    assert text.count("device cpu x 2, float32") == 1
    assert text.count(f"wrote: {out}/samples.png") == 1
    for part in ("weights", "ema"):
        assert furthest(folder / "runs/plain", folder / out, part) < 1e-5
    assert len(losses(text)) == 12 and losses(text) == pytest.approx(losses(alone), abs=1e-5)


@pytest.mark.slow
def test_one_process_and_two_continue_each_other(plain):
    """A checkpoint does not know how many made it."""
    folder, longer = plain[0], [word if word != "12" else "15" for word in DDPM]
    shutil.copytree(folder / "runs/plain", folder / "runs/one_two")
    run(folder, "train_ddpm", *DDPM, "--out", "runs/two_one", processes=2)
    for out, processes in (("runs/two_one", 1), ("runs/one_two", 2)):
        assert f"resumed: {out} at step 12" in run(folder, "train_ddpm", *longer, "--out", out,
                                                   processes=processes)
    assert furthest(folder / "runs/two_one", folder / "runs/one_two") < 1e-5


@pytest.mark.slow
def test_two_processes_stop_together(plain):
    """Clocks differ: the first process's counts, or one would wait for the other for ever."""
    short = [*DDPM[:DDPM.index("--steps")], "--minutes", "0.02"]
    assert "wrote: runs/short/samples.png" in run(plain[0], "train_ddpm", *short, "--out",
                                                  "runs/short", processes=2)


@pytest.mark.slow
def test_two_processes_segment_like_one(plain_seg):
    """The same losses to a thousandth: ReLUs turn rounding into flips, so weights drift apart."""
    folder, alone = plain_seg
    text = run(folder, "train_seg", *SEG, "--out", "runs/two_seg", processes=2)
    assert "device cpu x 2" in text and text.count("--- ") == 1
    assert (folder / "runs/two_seg/best.pt").exists()
    assert len(losses(text)) == 4 and losses(text) == pytest.approx(losses(alone), rel=1e-3)


ALONE_AND_SHARED = """
import torch, torch.distributed as dist, brainsyn as bs
from kit import devices
devices.pick_device("cpu", several=True)
torch.manual_seed(0)
x, target = torch.randn(8, 3, 4, 5) + 2, (torch.rand(8, 3, 4, 5) > 0.7).float()
own, results = devices.slice_of_batch(8), []
assert (own.start, own.stop) == (4 * dist.get_rank(), 4 * dist.get_rank() + 4)
for norm, shared in ((torch.nn.BatchNorm2d(3), False), (devices.BatchNorm(3), True)):
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    some = (x[own] if shared else x).clone().requires_grad_(True)
    total = bs.all_sum if shared else torch.clone
    out = norm(some)
    p, t = out.sigmoid(), target[own] if shared else target
    loss = 1 - (2 * total((p * t).sum()) + 1) / (total((p + t).sum()) + 1)
    (loss / 2 if shared else loss).backward()       # DistributedDataParallel takes the mean of two
    rows = slice(0, 4) if shared else own
    results.append((out.detach()[rows], loss.detach(), norm.running_mean, norm.running_var,
                    some.grad[rows]))
for whole, shared in zip(*results):
    assert torch.allclose(whole, shared, atol=1e-6, rtol=1e-5), (whole, shared)
assert torch.equal(devices.all_gather(x[own]), x)
assert devices.broadcast_from_first(5 + dist.get_rank()) == 5
devices.leave_processes()
"""


def test_norms_and_dice_of_a_shared_batch(tmp_path):
    """Output, running statistics, loss and gradients of half a batch each are those of the whole
    batch."""
    start(tmp_path, ALONE_AND_SHARED, processes=2)


@pytest.mark.parametrize("script, arguments, words", [
    ("train_ddpm", ["--batch", "3"], "--batch 3 must be a multiple of 2"),
    ("train_seg", ["--study"], "with python, not torchrun"),
    ("sample", [], "with python, not torchrun"),
])
def test_what_cannot_be_shared_is_said(tmp_path, script, arguments, words):
    """One sentence under torchrun, nothing written."""
    text = run(tmp_path, script, *arguments, processes=2, status=1)
    assert text.count("error: ") == 1 and words in text and "Traceback" not in text
    assert {p.name for p in tmp_path.iterdir()} <= {"program.py", "__pycache__"}


FAIL = """
import sys, torch, brainsyn as bs
from kit import devices, files
def main():
    where = sys.argv[1]
    if where == "before":
        raise bs.BadInput("the flag is wrong")
    devices.pick_device("cpu", several=True)
    first = devices.first_process()
    def make():
        if where == "made":
            raise bs.BadInput("the data are bad")
    devices.first_process_first(make)
    if where == "all":
        raise bs.BadInput("the split is wrong")
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    for step in range(3):
        if where == ("first" if first else "second") and step == 2:
            raise bs.BadInput("the disk is full")
        net(torch.ones(1, 2)).sum().backward()
        devices.broadcast_from_first(step)
files.run_script(main)
"""


@pytest.mark.parametrize("where", ["before", "made", "all", "first", "second"])
@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bad_input_is_said_once(tmp_path, where, torchrun):
    """In one process or in all, before training or in it: one sentence; the processes that fail
    because of it say nothing."""
    text = start(tmp_path, FAIL, where, processes=2, status=1, torchrun=torchrun)
    assert text.count("error: the ") == 1, text
    # torchrun has a traceback of its own
    assert torchrun or "Traceback" not in text and "Error" not in text, text


@pytest.fixture(scope="module")
def on_xla(plain):
    """Function: number of XLA devices -> what twelve steps on them printed, in runs/xla1 and so on;
    run once."""
    printed = {}

    def train(xla_cores):
        if xla_cores not in printed:
            printed[xla_cores] = run(plain[0], "train_ddpm", *DDPM, "--out", f"runs/xla{xla_cores}",
                                     xla_cores=xla_cores)
        return printed[xla_cores]

    return train


@needs_xla
@pytest.mark.parametrize("xla_cores", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_xla_gives_the_weights_of_the_cpu(plain, on_xla, xla_cores):
    """Twelve steps on any number of devices: the same weights and EMA; the step is compiled once,
    sampling adds one graph, and the prior alone another; nothing runs on the CPU."""
    (folder, alone), text = plain, on_xla(xla_cores)
    assert f"device xla{f' x {xla_cores}' if xla_cores > 1 else ''}, float32" in text
    for part in ("weights", "ema"):
        assert furthest(folder / "runs/plain", folder / f"runs/xla{xla_cores}", part) < 1e-5, part
    assert losses(text) == pytest.approx(losses(alone), abs=1e-5)
    compiled = [int(n) for n in re.findall(r"compiled (\d+)\n", text)]
    assert len(compiled) == 12 and len(set(compiled)) == 1, f"again after step 1: {compiled}"
    total = re.search(r"XLA compiled (\d+) graphs in [\d.]+ s; run on the CPU: nothing\n", text)
    assert total and int(total[1]) <= compiled[0] + 3, text


SHOW_SHARDING = """
import torch, torch_xla
from kit import devices
device, show = devices.pick_device("xla"), torch_xla._XLAC._get_xla_sharding_spec
print([show(part) for part in devices.to_device(device, torch.zeros(8, 3), torch.zeros(6, 3))])
print(show(devices.place_network(torch.nn.Linear(3, 8), device).weight))
"""


@needs_xla
def test_xla_splits_a_batch_over_all_devices(tmp_path):
    """Of four devices each holds a quarter of the batch and all of the weights; a batch that does
    not divide is whole everywhere."""
    text = start(tmp_path, SHOW_SHARDING, xla_cores=4)
    assert "{devices=[4,1]0,1,2,3}" in text and text.count("{replicated}") == 2, text


SPOIL = """
import torch, brainsyn as bs
from kit import devices
device = devices.pick_device("xla")
net = devices.place_network(torch.nn.Linear(2, 2), device)
optimizer = bs.make_optimizer(net, 0.1, device)
devices.prepare_training(net, optimizer, device)
def held():
    return [part.cpu().clone() for part in (*net.parameters(), *devices.state_of(optimizer))]
for norm in (1.0, float("nan"), 1.0):
    before = held()
    batch, norm = devices.to_device(device, torch.ones(2, 2), torch.tensor([norm]))
    losses = net(batch).sum(1)
    losses.mean().backward()
    finite = devices.step_if_finite(device, optimizer, losses, norm.sum())
    optimizer.zero_grad()
    devices.end_step(device)
    print(finite, all(torch.equal(a, b) for a, b in zip(held(), before)))
"""


@needs_xla
def test_xla_leaves_out_a_step_that_is_not_finite(tmp_path):
    """Weights, moments and step count are what they were; the sound steps before and after change
    them."""
    done = subprocess.run([sys.executable, "-c", SPOIL], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "PJRT_DEVICE": "CPU"})
    expected = ["True", "False", "False", "True", "True", "False"]
    assert done.stdout.split()[-6:] == expected, done.stdout + done.stderr


@pytest.mark.slow
@needs_xla
def test_xla_and_the_cpu_continue_each_other(plain, on_xla):
    """Checkpoints carry no trace of the device they come from."""
    folder, longer = plain[0], [word if word != "12" else "15" for word in DDPM]
    on_xla(2)
    for name, copy in (("plain", "here"), ("xla2", "there")):
        shutil.copytree(folder / "runs" / name, folder / "runs" / copy)
    for out, xla_cores in (("runs/there", None), ("runs/here", 2)):
        assert f"resumed: {out} at step 12" in run(folder, "train_ddpm", *longer, "--out", out,
                                                   xla_cores=xla_cores)
    assert furthest(folder / "runs/there", folder / "runs/here") < 1e-5


@needs_xla
def test_xla_samples_with_two_graphs_at_most(plain):
    """One graph for a call of the network, guided or not, whatever the number of steps and slices;
    the same volume as on the CPU up to rounding."""
    folder, counts = plain[0], {}
    for steps, guidance in ((3, 1), (6, 1), (6, 2)):
        words = ["sample", "--checkpoint", "runs/plain", "--labels", "runs/phantoms/A", "--count",
                 "2", "--steps", steps, "--guidance", guidance]
        text = run(folder, *words, "--out", f"xla_{steps}_{guidance}", xla_cores=2)
        found = re.search(r"XLA compiled (\d+) graphs .* CPU: nothing", text)
        counts[steps, guidance] = int(found[1])
    # one more puts the weights there
    assert counts[3, 1] == counts[6, 1] <= 2 and counts[6, 2] <= 3, counts
    run(folder, *words, "--out", "cpu_6_2")
    a, b = [nifti.read_case(nifti.find_cases(folder / name)[1])[0].astype(int)
            for name in ("xla_6_2", "cpu_6_2")]
    assert abs(a - b).max() <= 0.02 * b.max() and b.max() > 100


@needs_xla
def test_xla_segments_like_the_cpu(plain_seg):
    """The same losses to a hundredth (ReLUs turn rounding into flips); the step is compiled
    once."""
    folder, alone = plain_seg
    text = run(folder, "train_seg", *SEG, "--out", "runs/xla_seg", xla_cores=2)
    assert losses(text)[0] == pytest.approx(losses(alone)[0], rel=1e-5)
    assert losses(text) == pytest.approx(losses(alone), rel=1e-2)
    compiled = [int(n) for n in re.findall(r"compiled (\d+)\n", text)]
    assert len(compiled) == 4 and len(set(compiled)) == 1, text
    assert "run on the CPU: nothing" in text, text


@needs_xla
def test_xla_without_a_tpu_is_said(tmp_path):
    """XLA on the CPU is only for those who ask for it."""
    environment = {k: v for k, v in os.environ.items() if k != "PJRT_DEVICE"}
    for more, words in (({}, "there is no TPU"), ({"PJRT_DEVICE": "TPU"}, "xla on TPU: ")):
        done = subprocess.run([sys.executable, ROOT / "train_ddpm.py", "--device", "xla"],
                              cwd=tmp_path, text=True, env={**environment, **more}, timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 2 and words in done.stdout, done.stdout
        assert "Traceback" not in done.stdout
        assert not list(tmp_path.iterdir())
