"""What `python brainsyn.py DIR` says of a folder of cases, and what training refuses.
"""
import re
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import brainsyn as bs
from kit import devices, nifti, phantoms, slices


# What the sidecar of a synthetic case, or the description of a set of them, says of itself.
SYNTHETIC = re.compile(rb'"SyntheticData"\s*:\s*"YES"|"Name"\s*:\s*"brainsyn"')


def is_synthetic(folder):
    """True if the case in a folder was made by sample.py. Any mark is enough: its name, its header,
    a sidecar or dataset_description.json beside it, or that one folder up."""
    texts = [*folder.glob("*.json"), *folder.parent.glob("dataset_description.json")]
    if "BraTS-SYN-" in folder.name or any(SYNTHETIC.search(text.read_bytes())
                                          for text in texts if text.is_file()):
        return True
    try:
        return b"SYNTHETIC" in nib.load(next(folder.glob("*.nii*"))).header["descrip"].item()
    except Exception:                           # none, or unreadable: the reader will say so
        return False


def refuse_synthetic(cases):
    """BadInput if any of these Cases was made by sample.py: its own hash does not tell which
    patients it was made from, and a figure on it says nothing about real scans."""
    for case in cases:
        if is_synthetic(case.folder):
            raise bs.BadInput(f"{case.folder}: is synthetic; use real cases, or --synthetic for it")


def fit_of_labels(scans, tumour, brain, spacing):
    """How well a tumour lies on what is bright on T2 and FLAIR: its mean brightness where it lies,
    divided by the best it could have anywhere else in the brain (1: it lies best where it is).

    scans float (C, X, Y, Z), tumour and brain bool (X, Y, Z), spacing mm (3,). Every shift is tried
    at once, as a product of Fourier transforms, on every second voxel or fewer. 1 where there is
    too little to tell.
    """
    coarse = tuple(slice(None, None, max(1, round(6 / mm))) for mm in spacing)
    inside = brain[coarse]
    tumour = (tumour & brain)[coarse].astype(np.float32)
    if tumour.sum() < 5:
        return 1.0
    bright = np.zeros(inside.shape, np.float32)
    for name in {"t2", "flair"} & {*bs.MODALITIES}:
        scan = scans[bs.MODALITIES.index(name)][coarse]
        scaled = (scan - np.median(scan[inside])) / (scan[inside].std() + 1e-6)
        bright += np.where(inside, scaled, 0)
    # means under the tumour, at every shift: of brightness, of what is brain
    spectra = np.fft.rfftn([bright, inside.astype(np.float32)], axes=(1, 2, 3))
    spectra *= np.fft.rfftn(tumour).conj()
    brightness, brains = np.fft.irfftn(spectra, inside.shape, axes=(1, 2, 3)) / tumour.sum()
    best = np.where(brains > 0.95, brightness, 0).max()
    return float(brightness[0, 0, 0] / best) if best > 0.5 else 1.0


def signature(scans, brain):
    """What a head looks like, coarsely, whatever grid it lies on: mean signal of every modality in
    16^3 equal parts of the box around the brain, each modality to mean 0 and spread 1; float32 (C,
    16, 16, 16), 0 where a part is mostly air. scans float (C, X, Y, Z); brain bool (X, Y, Z)."""
    box = (..., *[slice(along.min(), along.max() + 1) for along in np.nonzero(brain)])
    means = np.stack([brain[box], *(scans[box] * brain[box])])
    for axis in (1, 2, 3):
        edges = np.linspace(0, means.shape[axis], 17).astype(int)
        widths = np.maximum(np.diff(edges), 1).reshape(-1, *[1] * (3 - axis))
        means = np.add.reduceat(means, edges[:-1].clip(max=edges[-1] - 1), axis) / widths
    inside = means[0] > 0.3
    parts = means[1:, inside] / means[0, inside]
    head = np.zeros((len(scans), 16, 16, 16), np.float32)
    head[:, inside] = (parts - parts.mean(1, keepdims=True)) / (parts.std(1, keepdims=True) + 1e-6)
    return head


def odd_scan(scaled, brain):
    """The scan whose edges do not lie where those of the others do, an index, or None: mean
    correlation of the logarithm of gradients with the other scans, less than 0.7 of the median of
    all (0.74 and more in 60 real cases but a cut one; mirrored scans have 0.8 at most). It takes
    three scans to tell. scaled float (C, X, Y, Z), mean 0 and spread 1; brain bool (X, Y, Z)."""
    if len(scaled) < 3:
        return None
    edges = [np.sqrt(sum(part ** 2 for part in np.gradient(scan)))[brain] for scan in scaled]
    alike = np.corrcoef(np.log(np.array(edges) + 0.05)).sum(1) - 1
    return alike.argmin() if alike.min() < 0.7 * np.median(alike) else None


