"""What `python brainsyn.py` does: a first look, the check of a folder, publishing weights.
"""
import tempfile

import torch

import brainsyn as bs
from kit import checks, nifti, options, phantoms, pictures, runs, slices

FLAGS = [
    ("folder", str, None, "cases to check; without it, the first look", {"nargs": "?"}),
    options.MODALITIES, options.LABEL_MAP,
    ("--no-labels", bool, False, "check scans alone"),
    ("--publish", str, None, "write the weights of a run as .npz, print the sha256",
     {"nargs": 2, "metavar": ("RUN", "FILE")})]


def first_look():
    """Draw phantom 0 and its noise ladder into runs/first_look.png, print the layer-shape table."""
    with tempfile.TemporaryDirectory() as folder:
        phantoms.write_phantom(folder, 0)
        got = slices.prepare_case(nifti.find_cases(folder)[0], 96, 192.0, "tumour")
    fullest = pictures.fullest(got["classes"] > 1, got["classes"] > 0)
    x0 = bs.to_images(got["images"][fullest])[None]
    eps = torch.randn(x0.shape, generator=bs.generator(0, "ladder"))
    alpha_bar = bs.cosine_alpha_bar(2.0)        # as in training
    rows = [[got["classes"][fullest], *x0[0]]]
    for t in (100, 300, 500, 700, 900, bs.T):
        x_t = bs.add_noise(x0, eps, *bs.signal_sigma(alpha_bar, torch.tensor([t])))
        rows.append([None, *x_t[0]])
    pictures.plot_rows("runs/first_look.png", rows, ["labels", *bs.MODALITIES], "tumour",
                       "phantom 0; below it t = 100, 300, 500, 700, 900, 1000")
    print("\n".join(pictures.layer_table(bs.UNet(around=1), 64)))
    print("a phantom and its noise ladder -> runs/first_look.png")


def main(argv=None):
    """Draw a first look at what this project makes; or check a folder of BraTS cases before
    anything is trained on it."""
    args = options.Parser(main.__doc__, FLAGS).parse_args(argv)
    if args.publish:
        print(f"sha256 {runs.publish(*args.publish)}\nwrote: {args.publish[1]}")
    elif args.folder:
        options.use_names(args.modalities, args.label_map)
        checks.check_folder(args.folder, not args.no_labels)
    else:
        first_look()
