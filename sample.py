"""Make synthetic four-modality brain MRI from label maps with a trained generator; close the loop;
judge.

    python sample.py                                        fresh phantoms' label maps, 4 cases
    python sample.py --checkpoint runs/ddpm --labels DIR --count 4 --steps 20 --out synthetic
    python sample.py --request et=12,ed=40 --count 20       label maps come from runs/labels, as
    asked python sample.py --scan CASE_DIR --segmenter runs/seg --checkpoint runs/ddpm --out loop
    python sample.py --judge synthetic --segmenter runs/seg python sample.py --audit synthetic
    --checkpoint runs/ddpm

Reads     a checkpoint of train_ddpm.py; label maps (and brain outlines) from BraTS cases in
          --labels, as they are or edited; or scans without labels, which --segmenter of
          train_seg.py labels first
Writes    out/BraTS-SYN-00000-000/...: t1n, t1c, t2w, t2f and seg as NIfTI (and classes, if the
          condition has more than tumour, not with --native), a JSON sidecar that says how the case
          was made; beside them contact_sheet.png (loop.png), dataset.json, DATASHEET.md; --judge:
          judge.json, judge.png; --audit: audit.json, audit.png, pairs.png, which shows real scans
Again     the same command makes only what is missing; finished cases are never touched
"""
from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import brainsyn as bs
from kit import audit, checks, devices, edits, files, judging, metrics, nifti, phantoms, pictures, requests, runs, slices, writing

FRESH = 500_000                                 # phantoms for labels come from this seed on