def exchanged_scans(scaled, healthy):
    """Which two scans seem to have each other's names, a text, or None. scaled as in odd_scan;
    healthy bool (X, Y, Z). Fluid is dark on T1 and FLAIR and bright on T2: so T1 goes along with
    FLAIR more than with T2 (by 0.19 at least in 60 real cases, a cut one aside), and with T1ce (by
    0.17); and T1ce more with T1 than with T2 (by 0.05)."""
    like = np.corrcoef(scaled[:, healthy].clip(-3, 3))
    for near, far, margin, pair in ((("t1", "flair"), ("t1", "t2"), 0.1, "t2 and flair"),
                                    (("t1", "t1ce"), ("t1", "t2"), 0.0, "t1ce and t2"),
                                    (("t1", "t1ce"), ("t1ce", "t2"), 0.0, "t1 and t2")):
        if {*near, *far} <= {*bs.MODALITIES}:
            a, b, c, d = [bs.MODALITIES.index(name) for name in (*near, *far)]
            if like[a, b] < like[c, d] - margin:
                return pair
    return None


def check_scans(case, shown, scaled, healthy):
    """What is odd about the scans of a case: [Finding]. shown: where each shows brain, bool (C, X,
    Y, Z); scaled, healthy as above."""
    brain = shown.any(0)
    odd, notes = odd_scan(scaled, brain), []
    if odd is not None:                         # a cut scan shows nothing that others do not
        alone = shown[odd] & (shown.sum(0) == 1)
        odd = odd if alone.sum() > 0.02 * shown[odd].sum() else None
    for c, name in enumerate(bs.MODALITIES):
        part, text = shown[c].sum() / brain.sum(), None
        if c == odd:
            text = "fits none of the others; is it mirrored, shifted or another patient's?"
        elif odd is None and part < 0.95:       # 0.98 to 1 in 59 real cases, 0.67 in a cut one
            text = f"shows {part:.0%} of the brain the other scans show; cut or badly stripped"
        if text:
            notes.append(nifti.Finding("warned", str(case.files[name]), text))
    pair = exchanged_scans(scaled, healthy) if not notes else None
    if pair:
        notes.append(nifti.Finding("warned", str(case.folder), f"{pair} seem to be exchanged"))
    return notes


def likely_map(values, four):
    """What labels seem to be by what the scans show, as --label-map takes it. values: {number of a
    label: (rise from T1 to T1ce, brightness on FLAIR)}; four: label 3 is 4 in the file."""
    names = dict.fromkeys(values, "NCR")
    rest = sorted(values, key=lambda k: values[k][0])
    if len(rest) > 1:
        names[rest.pop()] = "ET"
    names[max(rest, key=lambda k: values[k][1])] = "ED"
    return ",".join(f"{4 if four and k == 3 else k}={name}" for k, name in sorted(names.items()))


def swapped_labels(labels, healthy):
    """Whether label 1 touches healthy brain, bool (X, Y, Z), more than label 2: NCR lies inside ED
    in all cases, 0 to 0.38 of it touches healthy brain, of ED 0.18 to 0.6."""
    near = np.zeros(labels.shape, bool)
    for axis in range(3):
        near |= np.roll(healthy, 1, axis) | np.roll(healthy, -1, axis)
    inner, outer = [near[labels == k].sum() / max((labels == k).sum(), 1) for k in (1, 2)]
    return inner > outer and (labels == 1).mean() > 1e-4 and (labels == 2).any()


def check_names(path, scaled, labels, healthy, four):
    """Whether the scans bear out what the labels of BraTS are called: [Finding]. path: of the
    labels; scaled as in odd_scan; labels, healthy (X, Y, Z) at about 3 mm; four: see likely_map. In
    60 real cases T1ce is at least as far above healthy brain as T1 in ET (0.3 further in all but
    one), no other label of 30 voxels or more rises as much as ET, and ED is 0.57 or more above
    healthy brain on FLAIR."""
    if bs.LABELS != bs.BRATS[1]:
        return []
    counts, shown = np.bincount(labels.ravel(), minlength=4), {}
    if {"t1", "t1ce", "flair"} <= {*bs.MODALITIES}:
        t1, t1ce, flair = [scaled[bs.MODALITIES.index(name)] for name in ("t1", "t1ce", "flair")]
        masks = {k: labels == k for k in (1, 2, 3) if counts[k] >= 10}
        shown = {k: (t1ce[here].mean() - t1[here].mean(), flair[here].mean())
                 for k, here in masks.items()}
    rise = shown.get(3, (0, 0))[0]
    others = [shown[k][0] for k in shown if k < 3 and counts[k] >= 30]
    if rise < 0 and -rise > max(others, default=0):
        text = "ET is darker on t1ce than on t1; are these exchanged?"
    elif max(others, default=0) > max(rise, 0) + 0.3 and 3 in shown:
        text = ("another label takes up more contrast agent than ET; are labels "
                f"{likely_map(shown, four)}? Then say so by --label-map")
    elif 2 in shown and shown[2][1] < 0.2:
        text = ("ED is not bright on flair; is that another scan, or are labels "
                f"{likely_map(shown, four)}? Then say so by --label-map")
    elif swapped_labels(labels, healthy):
        text = "NCR touches healthy brain more than ED; are labels 1 and 2 swapped?"
    else:
        return []
    return [nifti.Finding("warned", str(path), text)]


