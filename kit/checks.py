"""What `python brainsyn.py DIR` says of a folder of cases, and what training refuses.
"""
from __future__ import annotations

import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np

import brainsyn as bs
from kit import devices, files, nifti, phantoms, slices


def is_synthetic(path):
    """Whether a NIfTI file, or the folder of a case, was made by sample.py. Any mark is enough: its
    name, its header, the sidecar beside it, dataset_description.json beside it or one folder up."""
    path = Path(path)
    folder, volumes = (path, sorted(path.glob("*.nii*"))[:1]) if path.is_dir() else (path.parent,
                                                                                     [path])
    marks = [b"BraTS-SYN-" in bytes(path.name, "utf8")]
    for file in volumes:
        try:
            marks.append(b"SYNTHETIC" in nib.load(file).header["descrip"].item())
        except Exception:                       # unreadable: the reader will say so
            pass
    sidecars = folder.glob("*.json") if path.is_dir() else [folder
                                                            / re.sub(r"-\w+\.nii(\.gz)?$", ".json",
                                                                     path.name)]
    for file in (*sidecars, folder / "dataset_description.json", folder.parent
                 / "dataset_description.json"):
        try:
            facts = json.loads(file.read_text())
            made_by = [its["Name"] for its in facts.get("GeneratedBy", [])]
            marks.append(facts.get("SyntheticData") == "YES" or "brainsyn" in made_by)
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            pass
    return any(marks)


def refuse_synthetic(cases):
    """BadInput if any of these Cases was made by sample.py: it owes to patients who cannot be told
    from its own hash, and a figure on it says nothing about real scans."""
    made = [case for case in cases if is_synthetic(case.folder)]
    if made:
        raise bs.BadInput(f"{made[0].folder}: is a synthetic case, as are {len(made)} of "
                          f"{len(cases)} here; wanted are real ones (or phantoms), for validation "
                          "above all; give synthetic cases to train_seg.py as --synthetic, and "
                          "label maps as they came from patients")


def fit_of_labels(scans, tumour, brain, spacing):
    """How well a tumour lies on what is bright on T2 and FLAIR: its mean brightness where it lies,
    divided by the best it could have anywhere else in the brain (1: it lies best where it is).

    scans float (C, X, Y, Z), tumour and brain bool (X, Y, Z), spacing mm (3,). Every shift is tried
    at once, as a product of Fourier transforms, on every second voxel or fewer. 1 where there is
    too little to tell.
    """
    thin = tuple(slice(None, None, max(1, round(6 / mm))) for mm in spacing)
    tumour, brain = [volume[thin].astype(np.float32) for volume in (tumour & brain, brain)]
    bright, inside = np.zeros(brain.shape, np.float32), brain > 0
    for name in ("t2", "flair"):
        scan = scans[bs.MODALITIES.index(name)][thin]
        bright += np.where(inside, (scan - np.median(scan[inside])) / (scan[inside].std() + 1e-6),
                           0)
    if tumour.sum() < 5:
        return 1.0
    transform = np.fft.rfftn(tumour).conj()
    under, share = [np.fft.irfftn(np.fft.rfftn(volume) * transform, s=brain.shape, axes=(0, 1, 2))
                    / tumour.sum() for volume in (bright, brain)]
    best = np.where(share > 0.95, under, 0).max()
    return float(under[0, 0, 0] / best) if best > 0.5 else 1.0


def touching(labels, value):
    """Share of the voxels of a label that touch healthy brain: labels (X, Y, Z), with -1 for
    air."""
    healthy, near = labels == 0, np.zeros(labels.shape, bool)
    for axis in range(3):
        near |= np.roll(healthy, 1, axis) | np.roll(healthy, -1, axis)
    its = labels == value
    return float((its & near).sum() / max(its.sum(), 1))


def signature(scans, brain):
    """What a head looks like, coarsely, whatever grid it lies on: mean signal of every modality in
    16^3 equal parts of the box around the brain, each modality to mean 0 and spread 1; float32 (C,
    16, 16, 16), 0 where a part is mostly air. scans float (C, X, Y, Z); brain bool (X, Y, Z)."""
    ends = [np.where(brain.any(tuple({0, 1, 2} - {axis})))[0][[0, -1]] for axis in range(3)]
    box = (..., *[slice(low, high + 1) for low, high in ends])
    brain, scans = brain[box], scans[box]

    def parts(volume):
        for axis in (-3, -2, -1):
            edge = np.linspace(0, volume.shape[axis], 17).astype(int)
            wide = np.maximum(np.diff(edge), 1).reshape([-1 if k == axis else 1
                                                         for k in (-3, -2, -1)])
            volume = np.add.reduceat(volume, edge[:-1].clip(max=volume.shape[axis] - 1),
                                     axis) / wide
        return volume

    share = parts(brain.astype(np.float32))
    mean = parts(scans * brain) / np.maximum(share, 0.05)
    inside = share > 0.3
    mean = (mean - mean[:, inside].mean(1).reshape(-1, 1, 1, 1)) / (
        mean[:, inside].std(1).reshape(-1, 1, 1, 1) + 1e-6)
    return np.where(inside, mean, 0).astype(np.float32)


