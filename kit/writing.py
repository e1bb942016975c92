"""Synthetic cases as BraTS-2023 folders that say what they are: sidecars, dataset.json, datasheet.
"""
import hashlib
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np

import brainsyn as bs
from kit import files, nifti, pictures, slices


# beside a synthetic case: all classes of its condition, where those are more than tumour labels
CLASSES_NAME = "{}-classes.nii.gz"
# with {entries} of the sidecars, see write_datasheet
DATASHEET = Path(__file__).with_name("datasheet.md")


def image_counts(images, classes):
    """Images float (D, C, R, R) in [-1, 1], class maps (D, R, R) -> int16 counts 0..1000: 0 in air
    (class 0), at least 1 in the brain, where -1 is black and 1 is 1000.

    The outline is part of the condition, so what lies outside is written as the air it is.
    """
    counts = np.clip(np.rint((np.asarray(images) + 1) * 500), 1, 1000)
    return np.where(np.asarray(classes)[:, None] > 0, counts, 0).astype(np.int16)


def write_case(folder, case, images, labels, affine, facts, classes=None):
    """Write one synthetic case as a BraTS-2023 folder, whole or not at all; returns the folder.

    images: counts int16 (C, X, Y, Z); labels: uint8 (X, Y, Z) in 0..3; both canonical, with affine
    (4, 4). facts: what goes into the JSON sidecar beside the volumes. classes: uint8 (X, Y, Z),
    values index the condition; written as CLASSES_NAME. Every file says SYNTHETIC.
    """
    target, building = Path(folder) / case, Path(folder) / f".{case}.{os.getpid()}.tmp"
    volumes = {f"{case}-{nifti.NAMES_2023[name]}.nii.gz": image
               for name, image in zip(bs.MODALITIES, images)}
    volumes[f"{case}-seg.nii.gz"] = labels
    if classes is not None:
        volumes[CLASSES_NAME.format(case)] = classes
    building.mkdir(parents=True, exist_ok=True)
    try:
        for name, volume in volumes.items():
            nifti.write_nifti(building / name, volume, affine,
                              f"SYNTHETIC brainsyn {bs.__version__}", 2)
        files.write_json(building / f"{case}.json", facts)
        os.replace(building, target)
        files.sync_folder(folder)
    finally:
        if building.exists():
            shutil.rmtree(building)
    return target


def write_description(folder):
    """dataset_description.json of a set of synthetic cases, as BIDS wants it for derived data: the
    mark that stands above all its cases."""
    words = "diffusion model, label map -> T1, T1ce, T2, FLAIR; see DATASHEET.md"
    software = {"Name": "brainsyn", "Version": bs.__version__, "Description": words}
    files.write_json(Path(folder) / "dataset_description.json",
                     {"Name": "SYNTHETIC brain MRI with tumour labels, made by brainsyn",
                      "BIDSVersion": "1.9.0", "DatasetType": "derivative", "SyntheticData": "YES",
                      "GeneratedBy": [software]})


def write_dataset_json(folder):
    """dataset.json of all cases in a folder, for nnU-Net (`dataset`; training on regions) and MONAI
    (`training`)."""
    entries = {}
    for case in nifti.find_cases(folder):
        paths = {name: path.relative_to(folder).as_posix() for name, path in case.files.items()}
        entries[case.case] = {"images": [paths[name] for name in bs.MODALITIES],
                              "label": paths["seg"]}
    files.write_json(Path(folder) / "dataset.json", {
        "name": "SYNTHETIC brain MRI made by brainsyn",
        "channel_names": dict(zip("0123", ("T1", "T1ce", "T2", "FLAIR"))),
        "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [1, 3],
                   "enhancing_tumor": [3]},
        "regions_class_order": [2, 1, 3],       # what is WT and nothing more is ED, and so on
        "numTraining": len(entries), "file_ending": ".nii.gz", "dataset": entries,
        "training": [{"image": entry["images"], "label": entry["label"]}
                     for entry in entries.values()]})


def judged_text(folder):
    """What judge.json of a set says, as a table in Markdown; or that there is none."""
    try:
        report = json.loads((Path(folder) / "judge.json").read_text())
        rows = [f"| {name} | {report['synthetic'][name]} | {value} |"
                for name, value in report["real"].items()]
        return "\n".join([f"Judged against {report['held_out_cases']} held-out cases:", "",
                          "| figure | synthetic | real |", "|---|---|---|", *rows])
    except (OSError, ValueError, KeyError):
        return "Not judged: `python sample.py --judge` compares them with held-out cases."


