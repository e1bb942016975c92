"""Make synthetic four-modality brain MRI from label maps with a trained generator.

    python sample.py                                        fresh phantoms' label maps, 4 cases
    python sample.py --checkpoint runs/ddpm --labels DIR --count 4 --steps 20 --out synthetic

Reads     a checkpoint of train_ddpm.py; label maps (and brain outlines) from BraTS cases in --labels
Writes    out/BraTS-SYN-00000-000/...: t1n, t1c, t2w, t2f and seg as NIfTI, a JSON sidecar that says
          how the case was made, and out/contact_sheet.png
Again     the same command makes only what is missing; finished cases are never touched
"""
from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import brainsyn as bs

FRESH = 500_000                                 # phantoms for labels come from this seed on


def parse_arguments(argv=None):
    """All flags; argv: list of words, the command line by default."""
    default = bs.SAMPLING
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--labels", help="folder of BraTS cases whose label maps are used, in the order of "
                      "their names; without it those of fresh phantoms")
    data.add_argument("--count", type=int, default=4, help="how many cases to make")
    data.add_argument("--native", action="store_true", help="write on the label map's own grid, not the model's")
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", default="runs/ddpm", help="folder of a run, or a checkpoint file")
    model.add_argument("--steps", type=int, default=default["steps"], help="network calls a slice (twice where guided)")
    model.add_argument("--sampler", choices=["ddim", "ddpm", "dpmpp"], default=default["sampler"])
    model.add_argument("--eta", type=float, default=default["eta"], help="noise added by ddim: 0 none .. 1 as ddpm")
    model.add_argument("--guidance", type=float, default=default["guidance"], help="guidance scale, 1 for none")
    model.add_argument("--rescale", type=float, default=default["rescale"], help="how far guidance keeps contrast")
    model.add_argument("--interval", type=float, nargs=2, default=default["interval"], metavar=("LOW", "HIGH"),
                       help="guidance acts while t/T lies between these")
    model.add_argument("--coherence", type=float, default=default["coherence"],
                       help="mm along z over which noise agrees; 0: every slice on its own")
    run = parser.add_argument_group("run")
    run.add_argument("--out", default="synthetic", help="output folder")
    run.add_argument("--seed", type=int, default=0, help="noise follows from it and the case number")
    run.add_argument("--batch", type=int, default=32, help="slices a network call, for memory only")
    run.add_argument("--device", default="auto", choices=bs.DEVICES, help="auto takes the fastest there is")
    args = parser.parse_args(argv)
    bs.require_positive(args, "count", "steps", "batch")
    if args.steps > bs.T or not 0 <= args.eta <= 1:
        raise bs.BadInput(f"--steps goes up to {bs.T}, --eta from 0 to 1")
    return args


def label_source(number, sources, scratch, scanner):
    """The Case whose label map synthetic case `number` gets: one of --labels, or a fresh phantom."""
    if sources:
        return sources[number % len(sources)]
    folder = Path(scratch) / str(number)
    bs.write_phantom(folder, FRESH + number, scanner)
    return bs.find_cases(folder)[0]


def make_case(args, number, case, denoiser, state, facts):
    """Sample one case and write it. Returns slice-to-slice roughness of (source scans, sample)."""
    got = bs.prepare_case(case, state["resolution"], state["fov"], state["condition"])
    grid, classes = got["grid"], torch.from_numpy(got["classes"]).long()                # (D, R, R)
    thickness = float(np.linalg.norm(grid.affine[:3, 2]))
    brain = torch.where((classes > 0).any(2).any(1))[0]
    brain = slice(int(brain[0]), int(brain[-1]) + 1)        # slices below and above are air
    images = torch.full((len(classes), len(state["modalities"]), *classes.shape[1:]), -1.0)
    images[brain] = bs.sample_volume(denoiser, classes[brain], torch.from_numpy(got["position"][brain]),
                                     thickness, (args.seed, number), sampling(args), args.batch)
    if args.native:
        written = np.moveaxis(grid.grow(np.moveaxis(images.numpy(), 1, 0)), 0, 1)       # (D, C, H, W)
        labels, outline, affine = bs.to_slices(got["labels"]), bs.to_slices(got["brain"]), grid.affine
    else:
        first_lesion = len(state["classes"]) - len(bs.LABELS)
        labels = np.clip(got["classes"].astype(int) - first_lesion + 1, 0, None)
        written, outline, affine = images, got["classes"], grid.model_affine()
    counts = bs.image_counts(written, outline)
    digest = bs.label_hash(got["labels"])                   # maps without tumour are all the same one
    facts = {**facts, "LabelMapSHA256": digest,
             "LabelMapUsedInTraining": bool(got["labels"].any()) and digest in state["trained_on"]}
    bs.write_case(args.out, facts["Case"], bs.from_slices(np.moveaxis(counts, 1, 0)),
                  bs.from_slices(labels).astype(np.uint8), affine, facts)
    source = torch.from_numpy(got["images"]).float() / 127.5 - 1
    return bs.roughness(source, classes), bs.roughness(images, classes)