def parse_arguments(argv=None):
    """All flags; argv: list of words, the command line by default."""
    default, names = bs.SAMPLING, (*bs.LABELS, *bs.REGIONS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("label maps")
    data.add_argument("--labels", help="folder of BraTS cases whose label maps are used, in an "
                      "order shuffled by --seed; without it those of fresh phantoms")
    data.add_argument("--part", choices=["train", "val", "test"], help="only of this part of the "
                      "split of --labels")
    data.add_argument("--split", help="JSON file with case or patient names for train, val, test")
    data.add_argument("--skip-bad", action="store_true", help="check the cases first and leave bad "
                      "ones out, as in training")
    data.add_argument("--count", type=int, default=4, help="how many cases to make")
    data.add_argument("--native", action="store_true", help="write on the label map's own grid, "
                      "not the model's")
    data.add_argument("--scan", help="folder of scans without labels: segmented, then synthesised "
                      "(the closed loop)")
    data.add_argument("--request", metavar="NAME=VALUE,...", help="label maps are generated: mL of "
                      "et, ed, ncr (and ventricles, if both generators have them), place of the "
                      "tumour x, y, z (mm from the middle of the brain to the right, front and "
                      "top), sphericity, lesions; et=12 or et=5..30 (evenly spread over --count); "
                      "the rest is left open")
    data.add_argument("--label-checkpoint", default="runs/labels", help="run of train_ddpm.py "
                      "--generate labels")
    data.add_argument("--label-guidance", type=float, default=2.0, help="guidance scale of "
                      "--request, 1 for none")
    edit = parser.add_argument_group("edited label maps")
    edit.add_argument("--edit", nargs="+", default=[], metavar="WORD",
                      help="scale=1.2 shift=10,0,0 (mm) rotate=15 (degrees) elastic=3 (mm) "
                      "mirror drop=NCR add=ED, or random alone")
    edit.add_argument("--paste", metavar="DIR", help="cases whose tumours (of --part, if given) "
                      "are put into the brains of --labels")
    edit.add_argument("--balance", choices=names, help="spread this volume evenly over the --count "
                      "cases, by choice and scale")
    edit.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"),
                      help="mL that --balance spans (default: what the label maps span)")
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", default="runs/ddpm", help="folder of a run, or a checkpoint "
                       "file")
    model.add_argument("--segmenter", nargs="+", default=["runs/seg"],
                       help="run of train_seg.py, for --scan and --judge; with five or more, "
                       "--judge asks how well synthetic cases rank them")
    model.add_argument("--steps", type=int, default=default["steps"],
                       help="network calls a slice (twice where guided)")
    model.add_argument("--sampler", choices=["ddim", "ddpm", "dpmpp"], default=default["sampler"])
    model.add_argument("--eta", type=float, default=default["eta"], help="noise added by ddim: 0 "
                       "none .. 1 as ddpm")
    model.add_argument("--guidance", type=float, default=default["guidance"],
                       help="guidance scale, 1 for none")
    model.add_argument("--rescale", type=float, default=default["rescale"],
                       help="how far guidance keeps contrast")
    model.add_argument("--interval", type=float, nargs=2, default=default["interval"],
                       metavar=("LOW", "HIGH"), help="guidance acts while t/T lies between these")
    model.add_argument("--coherence", type=float, default=default["coherence"],
                       help="mm along z over which noise agrees; 0: every slice on its own")
    judge = parser.add_argument_group("judging and auditing")
    judge.add_argument("--judge", metavar="SYN", help="folder of synthetic cases to judge, instead "
                       "of making some")
    judge.add_argument("--audit", metavar="SYN", help="folder of synthetic cases to search for "
                       "copies of training cases of --checkpoint; exit 1 if it leaks")
    judge.add_argument("--canaries", type=int, default=8, help="training cases planted as copies, "
                       "to see whether the audit finds them; 0 for none")
    judge.add_argument("--mark", action="store_true", help="write the audit into the sidecars and "
                       "the datasheet")
    judge.add_argument("--data", help="real cases to judge or audit by (as in training); without "
                       "it phantoms")
    judge.add_argument("--phantoms", type=int, default=60, help="how many phantoms that is")
    judge.add_argument("--scanner", choices=sorted(phantoms.SCANNERS), default="A",
                       help="centre they come from")
    run = parser.add_argument_group("run")
    run.add_argument("--out", help="output folder (default synthetic; of --audit audit)")
    run.add_argument("--seed", type=int, default=0, help="noise follows from it and the case "
                     "number")
    run.add_argument("--batch", type=int, default=32, help="slices a network call, for memory only")
    run.add_argument("--device", default="auto", choices=devices.DEVICES,
                     help="auto takes the fastest of cuda, mps and cpu; xla is TPUs")
    args = parser.parse_args(argv)
    args.out = args.out or ("audit" if args.audit else "synthetic")
    files.require_positive(args, "count", "steps", "batch", "phantoms")
    if args.steps > bs.T or not 0 <= args.eta <= 1:
        raise bs.BadInput(f"--steps goes up to {bs.T}, --eta from 0 to 1")
    if args.eta and args.sampler != "ddim":
        raise bs.BadInput(f"--eta is the noise that ddim adds and {args.sampler} does not know it: "
                          "add --sampler ddim")
    if args.range and not 0 < args.range[0] < args.range[1]:
        raise bs.BadInput("--range wants two volumes in mL, the smaller one first")
    if args.part and not args.labels or args.paste and args.balance or args.range and not args.balance:
        raise bs.BadInput("--part needs --labels, --range needs --balance, and --paste goes "
                          "without --balance")
    if args.request is not None:
        if args.labels or args.scan or args.edit or args.paste or args.balance:
            raise bs.BadInput("--request makes label maps of its own: it goes without --labels, "
                              "--scan, --edit, --paste and --balance")
        args.request = requests.parse_request(args.request)
    if args.edit != ["random"]:
        edits.parse_edit(args.edit)                # says now what is wrong with it
    return args


def cases_of_part(args, folder):
    """The real cases in a folder, of --part alone where it is given."""
    cases = checks.usable_cases(folder, True) if args.skip_bad else nifti.find_cases(folder)
    checks.refuse_synthetic(cases)
    if args.part:
        cases = slices.split_patients(cases, args.split)[args.part]
    if not cases:
        raise bs.BadInput(f"{folder}: no case is in part {args.part}; choose another --part or "
                          "--split")
    return cases


