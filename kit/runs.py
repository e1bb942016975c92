"""Training runs on disk: checkpoints, resuming, the log, the pace, published weights.
"""
from __future__ import annotations

import csv
import json
import math
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

import brainsyn as bs
from kit import devices, files, metrics, pictures


WEIGHTS_URL = "https://download.pytorch.org/models/"
WEIGHTS = {18: "resnet18-f37072fd.pth", 34: "resnet34-b627a593.pth", 50: "resnet50-11ad3fa6.pth"}


def inflate(weight, channels):
    """First convolution (O, 3, h, w) of a network for colour pictures -> (O, channels, h, w): each
    channel gets the sum over colours / channels, so that a grey picture gives the same
    activation."""
    return weight.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels


def load_encoder(encoder, depth, source):
    """Put published ResNet weights into a ResNet of this depth. source: path of a state dict in
    torchvision's names, or "imagenet": torchvision's own file, downloaded once, its hash checked.

    Strict: every name and shape must fit (fc.* aside, conv1 is inflated). BadInput otherwise.
    """
    try:
        if source == "imagenet":
            state = torch.hub.load_state_dict_from_url(WEIGHTS_URL + WEIGHTS[depth],
                                                       map_location="cpu", check_hash=True,
                                                       weights_only=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        state["conv1.weight"] = inflate(state["conv1.weight"], encoder.conv1.in_channels)
        encoder.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(
            error).__name__
        if source == "imagenet":
            raise bs.BadInput(f"--weights imagenet: {WEIGHTS_URL}{WEIGHTS[depth]} cannot be had ({reason}); download "
                           "it where there is a network and give its path") from error
        raise bs.BadInput(f"{source}: no weights of a ResNet-{depth} in torchvision's names ({reason}); give the file "
                       f"{WEIGHTS[depth]} or leave --weights out") from error


# Arguments that are paths stay out of checkpoints; hashes and digests say what lay there.
PATHS = ("data", "label_maps", "split", "out", "synthetic", "weights")
# What may differ when a run is resumed.
# of runs from before
NEW_ARGUMENTS = {"generate": "images", "relatives": 512, "label_steps": 0, "arms": None}
FREE_TO_CHANGE = {*PATHS, "device", "precision", "compile", "steps", "minutes", "guidance",
                  "sample_every", "skip_bad"}


def kept_arguments(args):
    """What of the arguments goes into a checkpoint: all but paths."""
    return {k: v for k, v in vars(args).items() if k not in PATHS}


def resume(args, kind, trained_on, net, ema, optimizer):
    """Continue the run in args.out if there is one -> its checkpoint, weights already loaded, else
    None. BadInput where that run had other settings or other training cases."""
    if not list(Path(args.out).glob("checkpoint*.pt")):
        return None
    state = load_checkpoint(args.out, kind)
    asked, had = vars(args), state["args"]
    had = {**NEW_ARGUMENTS, **had}
    differ = [k for k in asked if k not in FREE_TO_CHANGE and asked[k] != had.get(k)]
    if differ:
        raise bs.BadInput(f"{args.out} holds a run with "
                          + ", ".join(f"{k} {had.get(k)}" for k in differ) + ", you ask for "
                          + ", ".join(f"{k} {asked[k]}" for k in differ)
                          + "; choose another --out, or delete the folder")
    if state["trained_on"] != trained_on:
        raise bs.BadInput(f"{args.out} holds a run on other training cases; choose another --out, "
                          "or delete the folder")
    try:
        net.load_state_dict(state["weights"])
        # its state alone: whether it is fused is the device's affair
        fresh, kept = optimizer.state_dict(), state["optimizer"]["state"]
        optimizer.load_state_dict({**fresh, "state": kept})
        whole = {i: its.keys() for i, its in fresh["state"].items()}
        if state["ema"].keys() != ema.weights.keys() or {i: its.keys() for i,
                                                         its in kept.items()} != whole:
            raise ValueError("averaged weights or moments are missing")
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise bs.BadInput(f"{state['file']}: does not fit the network ({str(error).splitlines()[0]}); delete the folder "
                       "to begin anew") from error
    ema.weights = state["ema"]
    for p, its in optimizer.state.items():
        # laid out like p: fused kernels pair numbers by place in memory
        for name in its.keys() - {"step"}:
            its[name] = torch.empty_like(p).copy_(its[name])
    print(f"resumed: {args.out} at step {state['step']}")
    return state


class Pace:
    """How far a run is, whether steps, minutes in the loop, or both bound it, and when what is
    due."""

    def __init__(self, args, step=0, seconds=0.0):
        self.steps, self.minutes, self.step, self.seconds = args.steps, args.minutes, step, seconds
        self.start, self.clock, self.last = time.time(), time.time() - seconds, {}

    def progress(self):
        """Share of the run that is over, 0..1 and beyond."""
        return max(self.step / self.steps if self.steps else 0.0,
                   self.seconds / (60 * self.minutes) if self.minutes else 0.0)

    def tick(self):
        """One step is done."""
        self.step, self.seconds = self.step + 1, devices.agreed(time.time() - self.clock)

    def due(self, what, every):
        """True once in `every` seconds, for each `what`."""
        if time.time() - self.last.get(what, self.start) <= every:
            return False
        self.last[what] = time.time()
        return True

    def say(self, text):
        """Print a line: the step, `text`, the time left."""
        left = max(0.0, self.seconds / max(self.progress(), 1e-6) - self.seconds)
        print(f"step {self.step:05d}{f'/{self.steps}' if self.steps else ''} | {text} | "
              f"{f'{left / 60:.0f}m' if left > 90 else f'{left:.0f}s'} left", flush=True)


class Guard:
    """What happens after a step whose loss or gradient was not finite, and which was therefore left
    out: it is named; three in a row go back to the last checkpoint; where that does not lead
    further, the run ends."""

    def __init__(self):
        self.row, self.reached = 0, -1          # bad steps in a row; where the last ones were

    def sound(self, finite, step, names):
        """Whether step number `step` was sound; if not it is said which cases were in it (names:
        function)."""
        if finite:
            self.row = 0
            return True
        self.row += 1
        print(f"step {step:05d} | loss or gradient not finite, nothing learned | cases "
              f"{', '.join(names())}", flush=True)
        return False

    def go_back(self, step):
        """Whether to go back to the last checkpoint. BadInput where the run came no further since
        the last time."""
        if self.row < 3:
            return False
        if step <= self.reached:
            raise bs.BadInput(f"step {step}: loss or gradient not finite in three steps in a row, "
                              "again after going back to the last checkpoint; lower --lr, try "
                              "--precision float32, look at the cases named above")
        self.row, self.reached = 0, step
        return True


def save_state(path, state):
    """torch.save of a state, on the CPU, so that it loads anywhere. A full disk arrives as an
    OSError."""
    with open(path, "wb") as handle:
        try:
            torch.save(devices.to_host(state), handle)
        except RuntimeError as error:           # what torch makes of the OSError of a write
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(
                str(error)) from error


def save_checkpoint(folder, state):
    """Write state to folder/checkpoint.pt, whole or not at all; the one before it is kept as
    checkpoint.previous.pt. Plain tensors, numbers, strings, lists and dicts only."""
    newest, previous = Path(folder) / "checkpoint.pt", Path(folder) / "checkpoint.previous.pt"

    def write(temporary):
        save_state(temporary, state)
        if newest.exists():
            second = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
            try:
                # a second name: never a moment without two checkpoints
                os.link(newest, second)
            except OSError:                     # a file system without hard links
                shutil.copy2(newest, second)
            os.replace(second, previous)

    files.replace_file(newest, write)


# kind of checkpoint: who writes it. "segmenter" is best.pt, "seg" what a run continues from.
SCRIPT = {"ddpm": "train_ddpm.py", "labels": "train_ddpm.py --generate labels",
          "seg": "train_seg.py", "segmenter": "train_seg.py"}
# What each kind holds. PUBLISHED is the part that goes into an .npz: all that sampling or
# segmenting needs, and what it owes to whom; a run also needs RESUMED to go on.
PUBLISHED = {"ddpm": {"kind", "version", "step", "args", "network", "ema", "prior", "condition",
                      "classes", "modalities", "shift", "resolution", "fov", "trained_on",
                      "patients", "data"}, "segmenter": {"kind", "version", "step", "args",
                                                         "network", "weights", "resolution", "fov",
                                                         "seen", "dice"}}
PUBLISHED["labels"] = PUBLISHED["ddpm"] | {"measured"}
RESUMED = {"seconds", "weights", "ema", "optimizer", "trained_on"}
HOLDS = {"ddpm": PUBLISHED["ddpm"] | RESUMED, "labels": PUBLISHED["labels"] | RESUMED,
         "segmenter": PUBLISHED["segmenter"],
         "seg": {"kind", "version", "step", "args", "network", "best"} | RESUMED}


def load_checkpoint(path, kind="ddpm", say=print, names=("checkpoint.pt",
                                                         "checkpoint.previous.pt")):
    """The state in a checkpoint file, or in the first sound one of `names` in a run's folder; its
    entry "file" says which was read. kind: what script it must come from, see SCRIPT.

    Every byte is checked (torch.load alone reads flipped bits in silence) and nothing but data is
    unpickled. BadInput when there is none or none is sound.
    """
    path = Path(path)
    candidates = [path / name for name in names] if path.is_dir() else [path]
    candidates, faults = [p for p in candidates if p.exists()], []
    for candidate in candidates:
        try:
            with zipfile.ZipFile(candidate) as archive:         # .pt and .npz are both zip archives
                if archive.testzip():
                    raise ValueError("a checksum does not match")
            state = (read_published(candidate) if candidate.suffix == ".npz" else
                     torch.load(candidate, map_location="cpu", weights_only=True))
            if not isinstance(state, dict) or state.get("kind") != kind:
                raise ValueError(f"it is no checkpoint of kind {kind}")
            missing = (PUBLISHED if candidate.suffix == ".npz" else HOLDS)[kind] - set(state)
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            if faults:
                say(f"note: {faults[0]}; continuing from {candidate.name}, step {state['step']}")
            return {**state, "file": str(candidate)}
        except Exception as error:
            faults.append(f"{candidate} cannot be used ({str(error).splitlines()[0]})")
    raise bs.BadInput("; ".join(faults) + "; train again or use another checkpoint" if faults else
                   f"{path}: no checkpoint there; train one first with python {SCRIPT[kind]}")


def publish(run, path):
    """Write the weights of a run's folder (or of its checkpoint) as .npz: arrays and one JSON text,
    no pickle -> its sha256. sample.py takes it as --checkpoint or --segmenter, two of them in a
    folder, "coarse.npz" and "fine.npz", as --label-checkpoint."""
    kinds, names = ("labels", "ddpm"), ("checkpoint.pt", "checkpoint.previous.pt")
    if (Path(run) / "best.pt").exists() or Path(run).name == "best.pt":
        kinds, names = ("segmenter",), ("best.pt",)
    for kind in kinds:
        try:
            state = load_checkpoint(run, kind, names=names)
            break
        except bs.BadInput:
            if kind == kinds[-1]:
                raise
    arrays, facts = {}, {}
    for name in sorted(PUBLISHED[kind]):
        its = state[name]
        if name in ("ema", "weights", "prior"):
            arrays.update({f"{name}/{key}": tensor.numpy() for key, tensor in its.items()})
        else:
            facts[name] = its

    def write(temporary):
        with open(temporary, "wb") as handle:
            np.savez(handle, about=np.array(json.dumps(facts)), **arrays)

    files.replace_file(path, write)
    return files.file_hash(path)


def read_published(path):
    """What publish wrote -> the state, as load_checkpoint returns it. Any pickle in the file is
    refused."""
    with np.load(path, allow_pickle=False) as archive:
        state = json.loads(archive["about"].item())
        for name in archive.files:
            group, _, key = name.partition("/")
            if name != "about":
                state.setdefault(group, {})[key] = torch.from_numpy(archive[name])
    return state


def load_generator(path, device, batch=32, kind="ddpm"):
    """The generator of a run's folder or of a file of weights -> (Denoiser with the averaged
    weights, checkpoint). batch: slices a call of the network; kind "labels": a generator of labels.
    BadInput where there is none."""
    state = load_checkpoint(path, kind)
    net = bs.UNet(**state["network"])
    net.load_state_dict(state["ema"])
    net = devices.place_network(net.eval(), device)
    return bs.Denoiser(net, state["prior"], bs.cosine_alpha_bar(state["shift"]), device, batch,
                       devices.to_device), state


def load_segmenter(path, device):
    """The Segmenter in a run's folder or in its best.pt. BadInput where there is none."""
    state = load_checkpoint(path, "segmenter", names=("best.pt",))
    net = bs.ResUNet(**state["network"])
    net.load_state_dict(state["weights"])
    net = devices.place_network(net.eval(), device)
    return metrics.Segmenter(net, state["resolution"], state["fov"], device,
                             frozenset(state["seen"]), files.file_hash(state["file"]))


QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


class LogBook:
    """Losses since the last line, one line a time on the screen, the same fields in log.csv.

    more: names of further columns. With QUARTERS the loss is also kept in four bins of t (quarters
    of the range, clean to noisy): the mean alone hides which noise levels still learn. Nothing is
    read from the device until a line is due. Of several processes all add, and the first one alone
    writes.
    """

    def __init__(self, folder, step, more=QUARTERS):
        self.path, self.losses, self.since = Path(folder) / "log.csv", [], (step, time.time())
        self.fields = ("step", "loss", *more, "lr", "images_per_s", "seconds")
        if not devices.first_process():
            return
        old = [r for r in read_log(self.path) if r["step"] <= step]     # after a kill: none twice
        with open(self.path, "w", newline="") as handle:
            writer = csv.DictWriter(handle, self.fields)
            writer.writeheader()
            writer.writerows(old)

    def add(self, losses, t=None):
        """losses float (B,) or (1,), and with QUARTERS t int (B,), on any device; every process
        calls it."""
        everyones = [devices.gathered(its) for its in (losses.detach(), t) if its is not None]
        if devices.first_process():
            self.losses.append(everyones)

    def line(self, step, lr, batch, seconds, more=()):
        """Write one row and return (its fields, the text `loss 0.0312 | lr 2.0e-04 | 41 img/s`).
        more: the values of the further columns, unless they are QUARTERS."""
        losses, *t = [torch.cat(its) for its in zip(*devices.to_host(self.losses))] or [
            torch.tensor([math.nan])]
        # no step was sound: no loss, no noise level
        if not t and self.fields[2:6] == QUARTERS:
            t = [torch.ones(1)]
        if t:
            quarter = (t[0] - 1) * 4 // bs.T
            more = [losses[quarter == q].mean().item() if (quarter == q).any() else math.nan
                    for q in range(4)]
        speed = (step - self.since[0]) * batch / max(time.time() - self.since[1], 1e-6)
        self.losses, self.since = [], (step, time.time())
        row = dict(zip(self.fields, (step, losses.mean().item(), *more, lr, speed, seconds)))
        def write():
            with open(self.path, "a", newline="") as handle:
                csv.DictWriter(handle, self.fields).writerow(
                    {k: v if k == "step" else f"{v:.6g}" for k, v in row.items()})

        files.attempt(self.path, write)
        return row, f"loss {row['loss']:.4f} | lr {lr:.1e} | {speed:.0f} img/s"


def read_log(path):
    """log.csv -> list of dicts of numbers, empty when there is no file yet."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as handle:
        return [{k: int(v) if k == "step" else float(v) for k, v in row.items()}
                for row in csv.DictReader(handle)]


def report(args, closing):
    """The end of a run: curves.png, closing.json and the same figures on screen."""
    out, log = Path(args.out), read_log(Path(args.out) / "log.csv")
    quarters = ("cleanest quarter of t", "second", "third", "noisiest quarter")
    what = "squared error of v" + (" in units of the prior's" if args.loss == "unit" else "")
    pictures.draw_lines(out / "curves.png", [(what, "log",
                                              {label: ([r["step"] for r in log],
                                                       [r[name] for r in log]) for name,
                                               label in zip(QUARTERS, quarters)})])
    files.write_json(out / "closing.json", closing)
    for name, value in closing.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    for name in ("checkpoint.pt", "samples.png", "curves.png", "log.csv", "closing.json"):
        print(f"wrote: {out / name}")