def check_labels(path, scans, labels, brain, spacing):
    """What is odd about where the tumour of a case lies: [Finding]. path: of its labels; scans
    float (C, X, Y, Z); labels, brain (X, Y, Z); spacing mm (3,). BadInput where it lies elsewhere.
    """
    tumour = labels > 0
    fit = fit_of_labels(scans, tumour, brain, spacing)
    if fit < 0.5:                               # 0.82 to 1 in all; below 0.6 in all when shifted
        raise bs.BadInput(f"{path}: the tumour is shifted or mirrored, or another case's")
    outside = (tumour & ~brain).sum() / tumour.sum()                        # 0.000 in all
    facts = {f"{outside:.0%} of the tumour lies outside the brain": outside > 0.05,
             "the tumour would lie better elsewhere; is it shifted or mirrored?": fit < 0.75}
    return [nifti.Finding("warned", str(path), text) for text, holds in facts.items() if holds]


def look_at(case):
    """Read a Case -> ([Finding] on what is odd about it, its signature, the numbers of the labels
    it has). BadInput where it cannot be used."""
    notes = []
    scans, labels, affine = nifti.read_case(case, notes)
    there = [k for k in range(1, int(labels.max()) + 1) if (labels == k).any()]
    if "seg" in case.files and not there:
        notes.append(nifti.Finding("warned", str(case.files["seg"]), "no tumour; taken as healthy"))
    spacing = nifti.spacing_of(affine)
    step = np.maximum(1, np.rint(3 / spacing)).astype(int)
    coarse = (..., *[slice(None, None, int(k)) for k in step])              # voxels of 3 mm
    scans, labels = [volume[coarse].copy(order="K") for volume in (scans, labels)]
    shown = np.stack([slices.not_air(scan, case.folder) for scan in scans])
    brain = shown.any(0)
    if brain.sum() < 500:                       # 14 mL; a head has a hundred times as much
        raise bs.BadInput(f"{case.folder}: shows hardly any brain; export it again")
    healthy = brain & (labels == 0)
    scaled = np.stack([(scan - np.median(scan[healthy])) / (scan[healthy].std() + 1e-6)
                       for scan in scans])
    notes += check_scans(case, shown, scaled, healthy)
    if labels.any():                            # a few voxels may lie between those looked at
        notes += check_labels(case.files["seg"], scans, labels, brain, step * spacing)
        four = any(note.text.startswith("ET is 4") for note in notes)
        notes += check_names(case.files["seg"], scaled, labels, healthy, four)
    return notes, signature(scans, brain), there


def check_case(case):
    """Read a Case and look at what reading alone does not show -> a dict: findings, [[kind, where,
    text]]; signature, float tensor, empty where the case is rejected; labels, their numbers. All
    thresholds were set on 60 real cases and 60 phantoms: see the numbers beside them."""
    try:
        notes, head, labels = look_at(case)
    except bs.BadInput as error:
        notes, head, labels = [("rejected", *str(error).split(": ", 1))], np.zeros(0, "f"), []
    return {"findings": [list(note) for note in notes], "signature": torch.from_numpy(head),
            "labels": labels}


# Correlation of signatures: up to 0.47 between 60 real heads, 0.60 and 0.67 between two pairs of
# scans of one patient each.
ALIKE = 0.53


