"""Pictures: slices, label maps, planes, curves.
"""
import functools
import inspect
import itertools

import numpy as np
import torch

import brainsyn as bs
from kit import files


LABEL_COLOURS = {"air": "000000", "brain": "555555", "CSF": "303a60", "grey": "606060",
                 "white": "a0a0a0", "ventricles": "303a60", "NCR": "3b7dd8", "ED": "58b368",
                 "ET": "f2c14e"}                # red, green, blue in hex
SPARE_COLOURS = "f2c14e", "58b368", "3b7dd8", "d1495b", "9b5de5"     # other labels, in turn


def colour_labels(classes, condition):
    """Class map int (H, W), values index CONDITIONS[condition] -> colours float (H, W, 3) in
    0..1."""
    spare = itertools.cycle(SPARE_COLOURS)
    hexes = [LABEL_COLOURS.get(name) or next(spare) for name in bs.CONDITIONS[condition]]
    rgb = [list(bytes.fromhex(colour)) for colour in hexes]
    return np.array(rgb)[np.asarray(classes)] / 255


def overlay(image, labels, strength=0.55):
    """A picture (H, W) in [-1, 1] under its labels int (H, W) in 0..L -> colours (H, W, 3) in
    0..1."""
    grey = np.repeat((np.asarray(image)[..., None] + 1) / 2, 3, -1).clip(0, 1)
    labels = np.asarray(labels, int)
    colour = colour_labels(np.where(labels > 0, labels + 1, 0), "tumour")
    return np.where(labels[..., None] > 0, (1 - strength) * grey + strength * colour, grey)


def fullest(tumour, brain):
    """The slice with most tumour, and of several the one with most brain: bool (D, H, W) each ->
    its number."""
    return int((tumour.sum((1, 2)) * 1000 + brain.sum((1, 2))).argmax())


def upright(view, plane):
    """Slices of a plane (..., H, W) as people look at them: coronal and sagittal ones with the top
    of the head up, sagittal ones with the face to the left."""
    return view if plane == 0 else (view.mT if plane == 2 else view).flip(-2)


def show(*definitions):
    """Print the source of functions or classes, as notebooks do."""
    print("\n\n".join(inspect.getsource(definition).rstrip() for definition in definitions))


def new_figure(path, width, height):
    """A figure of so many inches; where no file is asked for (path None) one of pyplot's, which
    notebooks show."""
    if path is None:
        from matplotlib.pyplot import figure as make
    else:
        from matplotlib.figure import Figure as make
    return make(figsize=(width, height), dpi=110)


def spared(plot):
    """A plot function whose errors, whatever they are, cost a note and not the run, unless it draws
    for a notebook (path None)."""
    @functools.wraps(plot)
    def attempt(path, *inputs, **more):
        faults = () if path is None else Exception
        files.attempt(path, lambda: plot(path, *inputs, **more), faults)

    return attempt


def save_figure(figure, path):
    """Write a figure as PNG, unless path is None."""
    if path is not None:
        files.replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))


@spared
def plot_rows(path, rows, titles, condition, headline=""):
    """A PNG of pictures in a grid; path None: for a notebook. rows: list of lists of tensors or
    arrays: (H, W) of integers are class maps of the condition, of floats images in [-1, 1];
    (H, W, 3) are colours; None leaves a gap. titles: one per column."""
    height = 1.25 * len(rows) + 0.6
    figure = new_figure(path, 1.25 * len(titles), height)
    # axes of their own for every picture would take five times as long
    axes = figure.add_axes((0, 0, 1, 1.25 * len(rows) / height))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image is None:
                continue
            image = np.asarray(image)
            if image.ndim == 2 and image.dtype.kind in "iu":
                image = colour_labels(image, condition)
            high, wide = 0.49 * np.array(image.shape[:2]) / max(image.shape[:2])
            extent = x + 0.5 - wide, x + 0.5 + wide, y + 0.5 + high, y + 0.5 - high
            # the grey scale does not concern colours
            axes.imshow(image, "gray", vmin=-1, vmax=1, extent=extent,
                        interpolation="nearest" if image.ndim == 3 else None)
    for x, title in enumerate(titles):
        axes.text(x + 0.5, -0.03, title, fontsize=7, ha="center", va="bottom")
    axes.set(xlim=(0, len(titles)), ylim=(len(rows), 0))
    axes.axis("off")
    figure.suptitle(headline, fontsize=9, y=1 - 0.06 / height, va="top")
    save_figure(figure, path)


@spared
def plot_planes(path, rows, titles, condition):
    """plot_rows of label volumes cut in three planes through the middle of their tumour, or of the
    volume where it has none: rows of volumes int tensors (D, H, W), each of which becomes a slice
    from below, from the front and from the right. titles: one per volume of a row."""
    lines = []
    for volumes in rows:
        line = []
        for volume in volumes:
            tumour = torch.stack(torch.where(bs.tumour_labels(volume, condition) > 0)).float()
            middle = tumour.mean(1).round() if tumour.numel() else torch.tensor(volume.shape) // 2
            z, y, x = middle.int().tolist()
            line += [volume[z], volume[:, y].flip(0), volume[:, :, x].flip(0), None]
        lines.append(line[:-1])
    columns = [column for title in titles for column in (title, "", "", "")]
    plot_rows(path, lines, columns[:-1], condition)


@spared
def plot_lines(path, panels, xlabel="step", xscale="linear"):
    """A PNG of plots side by side; path None: for a notebook. panels: list of (title, style,
    {label: (x, y) or (x, y, error)}); style: the scale of y, "linear" or "log", for lines; "points"
    for points and, where there is no error, a line."""
    figure = new_figure(path, 4.6 * len(panels) + 1, 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, style, lines) in zip(axes[0], panels):
        for label, (x, y, *error) in lines.items():
            axis.errorbar(x, y, *error, label=label, marker="o" if error else None,
                          ls="" if error and style == "points" else "-", lw=1, capsize=2, ms=3)
        axis.set(xlabel=xlabel, xscale=xscale, yscale="log" if style == "log" else "linear")
        axis.set_title(title, fontsize=9)
        if lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def count_parameters(net):
    """How many numbers are learned."""
    return sum(p.numel() for p in net.parameters())


def layer_table(net, size):
    """Lines of text: every layer of a UNet that holds parameters, in the order of calls, with its
    output shape for one slice of size x size, and how many parameters it has."""
    names = {module: name for name, module in net.named_modules()}
    lines = [f"{'layer':<28} {'output (C, H, W)':<18} parameters"]

    def note(layer, _, output):
        if list(layer.parameters(recurse=False)):
            lines.append(f"{names[layer]:<28} {str(tuple(output.shape[1:])):<18} "
                         f"{count_parameters(layer):>10,}")

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    with torch.no_grad():
        net(torch.zeros(1, (2 * net.around + 1) * net.channels, size, size), torch.ones(1),
            torch.zeros(1, net.classes, size, size), torch.zeros(1, 2))
    hook.remove()
    return [*lines, f"{'total':<28} {'':<18} {count_parameters(net):>10,}"]
