"""Flags as tables, those that several scripts share, and the kinds of numbers that flags take."""
import argparse
import contextlib
import functools

import brainsyn as bs
from kit import devices, phantoms


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a BadInput: one sentence. doc: the docstring of the command, whose
    first paragraph --help shows; rows: the flags, in the order of --help.

    A row is (flag, kind, default, help). kind: a function of the text (str, count, ...); bool for a
    flag without a value; or a list, tuple or dict of the only values. A fifth entry is a dict of
    more keywords for argparse: nargs, metavar. --help shows a default that is a value.
    """

    def __init__(self, doc, rows):
        super().__init__(description=doc.split("\n\n")[0])
        for row in rows:
            self.add_flag(*row)

    def add_flag(self, flag, kind, default, text, settings={}):
        """Add one row."""
        if kind is bool:
            return self.add_argument(flag, action="store_true", help=text)
        choices = None if callable(kind) else list(kind)
        kind = type(choices[0]) if choices else kind
        if default not in (None, []):
            text += " (default: %(default)s)"
        self.add_argument(flag, type=kind, choices=choices, default=default, help=text, **settings)

    def error(self, message):
        """Raise argparse's message as a BadInput."""
        raise bs.BadInput(message.removeprefix("argument "))

    def parse_training(self, argv, flag, defaults):
        """parse_args of a training script. defaults: {value of `flag`: {name: default that goes
        with it}}. --steps has none where --minutes is given."""
        args = self.parse_args(argv)
        self.set_defaults(**defaults.get(getattr(args, flag), {}))
        if args.minutes:
            self.set_defaults(steps=None)
        return self.parse_args(argv)


def number(kind, low, high, text):
    """Text of the command line -> int or float in low..high. ArgumentTypeError otherwise."""
    with contextlib.suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    what = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")


# Kinds of numbers: functions of the text.
count = functools.partial(number, int, 1, float("inf"))
natural = functools.partial(number, int, 0, float("inf"))
positive = functools.partial(number, float, 1e-12, 1e12)
fraction = functools.partial(number, float, 0, 1)

# Flags of every script: the real cases or phantoms it works on, and what it runs with.
COMMON = [
    ("--data", str, None, "folder of BraTS cases; without it phantoms are made"),
    ("--phantoms", count, 60, "how many phantom cases to make"),
    ("--scanner", sorted(phantoms.SCANNERS), "A", "centre the phantoms come from"),
    ("--split", str, None, "JSON file with case or patient names for train, val, test"),
    ("--skip-bad", bool, False, "leave out cases of --data that the check rejects"),
    ("--seed", natural, 0, "all random numbers follow from it"),
    ("--device", devices.DEVICES, "auto", "auto: the fastest of cuda, mps and cpu; xla for TPUs")]
# Flags of both training scripts. --steps and --ema, with their own defaults, are theirs.
TRAINING = [
    ("--resolution", count, 64, "pixels a side of a slice"),
    ("--fov", positive, 192.0, "width of a slice in mm"),
    ("--tumour-share", fraction, 0.5, "fraction of training slices that show tumour"),
    ("--minutes", positive, None, "end after this many minutes in the loop"),
    ("--batch", count, 16, "slices a step"),
    ("--lr", positive, 2e-3, "peak learning rate"),
    ("--precision", devices.PRECISIONS, "auto", "of layers; auto: bfloat16 where that is fast")]