def label_sources(args, scratch, scanner):
    """Function: number of a synthetic case -> the Case whose label map and outline it gets; and all
    there are."""
    if args.labels:
        cases = cases_of_part(args, args.labels)
        order = np.random.default_rng(args.seed).permutation(len(cases))
        return lambda number: cases[order[number % len(cases)]], cases

    def fresh(number):
        folder = Path(scratch) / str(number)
        if not folder.exists():
            phantoms.write_phantom(folder, FRESH + number, scanner)
        return nifti.find_cases(folder)[0]

    return fresh, [fresh(number) for number in range(args.count if args.balance else 0)]


def plan(args, number, of_number, donors, volumes):
    """What synthetic case `number` is made of: a namespace with case (gives scans and outline),
    donor (gives the tumour), relabel (as prepare_case wants it, or None), facts for the sidecar,
    and applied: the edit as it was carried out, filled in by relabel.

    donors: cases for --paste; volumes: [(Case, mL)] for --balance.
    """
    key = [args.seed, number]
    edit = edits.random_edit(np.random.default_rng([*key, 1])) if args.edit == [
        "random"] else edits.parse_edit(args.edit)
    case, relabel, asked, applied = of_number(number), None, {}, dict(edit)
    donor = case
    if args.balance:
        low, high = args.range or (min(ml for _, ml in volumes), max(ml for _, ml in volumes))
        target = round(edits.balanced_target(number, args.count, low, high), 2)
        # on lengths: mild ones first
        factor = [(target / ml) ** (1 / 3) for _, ml in volumes]
        near = [i for i, f in enumerate(factor) if 0.7 < f < 1.4] or [
            int(np.argmin(np.abs(np.log(factor))))]
        case = donor = volumes[near[int(np.random.default_rng([*key, 2]).integers(len(near)))]][0]
        asked = {args.balance: target}

        def relabel(labels, brain, affine):
            out, scaled = edits.edit_to_volume(labels, affine, brain, args.balance, target, edit,
                                               [*key, 3])
            applied.update(scaled)
            return out
    elif args.paste:
        others = [c for c in donors if c.case != case.case] or donors
        donor = others[number % len(others)]

        def relabel(labels, brain, affine):
            scans, tumour, its_affine = nifti.read_case(donor)
            place = edits.relative_place(tumour, its_affine, slices.brain_mask(scans, donor.folder),
                                         brain, affine)
            applied["place"] = place.round(2).tolist()
            return edits.edit_labels(tumour, its_affine, brain, applied,
                                  np.random.default_rng([*key, 3]), affine)
    elif edit:
        def relabel(labels, brain, affine):
            return edits.edit_labels(labels, affine, brain, edit, np.random.default_rng([*key, 3]))
    return SimpleNamespace(case=case, donor=donor, relabel=relabel, applied=applied, got=None,
                           trained_on=(), data="phantoms",
                           facts={"Edits": edit, "Pasted": bool(args.paste), "RequestedML": asked})


def label_generator(args, device, state):
    """The LabelGenerator of --label-checkpoint, if it can serve this request and this generator of
    images."""
    model = requests.load_label_generator(args.label_checkpoint, device)
    requests.require_condition(model.condition, state["condition"])
    for condition, folder in ((model.condition, args.label_checkpoint),
                              (state["condition"], args.checkpoint)):
        if "ventricles" in args.request and condition != "ventricles":
            raise bs.BadInput(f"--request ventricles: {folder} was not trained with --condition "
                              "ventricles")
    return model


def on_request(args, number, model, state):
    """Synthetic case `number` from a label map that is generated as --request asks; see plan.
    model: a LabelGenerator; state: the checkpoint of the image generator."""
    settings = {**bs.SAMPLING, "guidance": args.label_guidance}
    wanted = requests.requested(args.request, number, args.count, args.seed)

    def got():
        classes = requests.sample_labels(model, wanted, (args.seed, number, "labels"), settings)
        return requests.prepare_labels(classes, model.condition, model.step, state["resolution"],
                                       state["fov"], state["condition"])

    volumes = (*bs.LABELS, *["ventricles"] * (state["condition"] == "ventricles"))
    asked = {name: round(value, 2) for name, value in zip(requests.ASKED, wanted.tolist()) if value
             == value}
    return SimpleNamespace(case=None, donor=None, relabel=None, applied={}, got=got,
                           trained_on=model.trained_on, data=model.data,
                           facts={"Edits": {}, "Pasted": False, "Requested": asked,
                                  "RequestedML": {name: ml for name, ml in asked.items()
                                                  if name in volumes},
                                  "LabelGuidance": args.label_guidance,
                                  "LabelGeneratorPatients": model.patients,
                                  "LabelCheckpointSHA256": model.digest})