def check_case(case):
    """Read a Case and look at what reading alone does not show -> ([Finding], signature or None
    where it is rejected). All thresholds were set on 60 real cases and 30 phantoms: see the numbers
    beside them."""
    notes, label_file = [], str(case.files.get("seg", ""))
    try:
        scans, labels, affine = nifti.read_case(case, notes)
        ill = labels.any()
        # voxels of 3 mm are enough from here
        skip = np.maximum(1, np.rint(3 / nifti.spacing_of(affine))).astype(int)
        thin = (..., *[slice(None, None, int(k)) for k in skip])
        scans, labels, spacing = scans[thin].copy(order="K"), labels[thin], skip * nifti.spacing_of(
            affine)
        brain, tumour = slices.brain_mask(scans, case.folder), labels > 0
        # 14 mL; a head has a hundred times as much
        if brain.sum() < 500:
            raise bs.BadInput(f"{case.folder}: shows hardly any brain; export it again")
        for name, scan in zip(bs.MODALITIES, scans):
            shown = 1 - (brain & (scan == slices.air_value(scan))).sum() / brain.sum()
            # 0.98 to 1 in 59 real cases, 0.67 in a cut one
            if shown < 0.95:
                notes.append(nifti.Finding("warned", str(case.files[name]),
                                           f"shows {shown:.0%} of the brain the other "
                                           "scans show; cut or badly stripped"))
        if label_file and not ill:
            notes.append(nifti.Finding("warned", label_file, "has no tumour; trained on as "
                                       "healthy"))
        # a few voxels may fall between those that are looked at
        elif tumour.any():
            outside, fit = (tumour & ~brain).sum() / tumour.sum(), fit_of_labels(scans, tumour,
                                                                                 brain, spacing)
            inner, outer = [touching(np.where(brain | tumour, labels, -1).astype(np.int8), value)
                            for value in (1, 2)]
            if outside > 0.05:                              # 0.000 in all
                notes.append(nifti.Finding("warned", label_file, f"{outside:.0%} of the tumour "
                                           "lies outside the brain"))
            inner = inner if (labels == 1).mean() > 1e-4 else 0.0
            # NCR lies inside ED in all: 0 to .38 against .18 to .6
            if inner > outer and (labels == 2).any():
                notes.append(nifti.Finding("warned", label_file, "NCR touches healthy brain more "
                                           "than ED does; are labels 1 and 2 swapped?"))
            # 0.82 to 1 in all; below 0.6 in all when shifted
            if fit < 0.5:
                raise bs.BadInput(f"{label_file}: the tumour does not lie on what is bright on T2 "
                                  "and FLAIR, but would elsewhere; it is shifted or mirrored "
                                  "against the scans, or another case's")
            if fit < 0.75:
                notes.append(nifti.Finding("warned", label_file, "the tumour would lie better "
                                           "elsewhere; is it shifted or mirrored against the "
                                           "scans?"))
        return notes, signature(scans, brain)
    except bs.BadInput as error:
        where, _, text = str(error).partition(": ")
        return [nifti.Finding("rejected", where, text)], None


# correlation of signatures; up to 0.47 between 60 real heads, 0.60 and
ALIKE = 0.53
                                        # 0.67 between two pairs of scans of one patient each


def check_cases(cases):
    """Check Cases by reading every one -> ([Finding], [Case] that can be used).

    Across cases: the same scans under two names (the second is rejected), and heads that look like
    one patient (warned): signatures, less their mean over all cases, that correlate above ALIKE.
    That needs ten cases.
    """
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = list(pool.map(check_case, cases))
    findings, good = [note for notes, _ in results for note in notes], []
    for case, (_, its) in zip(cases, results):
        twin = next((other for other, theirs in good if its is not None
                     and np.array_equal(its, theirs)), None)
        if twin:
            findings.append(nifti.Finding("rejected", str(case.folder), "holds the same scans as "
                                          f"case {twin.case}; keep one of them"))
        elif its is not None:
            good.append((case, its))
    if len(good) >= 10:
        heads = np.stack([its.ravel() for _, its in good])
        mean = heads.sum(0) / np.maximum((heads != 0).sum(0), 1)
        close = np.triu(np.corrcoef(np.where(heads != 0, heads - mean, 0)), 1)
        for i, j in np.argwhere(close > ALIKE):
            if good[i][0].patient != good[j][0].patient:
                findings.append(nifti.Finding("warned", str(good[j][0].folder),
                                              f"looks like the same patient as "
                                              f"{good[i][0].case} (correlation {close[i, j]:.2f}); "
                                              "keep both on one side of the split"))
    return findings, [case for case, _ in good]


