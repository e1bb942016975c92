"""Flags as tables, those that several scripts share, and the kinds of numbers that flags take."""
import argparse
import contextlib
import functools
import re

import brainsyn as bs
from kit import devices, nifti, phantoms


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a BadInput: one sentence. doc: the docstring of the command, whose
    first paragraph --help shows; rows: the flags, in the order of --help.

    A row is (flag, or two of the same meaning, kind, default, help). kind: a function of the text
    (str, count, ...); bool for a flag without a value; or a list, tuple or dict of the only values.
    A text of kind str may not be empty. A fifth entry is a dict of more keywords for argparse:
    nargs, metavar. --help shows a default that is a value.
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
        kind = type(choices[0]) if choices else filled if kind is str else kind
        if default not in (None, []):
            text += " (default: %(default)s)"
        self.add_argument(*flag.split(), type=kind, choices=choices, default=default, help=text,
                          **settings)

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


def filled(text):
    """The text. ArgumentTypeError where it is empty, as of a variable that was never set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; did a variable have no value?")
    return text


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

def label_map(text):
    """"1=ET,2=NCR" or "lesion=1" -> the text without spaces. It says what the values in files of
    labels are; "background" is no label. ArgumentTypeError where it does not."""
    for word in text.replace(" ", "").split(","):
        if not re.fullmatch(r"\d{1,2}=[A-Za-z][\w-]*|[A-Za-z][\w-]*=\d{1,2}", word):
            raise argparse.ArgumentTypeError(f"{word!r} names no label, as 1=NCR does")
    return text.replace(" ", "")


def names_in(modalities=None, text=None):
    """--modalities, a list, and --label-map, a text (None: those of BraTS) -> (modalities, labels,
    {value in files: number of a label}), as bs.use_names and nifti.LABEL_VALUES take them.

    Labels that are all among BraTS's keep the numbers of BraTS; others are numbered in the order of
    their values. BadInput where a name comes twice or means healthy brain.
    """
    pairs = [sorted(word.split("="), key=str.isdecimal) for word in (text or "").split(",") if word]
    values = {int(value): name for name, value in pairs}
    labels = [values[value] for value in sorted(values) if values[value] != "background"]
    brats = {name.lower(): name for name in bs.BRATS[1]}
    if set(map(str.lower, labels)) <= set(brats):
        values = {value: brats.get(name.lower(), name) for value, name in values.items()}
        labels = bs.BRATS[1]
    labels = tuple(dict.fromkeys(labels))
    modalities = tuple(nifti.kind_of(name) for name in modalities or bs.BRATS[0])
    healthy = {name for classes in bs.CONDITIONS.values() for name in classes} - {*bs.LABELS}
    if len(values) < len(pairs) or len({*modalities}) < len(modalities) or healthy & {*labels}:
        raise bs.BadInput("--modalities, --label-map: each name and value once, none of healthy "
                          "brain")
    numbers = {name: k for k, name in enumerate(labels, 1)}
    return modalities, labels, {value: numbers.get(name, 0) for value, name in values.items()}


def use_names(modalities=None, text=None):
    """Set what this process reads and writes, see names_in."""
    *names, nifti.LABEL_VALUES = names_in(modalities, text)
    bs.use_names(*names)


# Flags of every script: the real cases or phantoms it works on, and what it runs with.
LABEL_MAP = ("--label-map --labels-are", label_map, None, "what values in label files are: "
             "1=ET,2=NCR,4=ED, or lesion=1; background for none")
MODALITIES = ("--modalities", str, None, "which scans are used, in this order (default: t1 t1ce t2 "
              "flair)", {"nargs": "+"})
COMMON = [
    ("--data", str, None, "folder of BraTS cases; without it phantoms are made"),
    ("--phantoms", count, 60, "how many phantom cases to make"),
    ("--scanner", sorted(phantoms.SCANNERS), "A", "centre the phantoms come from"),
    ("--split", str, None, "JSON file with case or patient names for train, val, test"),
    LABEL_MAP,
    ("--skip-bad", bool, False, "leave out cases of --data that the check rejects"),
    ("--seed", natural, 0, "all random numbers follow from it"),
    ("--device", devices.DEVICES, "auto", "auto: the fastest of cuda, mps and cpu; xla for TPUs")]
# Flags of both training scripts. --steps and --ema, with their own defaults, are theirs.
TRAINING = [
    MODALITIES,
    ("--resolution", count, 64, "pixels a side of a slice"),
    ("--fov", positive, 192.0, "width of a slice in mm"),
    ("--tumour-share", fraction, 0.5, "fraction of training slices that show tumour"),
    ("--minutes", positive, None, "end after this many minutes in the loop"),
    ("--batch", count, 16, "slices a step"),
    ("--lr", positive, 2e-3, "peak learning rate"),
    ("--precision", devices.PRECISIONS, "auto", "of layers; auto: bfloat16 where that is fast")]