def make_case(args, number, its, denoiser, state, facts):
    """Sample one case as planned (see plan) and write it. Returns what was prepared, the images
    float (D, C, R, R), the sidecar, and slice-to-slice roughness of (source scans, sample); of
    labels that were generated (its.got) there are no scans and the first is NaN."""
    got = its.got() if its.got else slices.prepare_case(its.case, state["resolution"], state["fov"],
                                                        state["condition"], its.relabel)
    grid, classes = got["grid"], torch.from_numpy(got["classes"]).long()                # (D, R, R)
    thickness = float(nifti.spacing_of(grid.affine)[2])
    brain = torch.where((classes > 0).any(2).any(1))[0]
    brain = slice(int(brain[0]), int(brain[-1]) + 1)        # slices below and above are air
    images = torch.full((len(classes), len(state["modalities"]), *classes.shape[1:]), -1.0)
    images[brain] = bs.sample_volume(denoiser, classes[brain],
                                     torch.from_numpy(got["position"][brain]), thickness,
                                     (args.seed, number), sampling(args))
    if args.native:
        # (D, C, H, W)
        written = np.moveaxis(grid.grow(np.moveaxis(images.numpy(), 1, 0)), 0, 1)
        labels, outline, affine = slices.to_slices(got["labels"]), slices.to_slices(
            got["brain"]), grid.affine
        every = None                                        # known on the model's grid alone
    else:
        every = slices.from_slices(got["classes"]) if state["condition"] != "tumour" else None
        labels = bs.tumour_labels(got["classes"], state["condition"])
        written, outline, affine = images, got["classes"], grid.model_affine()
    counts, labels = writing.image_counts(written, outline), slices.from_slices(labels).astype(
        np.uint8)
    of_donor = got["hashes"] if its.donor is its.case else slices.hashes_of(its.donor)
    trained_on = sorted({*state["trained_on"], *its.trained_on})
    # mL, of the model's grid
    voxel = (state["fov"] / state["resolution"]) ** 2 * thickness / 1000
    fluid = {"ventricles": round(int((classes == 2).sum()) * voxel, 3)} if state[
        "condition"] == "ventricles" else {}
    facts = {"LabelMapSHA256": of_donor[0], "BrainSHA256": got["hashes"][1], **facts,
             "EditsApplied": its.applied, "UsedInTraining": bool({*got["hashes"], *of_donor}
                                                                 & set(trained_on)),
             "VolumesML": fluid | {name: round(edits.volume_ml(labels, affine, name), 3)
                                   for name in (*bs.LABELS, "TC", "WT")},
             "GeneratorTrainedOn": [digest[:16] for digest in trained_on],
             "GeneratorPatients": state["patients"], "GeneratorData": "patients"
             if "patients" in (state["data"], its.data) else "phantoms",
             "GeneratorVersion": state["version"]}
    if every is not None:
        facts["Classes"] = list(bs.CONDITIONS[state["condition"]])
    writing.write_case(args.out, facts["Case"], slices.from_slices(np.moveaxis(counts, 1, 0)),
                       labels, affine, facts, every)
    before = float("nan") if its.got else judging.roughness(bs.to_images(got["images"]), classes)
    return got, images, facts, (before, judging.roughness(images, classes))


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
        raise bs.BadInput(f"{sidecar}: cannot be read ({error}); delete the case's folder to make "
                          "it again") from error
    if not isinstance(had, dict):
        raise bs.BadInput(f"{sidecar}: is not a sidecar; delete the case's folder to make it again")
    differ = [k for k in facts if had.get(k) != facts[k]]
    if differ:
        raise bs.BadInput(f"{sidecar.parent} was made with {differ[0]} {had.get(differ[0])}, you "
                          f"ask for {facts[differ[0]]}; choose another --out")
    return True


