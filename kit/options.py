"""Flags as tables, those that several scripts share, and the kinds of numbers that flags take."""
import argparse
import functools

import brainsyn as bs
from kit import devices, phantoms


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a BadInput: one sentence. doc: the docstring of the command, whose
    first paragraph --help shows; groups: {title: rows}.

    A row is (flag, kind, default, help). kind: a function of the text (str, count, ...); bool for a
    flag without a value; or a list, tuple or dict of the only values. A fifth entry is a dict of
    more keywords for argparse: nargs, metavar. --help shows a default that is a value.
    """

    def __init__(self, doc, groups):
        super().__init__(description=doc.split("\n\n")[0])
        for title, rows in groups.items():
            group = self.add_argument_group(title)
            for row in rows:
                self.add_flag(group, *row)

    def add_flag(self, group, flag, kind, default, text, settings={}):
        """Add one row to a group of argparse."""
        if kind is bool:
            return group.add_argument(flag, action="store_true", help=text)
        if isinstance(kind, (list, tuple, dict)):
            given = {"choices": list(kind), "type": type(next(iter(kind)))}
        else:
            given = {"type": kind}
        if default not in (None, []):
            text += " (default: %(default)s)"
        group.add_argument(flag, default=default, help=text, **given, **settings)

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
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if low <= value <= high:
        return value
    what = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")


# Kinds of numbers: functions of the text.
count = functools.partial(number, int, 1, float("inf"))
natural = functools.partial(number, int, 0, float("inf"))
positive = functools.partial(number, float, 1e-12, 1e12)
fraction = functools.partial(number, float, 0, 1)

# Which real cases or phantoms a command works on.
DATA = [
    ("--data", str, None, "folder of BraTS cases; without it phantoms are made"),
    ("--phantoms", count, 60, "how many phantom cases to make"),
    ("--scanner", sorted(phantoms.SCANNERS), "A", "centre the phantoms come from"),
    ("--split", str, None, "JSON file with case or patient names for train, val, test"),
    ("--skip-bad", bool, False, "leave out cases of --data that the check rejects")]
# Slices of both training scripts.
GRID = [
    ("--resolution", count, 64, "pixels a side of a slice"),
    ("--fov", positive, 192.0, "width of a slice in mm"),
    ("--tumour-share", fraction, 0.5, "fraction of training slices that show tumour")]
# Both training scripts; --steps and --ema, with their own defaults, are theirs.
OPTIMISATION = [
    ("--minutes", positive, None, "end after this many minutes in the loop"),
    ("--batch", count, 16, "slices a step"),
    ("--lr", positive, 2e-3, "peak learning rate"),
    ("--precision", devices.PRECISIONS, "auto",
     "of the layers in training; auto takes bfloat16 where it is fast")]
# Every script.
RUN = [
    ("--seed", natural, 0, "all random numbers follow from it"),
    ("--device", devices.DEVICES, "auto",
     "auto takes the fastest of cuda, mps and cpu; xla is for TPUs")]