def check_cases(cases, findings, memory=None):
    """Check Cases by reading every one -> [Case] that can be used. findings: list that takes what
    was found.

    Across cases: the same scans under two names (the second is rejected), and heads that look like
    one patient (warned): signatures, less their mean over all cases, that correlate above ALIKE.
    That needs ten cases. memory: folder that keeps what was found on each case until one of its
    files changes, by name, size and time.
    """
    def check(case):
        return slices.remember(memory, "check", check_case, case) if memory else check_case(case)

    first, labels = {}, []                      # {signature: the first case that has it}
    for case, result in zip(cases, nifti.in_threads(check, cases)):
        findings += [nifti.Finding(*note) for note in result["findings"]]
        labels += [result["labels"]] * bool(result["labels"])
        head = result["signature"].numpy().tobytes()
        if head and first.setdefault(head, case) is not case:
            text = f"holds the same scans as case {first[head].case}; keep one of them"
            findings.append(nifti.Finding("rejected", str(case.folder), text))
    good = list(first.values())
    if len(labels) > 1 and all(numbers == [1] for numbers in labels) and len(bs.LABELS) > 1:
        text = (f"all labels are 1, {bs.LABELS[0]}; are they masks of the whole tumour? Then say "
                "--label-map 1=lesion")
        findings.append(nifti.Finding("warned", str(good[0].folder.parent), text))
    if len(good) >= 10:
        heads = np.stack([np.frombuffer(head, np.float32) for head in first])
        good = join_patients(good, heads, findings)
    return good


def join_patients(cases, heads, findings):
    """Cases whose signatures (N, n) are alike become cases of one patient -> the cases. findings:
    list that takes what was joined."""
    mean = heads.sum(0) / np.maximum((heads != 0).sum(0), 1)
    close = np.triu(np.corrcoef(np.where(heads != 0, heads - mean, 0)), 1)
    for i, j in np.argwhere(close > ALIKE):
        first, second = cases[i].patient, cases[j].patient
        if first != second:
            text = f"looks like the same patient as {cases[i].case}; taken as a visit of {first}"
            findings.append(nifti.Finding("warned", str(cases[j].folder), text))
            cases = [case._replace(known_as=first) if case.patient == second else case
                     for case in cases]
    return cases


def print_findings(findings):
    """Print findings, one line each, but one line for what is not rejected and comes more than
    three times -> how many are rejected."""
    groups = {}
    for finding in sorted(findings, key=lambda finding: nifti.KINDS.index(finding.kind)):
        groups.setdefault((finding.kind, finding.text), []).append(finding.where)
    for (kind, text), places in groups.items():
        if len(places) > 3 and kind != "rejected":
            places = [f"{len(places)} files, such as {places[0]}"]
        print(*[f"{kind}: {place}: {text}" for place in places], sep="\n", flush=True)
    return sum(finding.kind == "rejected" for finding in findings)


def usable_cases(folder, skip_bad=False, memory=None):
    """The real cases below `folder`, all read and checked: [Case]. What was found is printed.
    BadInput if any is synthetic or, unless skip_bad leaves those out, rejected. memory: see
    check_cases."""
    findings = []
    cases = nifti.find_cases(folder, True, findings)
    refuse_synthetic(cases)
    print(f"checking {len(cases)} cases", flush=True)
    good = check_cases(cases, findings, memory)
    bad = print_findings(findings)
    if bad and not skip_bad:
        raise bs.BadInput(f"{folder}: {bad} rejected, see above; mend them or add --skip-bad")
    if bad:
        print(f"left out: {bad} rejected, {len(good)} cases are used", flush=True)
    return good


def find_data(args):
    """The cases a run works on and their split -> (cases, {"train": [Case], "val": [...], "test":
    [...]}).

    args: with data, out, phantoms, scanner, split, skip_bad. The cases of --data are checked first,
    see usable_cases; findings are remembered beside the cache. Without --data phantoms are made
    beside the output folder; those already there are used again.
    """
    home = Path(args.out).parent
    once = devices.first_process_first
    if args.data:
        cases = once(lambda: usable_cases(args.data, args.skip_bad, home / "cache"))
    else:
        folder = home / "phantoms" / args.scanner
        new = once(lambda: phantoms.make_phantoms(folder, args.phantoms, args.scanner))
        if new:
            print(f"phantoms: {new} cases made -> {folder}")
        cases = [case for case in nifti.find_cases(folder)      # there may be more than asked for
                 if phantoms.phantom_seed(case.case) in range(args.phantoms)]
        refuse_synthetic(cases)
    visits = Counter(case.patient for case in cases)
    often = [f"; {name} has {count}" for name, count in visits.items() if count > 1][:1]
    print(f"{len(cases)} cases of {len(visits)} patients{''.join(often)}")
    return cases, slices.split_patients(cases, args.split)


def check_folder(folder, labelled=True):
    """Print what is to be said of a folder of cases, one line a finding, and a count; exit 1 if any
    is rejected."""
    findings = []
    good = check_cases(nifti.find_cases(folder, labelled, findings), findings)
    print_findings(findings)
    kinds = [finding.kind for finding in findings]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in nifti.KINDS)
    print(f"{len(good)} cases can be used; findings: {counts}")
    if "rejected" in kinds:
        raise SystemExit(1)