def fullest(ill, brain):
    """The slice with most tumour, and of several the one with most brain: bool (D, R, R) each ->
    its number."""
    return int((ill.sum((1, 2)) * 1000 + brain.sum((1, 2))).argmax())


def contact_sheet(folder):
    """out/contact_sheet.png from the files as written: per case the slice with most tumour."""
    rows = []
    for case in nifti.find_cases(folder)[:12]:
        scans, labels, _ = nifti.read_case(case)
        brain = (scans > 0).any(0)
        classes = slices.to_slices(np.where(labels > 0, labels + 1, brain).astype(int))
        best = fullest(classes > 1, classes > 0)
        rows.append([classes[best], *(slices.to_slices(scans)[:, best] / 500 - 1)])
    pictures.draw_rows(Path(folder) / "contact_sheet.png", rows, ["labels", *bs.MODALITIES],
                       "tumour", "SYNTHETIC: made by brainsyn, no patient was scanned")


def finish_set(folder):
    """What stands beside the cases of a set: contact sheet, list of cases for other tools,
    datasheet."""
    contact_sheet(folder)
    writing.write_dataset_json(folder)
    writing.write_datasheet(folder)


def generator_of(args, device):
    """-> (Denoiser, checkpoint, what a sidecar says of model and settings)."""
    denoiser, state = runs.load_generator(args.checkpoint, device, args.batch)
    common = {"SyntheticData": "YES", "Generator": f"brainsyn {bs.__version__}",
              "CheckpointSHA256": files.file_hash(state["file"]), "Seed": args.seed,
              **{k.capitalize(): v for k, v in sampling(args).items()},
              "Condition": state["condition"], "Grid": "native" if args.native else "model",
              "LabelMaps": ("segmented" if args.scan else "cases" if args.labels else "phantoms"
                            if args.request is None else "generated")}
    return denoiser, state, common


