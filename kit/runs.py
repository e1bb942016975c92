"""Training runs on disk: checkpoints, resuming, the log, published weights, and the object that a
training loop keeps them with.
"""
import csv
import io
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

import brainsyn as bs
from kit import devices, files, metrics, options, pictures


# -------------------------------------------------------------------------------- checkpoints ---

# What each kind of checkpoint holds. "ddpm" and "labels" are generators, "seg" is what a run of
# train_seg.py continues from, "segmenter" its best.pt. A published file holds the same without
# TRAINING, what only a run needs to continue.
ALL = {"kind", "version", "step", "args", "network"}
TRAINING = {"seconds", "weights", "optimizer"}
GENERATOR = ALL | TRAINING | {"ema", "prior", "condition", "classes", "modalities", "shift",
                              "resolution", "fov", "trained_on", "patients", "data"}
HOLDS = {"ddpm": GENERATOR, "labels": GENERATOR | {"measured"},
         "seg": ALL | TRAINING | {"ema", "trained_on"},
         "segmenter": ALL | {"weights", "resolution", "fov", "seen", "dice"}}
NEWEST_FIRST = ("checkpoint.pt", "checkpoint.previous.pt")


def save_state(path, state):
    """Save a state with tensors on the CPU, so that it loads anywhere. OSError where the disk is
    full."""
    files.save_tensors(path, devices.to_host(state))


def save_checkpoint(folder, state):
    """Write state to folder/checkpoint.pt, whole or not at all; the checkpoint before it is kept as
    checkpoint.previous.pt. state: plain tensors, numbers, strings, lists and dicts only."""
    newest, previous = [Path(folder) / name for name in NEWEST_FIRST]

    def write(temporary):
        save_state(temporary, state)
        if newest.exists():
            os.replace(newest, previous)

    files.replace_file(newest, write)


def load_checkpoint(path, kind="ddpm", say=print, names=NEWEST_FIRST):
    """The state in a checkpoint file, or in the first sound one of `names` in a run's folder; its
    entry "file" says which was read. kind: the kind it must have, see HOLDS, or a tuple of kinds.

    Every byte is checked (torch.load alone reads flipped bits in silence), and nothing but data is
    unpickled. BadInput when there is no file or none is sound.
    """
    path = Path(path)
    kinds = (kind,) if isinstance(kind, str) else kind
    candidates = [path / name for name in names] if path.is_dir() else [path]
    faults = []
    for candidate in filter(Path.exists, candidates):
        try:
            state = read_state(candidate, kinds)
        except Exception as error:
            faults.append(f"{candidate} cannot be used ({str(error).splitlines()[0]})")
            continue
        if faults:
            say(f"note: {faults[0]}; continuing from {candidate.name}, step {state['step']}")
        return {**state, "file": str(candidate)}
    nothing = f"{path}: no checkpoint there; train one first with train_ddpm.py or train_seg.py"
    raise bs.BadInput("; ".join(faults) or nothing)


def use_names_of(path, text=None):
    """Set what this process reads and writes to what the checkpoint at `path` was trained with.
    text: another --label-map, for files that give the same labels other values."""
    args = load_checkpoint(path, tuple(HOLDS), lambda _: None, ("best.pt", *NEWEST_FIRST))["args"]
    options.use_names(args.get("modalities"), text or args.get("label_map"))


def require_names(state):
    """BadInput unless a checkpoint was trained with the modalities and labels that this process
    uses."""
    args = state["args"]
    modalities, labels, _ = options.names_in(args.get("modalities"), args.get("label_map"))
    if (modalities, labels) != (bs.MODALITIES, bs.LABELS):
        raise bs.BadInput(f"{state['file']} is of {', '.join(modalities + labels)}, not of "
                          f"{', '.join(bs.MODALITIES + bs.LABELS)}; train all with the same "
                          "--modalities and --label-map")


