"""Pictures: slices, label maps, planes, curves.
"""
from __future__ import annotations

import inspect

import numpy as np
import torch

import brainsyn as bs
from kit import files


LABEL_COLOURS = {"air": "#000000", "brain": "#555555", "CSF": "#303a60", "grey": "#606060",
                 "white": "#a0a0a0", "ventricles": "#303a60", "NCR": "#3b7dd8", "ED": "#58b368",
                 "ET": "#f2c14e"}


def colour_labels(classes, condition):
    """Class map int (H, W) -> colour picture float (H, W, 3)."""
    rgb = [[int(LABEL_COLOURS[name][i:i + 2], 16) / 255 for i in (1, 3, 5)]
           for name in bs.CONDITIONS[condition]]
    return np.array(rgb)[np.asarray(classes)]


def show(*its):
    """Print the source of functions or classes, as notebooks do."""
    print("\n\n".join(inspect.getsource(one).rstrip() for one in its))


def new_figure(path, width, height):
    """A figure of so many inches; where no file is asked for (path None) one of pyplot's, which
    notebooks show."""
    if path is None:
        import matplotlib.pyplot as plt
        return plt.figure(figsize=(width, height))
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=110)


def draw_rows(path, rows, titles, condition, headline=""):
    """A PNG of pictures; path None: drawn for a notebook. rows: list of lists of (H, W) tensors or
    arrays; integer ones are class maps, float ones images in [-1, 1], (H, W, 3) colours, None
    leaves a gap. titles: one per column."""
    height = 1.25 * len(rows) + 0.6
    figure = new_figure(path, 1.25 * len(titles), height)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=7)
    for line, row in zip(axes, rows):
        for axis, image in zip(line, row):
            if image is None:
                continue
            image = np.asarray(image)
            if image.ndim == 3:
                axis.imshow(image, interpolation="nearest")
            elif image.dtype.kind in "iu":
                axis.imshow(colour_labels(image, condition), interpolation="nearest")
            else:
                axis.imshow(image, cmap="gray", vmin=-1, vmax=1)
    figure.suptitle(headline, fontsize=9, y=1 - 0.06 / height, va="top")
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.5 / height, 0.02, 0.02)
    if path is not None:
        files.replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def overlay(image, labels, strength=0.55):
    """A picture (H, W) in [-1, 1] under its labels int (H, W) in 0..3 -> colours (H, W, 3) in
    0..1."""
    grey = np.repeat((np.asarray(image)[..., None] + 1) / 2, 3, -1).clip(0, 1)
    labels = np.asarray(labels).astype(int)
    colour = colour_labels(np.where(labels > 0, labels + 1, 0), "tumour")
    return np.where(labels[..., None] > 0, (1 - strength) * grey + strength * colour, grey)


def draw_planes(path, rows, titles, condition):
    """Label volumes cut in three planes through the middle of their tumour: rows of volumes int (D,
    H, W), each becomes a slice from below, from the front and from the right."""
    lines = []
    for volumes in rows:
        line = []
        for volume in volumes:
            ill = torch.stack(torch.where(bs.tumour_labels(volume, condition) > 0)).float()
            z, y, x = ill.mean(1).round().int().tolist() if ill.shape[1] else [n // 2 for n in volume.shape]
            line += [volume[z].long(), volume[:, y].flip(0).long(), volume[:, :, x].flip(0).long(),
                     None]
        lines.append(line[:-1])
    draw_rows(path, lines, [t for title in titles for t in (title, "", "", "")][:-1], condition)


def draw_lines(path, panels, xlabel="step", xscale="linear"):
    """A PNG of plots side by side; path None: drawn for a notebook. panels: list of (title, style,
    {label: (x, y) or (x, y, error)}); style: the scale of y, "linear" or "log", for lines; "points"
    for points and, where there is no error, a line; "bars"."""
    figure = new_figure(path, 4.6 * len(panels) + 1, 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, style, lines) in zip(axes[0], panels):
        for label, (x, y, *error) in lines.items():
            if style == "bars":
                axis.bar(x, y, label=label, width=0.5)
            else:
                axis.errorbar(x, y, *error, label=label, lw=1, capsize=2, marker="o" if error
                              else None, ms=3, ls="" if error and style == "points" else "-")
        axis.set(xlabel=xlabel, title=title, yscale="log" if style == "log" else "linear")
        if xscale != "linear":                  # setting it takes the names off an axis of words
            axis.set_xscale(xscale)
        axis.title.set_fontsize(9)
        if lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    if path is not None:
        files.replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def layer_table(net, size):
    """Lines of text: every layer that holds parameters with its output shape for one slice of
    size x size, and how many parameters it has."""
    lines, total = [f"{'layer':<28} {'output (C, H, W)':<18} parameters"], 0
    shapes, hooks = {}, []

    def note(name):
        def hook(module, inputs, output):
            shapes.setdefault(name, tuple(output.shape[1:]))
        return hook

    for name, module in net.named_modules():
        if not list(module.children()) and list(module.parameters()):
            hooks.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        net(torch.zeros(1, net.channels, size, size), torch.ones(1),
            torch.zeros(1, net.classes, size, size), torch.zeros(1, 1))
    for hook in hooks:
        hook.remove()
    for name, shape in shapes.items():
        count = bs.count_parameters(net.get_submodule(name))
        total += count
        lines.append(f"{name:<28} {str(shape):<18} {count:>10,}")
    return lines + [f"{'total':<28} {'':<18} {total:>10,}"]