def make_set(args, device):
    """Make the cases that are missing, then draw the contact sheet of all."""
    denoiser, state, common = generator_of(args, device)
    model = None if args.request is None else label_generator(args, device, state)
    rough, made, asked = [], 0, {}
    # first: a set that is cut short is marked as well
    writing.write_description(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        of_number, everyone = label_sources(args, scratch, state["args"]["scanner"])
        donors = [c for c in (cases_of_part(args, args.paste) if args.paste else [])
                  if nifti.read_labels(c)[0].any()]
        volumes = [(c, edits.volume_ml(*nifti.read_labels(c), args.balance)) for c in everyone
                   if args.balance]
        volumes = [(case, ml) for case, ml in volumes if ml > 0]
        if args.paste and not donors or args.balance and not volumes:
            raise bs.BadInput("no label map shows what --paste or --balance asks for; use other "
                              "cases")
        for number in range(args.count):
            its = on_request(args, number, model, state) if model else plan(args, number, of_number,
                                                                            donors, volumes)
            facts = json.loads(json.dumps({"Case": f"BraTS-SYN-{number:05d}-000", **common,
                                           **its.facts}))
            if args.labels and (Path(args.out) / facts["Case"]).exists():
                # another --labels must not pass for this one
                facts["LabelMapSHA256"] = slices.hashes_of(its.donor)[0]
                facts["BrainSHA256"] = slices.hashes_of(its.case)[1]
            if already_there(args.out, facts):
                continue
            started = time.time()
            _, _, facts, pair = make_case(args, number, its, denoiser, state, facts)
            rough.append(pair)
            for name, ml in facts["RequestedML"].items():
                asked.setdefault(name, []).append((ml, facts["VolumesML"][name]))
            made += 1
            print(f"{facts['Case']}: {time.time() - started:.0f} s, "
                  + ("".join(f"{name} {facts['VolumesML'][name]:.1f} mL for {ml:.1f}, " for name,
                             ml in facts["RequestedML"].items())) + "slice-to-slice roughness "
                  f"{pair[1]:.3f}" + ("" if model else ", of the scans its labels come from "
                                      f"{pair[0]:.3f}"), flush=True)
    finish_set(args.out)
    print(f"made {made} cases, {args.count - made} were there already")
    if rough:
        real, synthetic = np.mean(rough, 0)
        print(f"slice-to-slice roughness: {synthetic:.3f}")
        if not model:
            print(f"slice-to-slice roughness of the source volumes: {real:.3f}")
    for name, pairs in asked.items():
        wanted, got = np.array(pairs).T
        error = np.abs(wanted - got).mean()
        print(f"{name}: asked {wanted.min():.1f} to {wanted.max():.1f} mL, mean error {error:.2f} "
              "mL" + (f", correlation {metrics.rank_correlation(wanted, got):.3f}" if np.ptp(wanted)
                      else ""))
    for name in ("", "contact_sheet.png", "dataset.json", "DATASHEET.md"):
        print(f"wrote: {Path(args.out) / name}")


def close_loop(args, device):
    """A scan without labels -> segmented -> a new case synthesised from the predicted labels; a
    picture."""
    denoiser, state, common = generator_of(args, device)
    segmenter, rows = runs.load_segmenter(args.segmenter[0], device), []
    common["SegmenterSHA256"] = segmenter.digest
    cases = nifti.find_cases(args.scan, labelled=False)
    writing.write_description(args.out)
    for number, case in enumerate(cases):
        # labels that lie there are not looked at
        case.files.pop("seg", None)
        got = slices.prepare_case(case, segmenter.resolution, segmenter.fov, "tumour")
        predicted = segmenter.segment(got)
        of_labels, of_brain = slices.case_hashes(predicted, got["brain"])
        facts = json.loads(json.dumps({"Case": f"BraTS-SYN-{number:05d}-000", **common,
                                       "LabelMapSHA256": of_labels, "BrainSHA256": of_brain}))
        if already_there(args.out, facts):
            print(f"{facts['Case']} is there already")
            continue
        # whose it is stands on screen alone
        path = Path(args.out) / "predictions" / f"scan_{number:05d}.nii.gz"
        nifti.write_labels(path, predicted, case, got["grid"].affine)
        volumes = {name: edits.volume_ml(predicted, got["grid"].affine, name) for name in bs.LABELS}
        print(f"{case.case}: " + ", ".join(f"{name} {ml:.1f} mL" for name, ml in volumes.items())
              + f" -> {path}")
        its = SimpleNamespace(case=case, donor=case, relabel=lambda *_: predicted, applied={},
                              got=None, trained_on=(), data="phantoms")
        got, images, *_ = make_case(args, number, its, denoiser, state, facts)
        labels = bs.tumour_labels(got["classes"], state["condition"])
        at = fullest(labels > 0, got["classes"] > 0)
        scans = bs.to_images(got["images"][at]).numpy()
        rows += [[*scans], [pictures.overlay(scan, labels[at]) for scan in scans], [*images[at]]]
    if not rows:
        return
    finish_set(args.out)
    pictures.draw_rows(Path(args.out) / "loop.png", rows, bs.MODALITIES, "tumour",
                 "scan, predicted labels, SYNTHETIC")
    print(f"wrote: {args.out}\nwrote: {Path(args.out) / 'loop.png'}")


def main(argv=None):
    """One of the four: judge a set, audit it, close the loop over scans, make a set."""
    args = parse_arguments(argv)
    device = devices.pick_device(args.device)
    print(devices.describe(device), flush=True)
    given = args.judge or args.audit
    if given and not Path(given).is_dir():
        raise bs.BadInput(f"{given}: no such folder; make synthetic cases first")
    with files.sole_writer(args.judge or args.out):
        if args.judge:
            judging.judge(args, device)
        elif args.audit:
            denoiser, state, _ = generator_of(args, device)
            audit.audit_folder(args, denoiser, state, sampling(args))
        elif args.scan:
            close_loop(args, device)
        else:
            make_set(args, device)


if __name__ == "__main__":
    files.run_script(main)
