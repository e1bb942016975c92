"""What `python brainsyn.py` does: a first look, the check of a folder, publishing weights.
"""
from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import brainsyn as bs
from kit import checks, nifti, options, phantoms, pictures, runs, slices


def first_look():
    """Draw phantom 0 and its noise ladder into runs/first_look.png, print the layer-shape table."""
    with tempfile.TemporaryDirectory() as folder:
        phantoms.write_phantom(folder, 0)
        got = slices.prepare_case(nifti.find_cases(folder)[0], 96, 192.0, "tumour")
    fullest = int((got["classes"] > 1).sum((1, 2)).argmax())
    x0 = bs.to_images(got["images"][fullest])[None]
    eps = torch.randn(x0.shape, generator=bs.generator(0, "ladder"))
    alpha_bar = bs.cosine_alpha_bar()
    rows = [[got["classes"][fullest], *x0[0]]]
    for t in (100, 300, 500, 700, 900, bs.T):
        x_t = bs.add_noise(x0, eps, *bs.signal_sigma(alpha_bar, torch.tensor([t])))
        rows.append([None, *x_t[0]])
    pictures.plot_rows("runs/first_look.png", rows, ["labels", *bs.MODALITIES], "tumour",
                       "phantom 0; below it t = 100, 300, 500, 700, 900, 1000")
    print("\n".join(pictures.layer_table(bs.UNet(), 64)))
    print("a phantom and its noise ladder -> runs/first_look.png")


def publish(run, path):
    """Write the weights of a run as one .npz file, those of a generator of labels as two into a
    folder; print their sha256."""
    pairs = [(run, path)]
    labels = (Path(run) / "coarse").is_dir()    # two networks
    if labels == path.endswith(".npz"):
        raise bs.BadInput(f"--publish {path}: name a folder for the two files of a generator of "
                          "labels, a file that ends in .npz for every other run")
    if labels:
        Path(path).mkdir(parents=True, exist_ok=True)
        pairs = [(Path(run) / part, Path(path) / f"{part}.npz") for part in ("coarse", "fine")]
    for source, target in pairs:
        print(f"sha256 {runs.publish(source, target)}\nwrote: {target}")


def main(argv=None):
    """Draw a first look at what this project makes; or check a folder of BraTS cases before
    anything is trained on it."""
    parser = options.Parser(main.__doc__)
    parser.add_argument("folder", nargs="?", help="cases to check; without it, the first look")
    parser.add_argument("--no-labels", action="store_true", help="check scans alone")
    parser.add_argument("--publish", nargs=2, metavar=("RUN", "FILE"),
                        help="write the weights of a run as .npz (of a generator of labels into "
                        "a folder), without pickle, and print the sha256")
    args = parser.parse_args(argv)
    if args.publish:
        publish(*args.publish)
    elif args.folder:
        checks.check_folder(args.folder, not args.no_labels)
    else:
        first_look()
