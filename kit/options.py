"""Flags that several scripts share, and the kinds of numbers that flags take."""
from __future__ import annotations

import argparse

import brainsyn as bs
from kit import devices, phantoms


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """The text of --help: a flag's default stands behind its help, where it has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, whose errors are a BadInput: one sentence."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n\n")[0], formatter_class=Help)

    def error(self, message):
        raise bs.BadInput(message.removeprefix("argument "))


def number(text, kind, low, high=float("inf")):
    """Text of the command line -> int or float in low..high. ArgumentTypeError otherwise."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        limits = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} {limits}")
    return value


def count(text):
    """A whole number of at least 1."""
    return number(text, int, 1)


def natural(text):
    """A whole number of at least 0."""
    return number(text, int, 0)


def positive(text):
    """A number above 0."""
    return number(text, float, 1e-12, 1e12)


def fraction(text):
    """A number from 0 to 1."""
    return number(text, float, 0, 1)


def add_data(parser, n_phantoms=60):
    """The group "data": which real cases or phantoms a command works on. n_phantoms: the default
    of --phantoms. Returns the group."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="folder of BraTS cases; without it phantoms are made")
    group.add_argument("--phantoms", type=count, default=n_phantoms,
                       help="how many phantom cases to make")
    group.add_argument("--scanner", choices=sorted(phantoms.SCANNERS), default="A",
                       help="centre the phantoms come from")
    group.add_argument("--split", help="JSON file with case or patient names for train, val, test")
    group.add_argument("--skip-bad", action="store_true",
                       help="leave out cases of --data that the check rejects")
    return group


def add_grid(group):
    """Size of slices, and the fraction of training slices with tumour."""
    group.add_argument("--resolution", type=count, default=64, help="pixels a side of a slice")
    group.add_argument("--fov", type=positive, default=192.0, help="width of a slice in mm")
    group.add_argument("--tumour-share", type=fraction, default=0.5,
                       help="fraction of training slices that show tumour")


def add_optimisation(parser, steps, ema):
    """The group "optimisation" of both training scripts. steps: words for the default length; ema:
    default decay. Returns the group."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=count, help=f"end after this many steps (default {steps} "
                       "unless --minutes is given)")
    group.add_argument("--minutes", type=positive, help="end after this many minutes in the loop")
    group.add_argument("--batch", type=count, default=16, help="slices a step")
    group.add_argument("--lr", type=positive, default=2e-3, help="peak learning rate")
    group.add_argument("--ema", type=fraction, default=ema,
                       help="decay of the averaged weights a step")
    return group


def add_run(parser, out, seed="all random numbers follow from it", precision=True):
    """The group "run": output folder, seed, device, precision. out: words for its default. Returns
    the group."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", help=f"output folder (default {out})")
    group.add_argument("--seed", type=natural, default=0, help=seed)
    group.add_argument("--device", default="auto", choices=devices.DEVICES,
                       help="auto takes the fastest of cuda, mps and cpu; xla is for TPUs")
    if precision:
        group.add_argument("--precision", default="auto", choices=devices.PRECISIONS,
                           help="of the layers in training; auto takes bfloat16 where it is fast")
    return group


def add_study(parser, arms, patients):
    """The group "study" of train_seg.py. arms: names of its training sets; patients: numbers of
    patients, as words, of the default study."""
    group = parser.add_argument_group("study")
    group.add_argument("--study", action="store_true", help="compare training sets in place of "
                       "training one segmenter; 120 phantoms unless --phantoms is given")
    group.add_argument("--seeds", type=count, default=3, help="trainings of every kind")
    group.add_argument("--patients", nargs="+", help="how many real training patients (default "
                       f"{' '.join(patients)})")
    group.add_argument("--test-scanner", choices=sorted(phantoms.SCANNERS),
                       help="test on the same phantoms in this scanner")
    group.add_argument("--generator-steps", type=count, default=400,
                       help="training steps of each generator")
    group.add_argument("--label-steps", type=natural, default=0, help="training steps of a "
                       "generator of labels; more than 0 adds sets of generated labels, as they "
                       "come and with ET volumes spread evenly")
    group.add_argument("--arms", nargs="+", choices=list(arms), metavar="ARM",
                       help="only these training sets, of: " + "; ".join(arms))
    group.add_argument("--made", type=count, default=24, help="synthetic cases a set")
    group.add_argument("--calls", type=count, default=10, help="network calls a slice when "
                       "they are sampled")