def sampling(args):
    """The settings of sample_volume that these arguments ask for."""
    return {**bs.SAMPLING, "steps": args.steps, "sampler": args.sampler, "eta": args.eta,
            "guidance": args.guidance, "rescale": args.rescale, "interval": list(args.interval),
            "coherence": args.coherence}


def already_there(folder, facts):
    """Whether a case is there, made as `facts` says; BadInput where it was made otherwise."""
    sidecar = Path(folder) / facts["Case"] / f"{facts['Case']}.json"
    if not sidecar.parent.exists():
        return False
    try:
        had = json.loads(sidecar.read_text())
    except (OSError, ValueError) as error:
        raise bs.BadInput(f"{sidecar}: cannot be read ({error}); delete the case's folder to make it again") from error
    if not isinstance(had, dict):
        raise bs.BadInput(f"{sidecar}: is not a sidecar; delete the case's folder to make it again")
    differ = [k for k in facts if had.get(k) != facts[k]]
    if differ:
        raise bs.BadInput(f"{sidecar.parent} was made with {differ[0]} {had.get(differ[0])}, you ask for "
                          f"{facts[differ[0]]}; choose another --out")
    return True


def contact_sheet(folder):
    """out/contact_sheet.png from the files as written: per case the slice with most tumour."""
    rows = []
    for case in bs.find_cases(folder)[:12]:
        scans, labels, _ = bs.read_case(case)
        brain = (scans > 0).any(0)
        classes = bs.to_slices(np.where(labels > 0, labels + 1, brain).astype(int))
        best = int(((classes > 1).sum((1, 2)) * 1000 + (classes > 0).sum((1, 2))).argmax())
        rows.append([classes[best], *(bs.to_slices(scans)[:, best] / 500 - 1)])
    bs.draw_rows(Path(folder) / "contact_sheet.png", rows, ["labels", *bs.MODALITIES], "tumour",
                 "SYNTHETIC: made by brainsyn, no patient was scanned")


def main(argv=None):
    """Make the cases that are missing, then draw the contact sheet of all."""
    args = parse_arguments(argv)
    device = bs.pick_device(args.device)
    state = bs.load_checkpoint(args.checkpoint)
    net = bs.UNet(**state["network"])
    net.load_state_dict(state["ema"])
    net = net.to(device, memory_format=torch.channels_last).eval()
    denoiser = bs.Denoiser(net, state["prior"], bs.cosine_alpha_bar(state["shift"]), device)
    common = {"SyntheticData": "YES", "Generator": f"brainsyn {bs.__version__}",
              "CheckpointSHA256": hashlib.sha256(Path(state["file"]).read_bytes()).hexdigest(), "Seed": args.seed,
              **{k.capitalize(): v for k, v in sampling(args).items()},
              "Condition": state["condition"], "Grid": "native" if args.native else "model",
              "LabelMaps": "cases" if args.labels else "phantoms", "Edits": []}
    common = json.loads(json.dumps(common))                 # as it will be read back
    sources = bs.find_cases(args.labels) if args.labels else None
    rough, made = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.count):
            facts = {"Case": f"BraTS-SYN-{number:05d}-000", **common}
            if sources:                                     # another --labels must not pass for this one
                case = sources[number % len(sources)]
                labels = bs.standard_labels(bs.read_nifti(case.files["seg"])[0], case.modern, case.files["seg"])
                facts["LabelMapSHA256"] = bs.label_hash(labels)
            if already_there(args.out, facts):
                continue
            started = time.time()
            case = label_source(number, sources, scratch, state["args"]["scanner"])
            rough.append(make_case(args, number, case, denoiser, state, facts))
            made += 1
            print(f"{facts['Case']}: {time.time() - started:.0f} s, slice-to-slice roughness "
                  f"{rough[-1][1]:.3f}, of the scans its labels come from {rough[-1][0]:.3f}", flush=True)
    contact_sheet(args.out)
    print(f"made {made} cases, {args.count - made} were there already")
    if rough:
        real, synthetic = np.mean(rough, 0)
        print(f"slice-to-slice roughness: {synthetic:.3f}\nslice-to-slice roughness of the source volumes: {real:.3f}")
    print(f"wrote: {args.out}\nwrote: {Path(args.out) / 'contact_sheet.png'}")


if __name__ == "__main__":
    bs.run_script(main)