def audited_text(sidecars):
    """What the audit of a set says, from its sidecars; that there is none unless all hold the
    same."""
    audits = [sidecar.get("Audit") for sidecar in sidecars]
    if audits[0] and all(audit == audits[0] for audit in audits):
        return "Audited for copies of training cases: **{verdict}**. {words}".format(**audits[0])
    return "Not audited for copies of training cases: `python sample.py --audit` does that."


def write_datasheet(folder):
    """DATASHEET.md of a set of synthetic cases: what they are, how they were made, what they must
    not be used for. Made from their sidecars and judge.json, where it is there: an entry that
    differs between sidecars is written as all its values."""
    sidecars = [synthetic_facts(case) for case in nifti.find_cases(folder)]
    values = defaultdict(lambda: "none")        # of an entry that no sidecar has
    for name in set().union(*sidecars):
        texts = {str(sidecar[name]) for sidecar in sidecars if name in sidecar}
        values[name] = ", ".join(sorted(texts))
    rows = []
    for name in (*bs.LABELS, "WT"):
        ml = [sidecar["VolumesML"][name] for sidecar in sidecars]
        rows.append(f"| {name} | {min(ml):.1f} | {np.median(ml):.1f} | {max(ml):.1f} |")
    values |= {"cases": len(sidecars), "volumes": "\n".join(rows),
               "used": sum(sidecar["UsedInTraining"] for sidecar in sidecars),
               "judged": judged_text(folder), "audited": audited_text(sidecars)}
    text = DATASHEET.read_text().format_map(values)
    files.replace_file(Path(folder) / "DATASHEET.md", lambda path: path.write_text(text))


def plot_contact_sheet(folder):
    """contact_sheet.png of a set from its files: of twelve cases the slice with most tumour."""
    rows = []
    for case in nifti.find_cases(folder)[:12]:
        scans, labels, _ = nifti.read_case(case)
        brain = (scans > 0).any(0)
        classes = slices.to_slices(np.where(labels > 0, labels + 1, brain).astype(int))
        best = pictures.fullest(classes > 1, classes > 0)
        rows.append([classes[best], *(slices.to_slices(scans)[:, best] / 500 - 1)])
    pictures.plot_rows(Path(folder) / "contact_sheet.png", rows, ["labels", *bs.MODALITIES],
                       "tumour", "SYNTHETIC: made by brainsyn, no patient was scanned")


def finish_set(folder):
    """Write what stands beside the cases of a set: contact sheet, list of cases, datasheet."""
    plot_contact_sheet(folder)
    write_dataset_json(folder)
    write_datasheet(folder)


def read_sidecar(path):
    """The sidecar of a synthetic case as a dict. BadInput where there is none, or it does not say
    where the case comes from."""
    origin = {"LabelMapSHA256", "BrainSHA256", "GeneratorTrainedOn"}
    try:
        facts = json.loads(path.read_text())
        if facts["SyntheticData"] != "YES" or not origin <= set(facts):
            raise ValueError("it does not say SyntheticData YES and where it comes from")
        return facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise bs.BadInput(f"{path}: no sidecar of a synthetic case ({error}); delete the case's "
                          "folder and make it again with sample.py") from error


def synthetic_facts(case):
    """The sidecar of a synthetic Case as a dict, see read_sidecar."""
    return read_sidecar(case.folder / f"{case.case}.json")


def already_there(folder, facts, origin):
    """True if case facts["Case"] is in `folder` and its sidecar says what `facts` and origin() say;
    origin is called only if it is there, as it reads files. BadInput where the sidecar says
    otherwise, or there is none."""
    case = Path(folder) / facts["Case"]
    if not case.exists():
        return False
    found = read_sidecar(case / f"{case.name}.json")
    for name, wanted in json.loads(json.dumps({**facts, **origin()})).items():
        if found.get(name) != wanted:
            raise bs.BadInput(f"{case} was made with {name} {found.get(name)}, you ask for "
                              f"{wanted}; choose another --out")
    return True


def sidecar_hash(case):
    """sha256 (hex) of what the sidecar of a synthetic Case says of how it was made; an audit added
    later does not change it."""
    facts = {name: value for name, value in synthetic_facts(case).items() if name != "Audit"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def contaminated(case, hashes):
    """True if the case was made from, or by a generator trained on, one of these label maps or
    outlines (hashes: as slices.case_hashes has them). Compared are the first 16 digits."""
    facts = synthetic_facts(case)
    origin = {facts["LabelMapSHA256"][:16], facts["BrainSHA256"][:16], *facts["GeneratorTrainedOn"]}
    return not origin.isdisjoint(digest[:16] for digest in hashes)
