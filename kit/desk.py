"""What `python brainsyn.py` does: a first look, the check of a folder, publishing weights.
"""
from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import brainsyn as bs
from kit import checks, nifti, phantoms, pictures, runs, slices


def first_look():
    """Draw phantom 0 and its noise ladder into runs/first_look.png, print the layer-shape table."""
    with tempfile.TemporaryDirectory() as folder:
        phantoms.write_phantom(folder, 0)
        got = slices.prepare_case(nifti.find_cases(folder)[0], 96, 192.0, "tumour")
    best = int((got["classes"] > 1).sum((1, 2)).argmax())
    x0 = bs.to_images(got["images"][best])[None]
    alpha_bar, eps = bs.cosine_alpha_bar(), torch.randn(x0.shape,
                                                        generator=bs.generator(0, "ladder"))
    rows = [[got["classes"][best], *x0[0]]]
    for t in (100, 300, 500, 700, 900, bs.T):
        x_t = bs.add_noise(x0, eps, *bs.signal_sigma(alpha_bar, torch.tensor([t])))
        rows.append([None, *x_t[0]])
    pictures.draw_rows("runs/first_look.png", rows, ["labels", *bs.MODALITIES], "tumour",
              "phantom 0; below it t = 100, 300, 500, 700, 900, 1000")
    print("\n".join(pictures.layer_table(bs.UNet(), 64)))
    print("a phantom and its noise ladder -> runs/first_look.png")


def main(argv=None):
    """A first look, or the check of a folder."""
    parser = argparse.ArgumentParser(description="Draw a first look at what this file makes; or "
                                     "check a folder of BraTS cases before anything is trained on "
                                     "it.")
    parser.add_argument("folder", nargs="?", help="cases to check; without it, the first look")
    parser.add_argument("--no-labels", action="store_true", help="check scans alone")
    parser.add_argument("--publish", nargs=2, metavar=("RUN", "FILE"),
                        help="write the weights of a run as .npz (of a generator of labels into "
                        "a folder), without pickle, and print the sha256")
    args = parser.parse_args(argv)
    if args.publish:
        run, path = args.publish
        pairs = [(run, path)]
        if (Path(run) / "coarse").is_dir():     # a generator of labels: two networks, into a folder
            if path.endswith(".npz"):
                raise bs.BadInput(f"--publish {path}: a generator of labels is two files; name a "
                                  "folder")
            Path(path).mkdir(parents=True, exist_ok=True)
            pairs = [(Path(run) / part, Path(path) / f"{part}.npz") for part in ("coarse", "fine")]
        elif not path.endswith(".npz"):
            raise bs.BadInput(f"--publish {path}: the file must end in .npz")
        for its in pairs:
            print(f"sha256 {runs.publish(*its)}\nwrote: {its[1]}")
    elif args.folder:
        checks.check_folder(args.folder, not args.no_labels)
    else:
        first_look()