def read_state(path, kinds):
    """The state in a checkpoint (.pt) or a published file (.npz). Any exception where it is
    damaged, of none of these kinds, incomplete, or holds a pickle of more than data."""
    with zipfile.ZipFile(path) as archive:      # both are zip archives
        if archive.testzip():
            raise ValueError("a checksum does not match")
    if path.suffix != ".npz":
        state = torch.load(path, map_location="cpu", weights_only=True)
    else:
        with np.load(path, allow_pickle=False) as archive:
            state = json.loads(archive["about"].item())
            for name in set(archive.files) - {"about"}:
                group, key = name.split("/", 1)
                state.setdefault(group, {})[key] = torch.from_numpy(archive[name])
    if not isinstance(state, dict) or state.get("kind") not in kinds:
        raise ValueError(f"it is no checkpoint of kind {' or '.join(kinds)}")
    published = path.suffix == ".npz" and state["kind"] != "segmenter"
    missing = HOLDS[state["kind"]] - set(state) - (TRAINING if published else set())
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return state


def publish(run, path):
    """Write the weights of a run's folder, or of one of its checkpoints, as .npz -> its sha256.

    The file holds arrays and one JSON text, no pickle: the checkpoint without TRAINING. sample.py
    takes it as --checkpoint or --segmenter; two of them in a folder, "coarse.npz" and "fine.npz",
    as --label-checkpoint.
    """
    state = load_checkpoint(run, ("ddpm", "labels", "segmenter"), names=("best.pt", *NEWEST_FIRST))
    for name in {"file"} if state["kind"] == "segmenter" else {"file", *TRAINING}:
        state.pop(name, None)
    arrays = {f"{group}/{key}": tensor.numpy() for group in ("ema", "prior", "weights")
              for key, tensor in state.pop(group, {}).items()}
    buffer = io.BytesIO()
    np.savez(buffer, about=np.array(json.dumps(state, sort_keys=True)), **arrays)
    files.replace_file(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
    return files.file_hash(path)


def trained_network(kind, state, weights, device):
    """The network in a checkpoint, for use: of this class, with these weights, on the device.
    BadInput where it was trained with other modalities or labels than this process uses."""
    if state["network"].get("depth", 18) not in bs.STAGES:      # of a former version
        raise bs.BadInput(f"{state['file']}: ResNets other than 18 and 34 are gone; train again")
    if kind is bs.UNet and "around" not in state["network"]:
        raise bs.BadInput(f"{state['file']}: of a former version; train again")
    require_names(state)
    net = kind(**state["network"])
    net.load_state_dict(state[weights])
    return devices.place_network(net.eval(), device)


def load_generator(path, device, batch=32, kind="ddpm"):
    """The generator in a run's folder or a file of weights -> (Denoiser with the averaged weights,
    checkpoint). batch: slices a call of the network; kind "labels": a generator of label maps.
    BadInput where there is none."""
    state = load_checkpoint(path, kind)
    net = trained_network(bs.UNet, state, "ema", device)
    return bs.Denoiser(net, state["prior"], bs.cosine_alpha_bar(state["shift"]), device, batch,
                       devices.to_device, devices.result_to_host), state


def load_segmenter(path, device):
    """The Segmenter in a run's folder, its best.pt or a published file. BadInput where there is
    none."""
    state = load_checkpoint(path, "segmenter", names=("best.pt",))
    net = trained_network(bs.ResUNet, state, "weights", device)
    return metrics.Segmenter(net, state["resolution"], state["fov"], device,
                             frozenset(state["seen"]), files.file_hash(state["file"]))


# --------------------------------------------------------------------------------------- runs ---

# Flags that are paths stay out of checkpoints; hashes say what was in the files.
PATHS = ("data", "label_maps", "split", "out", "synthetic")
# Flags that may change when a run is resumed.
FREE_TO_CHANGE = {*PATHS, "device", "precision", "steps", "minutes", "guidance", "sample_every",
                  "skip_bad"}
# Flags of former versions, and the value that a run must have had to be resumed by this one.
DROPPED = {"loss": "unit", "min_snr": 0.0, "lesion_weight": 0.0, "optimizer": "muon",
           "encoder": None}
# Columns of log.csv, and what curves.png calls them.
QUARTERS = {"loss_q1": "cleanest quarter of t", "loss_q2": "second", "loss_q3": "third",
            "loss_q4": "noisiest quarter"}
LINE_EVERY, SAVE_EVERY = 5, 60                  # seconds


def kept_arguments(args):
    """The flags that go into a checkpoint, as a dict: all but paths."""
    return {name: value for name, value in vars(args).items() if name not in PATHS}


def require_same_run(state, args, trained_on):
    """BadInput unless a checkpoint comes from a run with these flags and training cases."""
    asked, had = DROPPED | kept_arguments(args), DROPPED | state["args"]
    differ = [f"{name} {had.get(name)} where you ask for {asked[name]}" for name in asked
              if name not in FREE_TO_CHANGE and asked[name] != had.get(name)]
    if state["trained_on"] != trained_on:
        differ.append("other training cases")
    if differ:
        raise bs.BadInput(f"{args.out} holds a run with {', '.join(differ)}; choose another --out")


class Run:
    """One training run: how far it is, its checkpoints and its log. The loop of a script:

        run = Run(args, kind, net, ema, optimizer, facts)   continues from the folder's checkpoint
        while run.going():
            ...                                             one training step
            run.after_step(finite, losses, case_names, t)
            run.record()
        if run.finish():                                    the first of several processes
            ...                                             pictures and figures

    args: with out, steps, minutes (either bound may be None), batch; kind: see HOLDS; facts: what
    the checkpoint holds beside weights and progress, above all "trained_on"; on resuming they are
    those of the checkpoint. keep: False for a training of which nothing is written.
    Attributes: step, optimiser steps so far; seconds in the loop, former starts included; facts.
    """

    def __init__(self, args, kind, net, ema, optimizer, facts, keep=True):
        self.args, self.kind, self.facts, self.keep = args, kind, facts, keep
        self.net, self.ema, self.optimizer = net, ema, optimizer
        self.step, self.seconds, self.bad_steps = 0, 0.0, 0     # bad steps: in a row
        self.losses, self.levels = [], []       # since the last line of the log
        if keep and any(Path(args.out).glob("checkpoint*.pt")):
            self.resume()
        self.saved_step = self.step             # of the newest checkpoint
        self.log_path = Path(args.out) / "log.csv"
        self.rows = [row for row in read_log(self.log_path) if row["step"] <= self.step]
        self.signals = files.catch_signals() if keep else []
        self.start = time.time() - self.seconds
        self.line_time = self.save_time = time.time()

    def resume(self):
        """Load the newest sound checkpoint. BadInput where it is of a run with other settings or
        training cases, or does not fit."""
        state = load_checkpoint(self.args.out, self.kind)
        require_same_run(state, self.args, self.facts["trained_on"])
        try:
            self.net.load_state_dict(state["weights"])
            self.ema.weights = {name: state["ema"][name] for name in self.ema.weights}
            for i, tensors in self.optimizer.state_dict()["state"].items():
                for name, tensor in tensors.items():
                    tensor.copy_(state["optimizer"]["state"][i][name])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise bs.BadInput(f"{state['file']} does not fit ({error!s:.99}); delete it") from error
        self.facts = {name: state[name] for name in self.facts}
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"resumed: {self.args.out} at step {self.step}")

    def progress(self):
        """The fraction of the run that is over, 0..1 and beyond."""
        bounds = (self.step, self.args.steps), (self.seconds / 60, self.args.minutes)
        return max(done / bound for done, bound in bounds if bound)

    def going(self):
        """True until the run has all its steps or minutes, or a signal came; the same in every
        process."""
        return self.progress() < 1 and not devices.broadcast_from_first(len(self.signals))

    def after_step(self, finite, losses, case_names, t=torch.ones(1)):
        """Count a step, average the weights, keep the losses for the log. For every process.

        finite: from step_if_finite; losses float (B,) or (1,) and t int (B,), this process's, on
        any device; case_names: function of the step's number (0, 1, ...) -> names of the cases in
        its batch. A step that was not finite is reported with its cases; BadInput after three in
        a row.
        """
        self.step += 1
        self.seconds = devices.broadcast_from_first(time.time() - self.start)
        if finite:
            self.bad_steps = 0
            losses, t = [devices.all_gather(values.detach()) for values in (losses, t)]
            if devices.first_process():
                self.ema.update(self.net, self.step)
                self.losses.append(losses)
                self.levels.append(t)
            return
        self.bad_steps += 1
        print(f"step {self.step:05d} | loss or gradient not finite, nothing learned | cases "
              f"{', '.join(case_names(self.step - 1))}", flush=True)
        if self.bad_steps == 3:
            raise bs.BadInput(f"step {self.step}: three in a row not finite; look at the cases, "
                              "lower --lr, or try --precision float32; the same command continues")

    def record(self, val_dice=math.nan):
        """Write a line of the log every five seconds, after a validation and at the end; save every
        minute, unless the step was not finite, and after step 1, which finds a full or read-only
        disk at once. val_dice: of a segmenter, NaN in a step without validation."""
        if not devices.first_process():
            return
        due = self.progress() >= 1 or time.time() - self.line_time >= LINE_EVERY
        if due or not math.isnan(val_dice):
            self.write_line(val_dice)
        if self.step == 1:
            self.save()
        elif not self.bad_steps and time.time() - self.save_time >= SAVE_EVERY:
            self.save_time = time.time()
            files.attempt("the checkpoint", self.save)

    def write_line(self, val_dice=math.nan):
        """One line on the screen and in log.csv, about the steps since the last one. A generator's
        loss is also given in quarters of t, clean to noisy: the mean alone hides which noise levels
        still learn. NaN where there was no loss."""
        losses, t = [torch.cat([torch.zeros(0), *devices.to_host(values)])
                     for values in (self.losses, self.levels)]
        row = {"step": self.step, "loss": losses.mean().item()}
        if self.kind == "seg":
            row["val_dice"] = val_dice
        else:
            quarter = (t - 1) * 4 // bs.T
            row |= {name: losses[quarter == q].mean().item() for q, name in enumerate(QUARTERS)}
        rate = len(self.losses) * self.args.batch / (time.time() - self.line_time + 1e-6)
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "images_per_s": rate,
                "seconds": self.seconds}
        self.rows.append(row)
        files.attempt(self.log_path, lambda: files.write_csv(self.log_path, self.rows))
        self.losses, self.levels, self.line_time = [], [], time.time()
        of_steps = f"/{self.args.steps}" if self.args.steps else ""
        left = max(0.0, self.seconds / max(self.progress(), 1e-6) - self.seconds)
        left = f"{left / 60:.0f}m" if left > 90 else f"{left:.0f}s"
        dice = "" if math.isnan(val_dice) else f" | validation Dice {val_dice:.3f}"
        print(f"step {self.step:05d}{of_steps} | loss {row['loss']:.4f} | lr {row['lr']:.1e} | "
              f"{row['images_per_s']:.0f} img/s{dice} | {left} left", flush=True)

    def save(self):
        """Write the checkpoint."""
        save_checkpoint(self.args.out, {
            "kind": self.kind, "version": bs.__version__, "step": self.step,
            "seconds": self.seconds, "args": kept_arguments(self.args),
            "weights": self.net.state_dict(), "ema": self.ema.weights,
            "optimizer": self.optimizer.state_dict(), **self.facts})
        self.saved_step = self.step

    def finish(self):
        """End the loop: leave the other processes, save, and end the program if a signal came ->
        True in the first process, which goes on alone. See leave_processes."""
        if not devices.leave_processes():
            return False
        if self.keep and self.step != self.saved_step:      # the file's hash names finished runs
            self.save()
        self.end_if_stopped()
        return True

    def end_if_stopped(self):
        """End the program if a signal came."""
        if self.signals:
            print(f"stopped by signal after step {self.step}; the same command continues")
            sys.exit(128 + self.signals[0])