def findings_text(findings, few=3):
    """Findings as lines of text: one each; what is not rejected and comes more than `few` times is
    one line."""
    lines, groups = [], {}
    for its in findings:
        groups.setdefault((its.kind, its.where if its.kind == "rejected" else "", its.text),
                          []).append(its.where)
    for (kind, _, text), where in sorted(groups.items(),
                                         key=lambda item: nifti.KINDS.index(item[0][0])):
        lines += ([f"{kind}: {at}: {text}" for at in where] if len(where) <= few else
                  [f"{kind}: {len(where)} files ({where[0]} for one): {text}"])
    return lines


def usable_cases(folder, skip_bad=False, memory=None, say=print):
    """The cases below `folder`, all read and checked: [Case]. What was found is said. BadInput if
    any is rejected, unless skip_bad, which leaves those out. memory: folder that remembers the
    findings on files that have not changed since (by name, size and time)."""
    findings = []
    cases = nifti.find_cases(folder, True, findings)
    refuse_synthetic(cases)
    path = memory and Path(memory) / f"checked-{slices.fingerprint(cases)}.json"
    try:
        had = json.loads(path.read_text())
        found, good = [nifti.Finding(*its) for its in had["findings"]], [c for c in cases
                                                                         if c.case in had["good"]]
    except (AttributeError, OSError, ValueError, TypeError, KeyError):      # not there, or damaged
        say(f"checking {len(cases)} cases", flush=True)
        found, good = check_cases(cases)
        if path:
            files.replace_file(path, lambda temporary: temporary.write_text(
                json.dumps({"findings": [[f.kind, f.where, f.text] for f in found],
                            "good": [case.case for case in good]})))
    findings += found
    for line in findings_text(findings):
        say(line)
    bad = sum(its.kind == "rejected" for its in findings)
    if bad and not skip_bad:
        raise bs.BadInput(f"{folder}: {bad} rejected, see above; mend them, move them away, or "
                          "leave them out with --skip-bad")
    if bad:
        say(f"left out: {bad} rejected, {len(good)} cases are used")
    return good


def find_data(args):
    """The cases a run works on and their split -> (cases, {"train": [Case], "val": [...], "test":
    [...]}).

    args: with data, out, phantoms, scanner, split, skip_bad. The cases of --data are checked first,
    see usable_cases; findings are remembered beside the cache. Without --data phantoms are made
    beside the output folder; those already there are used again.
    """
    if args.data:
        say = print if devices.first_process() else lambda *_, **__: None
        cases = devices.in_turn(lambda: usable_cases(args.data, args.skip_bad, Path(args.out).parent
                                                     / "cache", say))
        return cases, slices.split_patients(cases, args.split)
    folder, started = Path(args.out).parent / "phantoms" / args.scanner, time.time()
    made = devices.in_turn(lambda: phantoms.make_phantoms(folder, args.phantoms,
                                                          scanner=args.scanner))
    if made:
        print(f"phantoms: {made} cases made in {time.time() - started:.0f} s -> {folder}")
    # a folder may hold more than this run asks for
    cases = nifti.find_cases(folder)
    cases = [case for case in cases if phantoms.phantom_seed(case.case) in range(args.phantoms)]
    refuse_synthetic(cases)
    return cases, slices.split_patients(cases, args.split)


def check_folder(folder, labelled=True):
    """Print what is to be said of a folder of cases, one line a finding, and a count; exit 1 if any
    is rejected."""
    findings = []
    cases = nifti.find_cases(folder, labelled, findings)
    for case in cases:
        if not labelled:
            case.files.pop("seg", None)
    found, good = check_cases(cases)
    print("\n".join(findings_text(findings + found)))
    count = {kind: sum(its.kind == kind for its in findings + found) for kind in nifti.KINDS}
    print(f"{len(good)} cases can be used; findings: "
          + ", ".join(f"{n} {kind}" for kind, n in count.items()))
    if count["rejected"]:
        sys.exit(1)