def read_log(path):
    """log.csv -> list of dicts of numbers, empty when there is no file yet."""
    text = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
    rows = csv.DictReader(text.splitlines())
    return [{name: float(row[name]) for name in row} | {"step": int(row["step"])} for row in rows]


def curve(log, column):
    """A column of a log over steps, where it has a value, for plot_lines -> (steps, values)."""
    rows = [row for row in log if not math.isnan(row[column])]
    return [row["step"] for row in rows], [row[column] for row in rows]


def report(args, run, settings, figures, lines):
    """End a generator's run: write curves.png and closing.json (figures, a dict, how long the run
    was, and how many calls the sampler of these settings took), print lines of text and paths."""
    out = Path(args.out)
    log = read_log(out / "log.csv")
    curves = {label: curve(log, name) for name, label in QUARTERS.items()}
    pictures.plot_lines(out / "curves.png",
                        [("squared error of v in units of the prior's", "log", curves)])
    closing = {"steps": run.step, "minutes": round(run.seconds / 60, 2),
               "sampler_calls": settings["steps"]}
    files.write_json(out / "closing.json", closing | figures)
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in closing.items()))
    print("\n".join(lines))
    for name in ("checkpoint.pt", "samples.png", "curves.png", "log.csv", "closing.json"):
        if (out / name).exists():               # a picture may be missing
            print(f"wrote: {out / name}")
