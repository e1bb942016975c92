"""Synthetic cases as BraTS-2023 folders that say what they are: sidecars, dataset.json, datasheet.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

import brainsyn as bs
from kit import files, nifti


# beside a synthetic case: all classes of its condition, where those are more
CLASSES_NAME = "{}-classes.nii.gz"


def image_counts(images, classes):
    """Images float (D, C, R, R) in [-1, 1] -> int16 counts 0..1000: 0 in air, at least 1 in the
    brain.

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
    building.mkdir(parents=True, exist_ok=True)
    try:
        for name, volume in (*zip((nifti.NAMES_2023[name] for name in bs.MODALITIES), images),
                             ("seg", labels)):
            nifti.write_nifti(building / f"{case}-{name}.nii.gz", volume, affine,
                              f"SYNTHETIC brainsyn {bs.__version__}", 2)
        if classes is not None:
            nifti.write_nifti(building / CLASSES_NAME.format(case), classes, affine,
                              f"SYNTHETIC brainsyn {bs.__version__}", 2)
        files.write_json(building / f"{case}.json", facts)
        os.replace(building, target)
        files.sync_folder(folder)
    finally:
        if building.exists():
            shutil.rmtree(building)
    return target


def write_description(folder):
    """dataset_description.json of a set of synthetic cases, as BIDS wants it for data that was
    made: the mark that stands above all its cases."""
    files.write_json(Path(folder) / "dataset_description.json",
                     {"Name": "SYNTHETIC brain MRI with " "tumour labels, made by brainsyn",
                      "BIDSVersion": "1.9.0", "DatasetType": "derivative", "SyntheticData": "YES",
                      "GeneratedBy": [{"Name": "brainsyn", "Version": bs.__version__,
                                       "Description": "diffusion model, label map -> T1, T1ce, T2, "
                                       "FLAIR; see DATASHEET.md"}]})


def write_dataset_json(folder):
    """dataset.json of all cases in a folder, for nnU-Net (`dataset`; training on regions) and MONAI
    (`training`)."""
    folder, entries = Path(folder), {}
    for case in nifti.find_cases(folder):
        paths = {name: path.relative_to(folder).as_posix() for name, path in case.files.items()}
        entries[case.case] = {"images": [paths[name] for name in bs.MODALITIES],
                              "label": paths["seg"]}
    files.write_json(folder / "dataset.json", {
        "name": "SYNTHETIC brain MRI made by brainsyn",
        "channel_names": dict(zip("0123", ("T1", "T1ce", "T2", "FLAIR"))),
        "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [1, 3], "enhancing_tumor": [3]},
        "regions_class_order": [2, 1, 3],       # what is WT and nothing more is ED, and so on
        "numTraining": len(entries), "file_ending": ".nii.gz", "dataset": entries,
        "training": [{"image": its["images"], "label": its["label"]} for its in entries.values()]})


def write_datasheet(folder):
    """DATASHEET.md of a set of synthetic cases, from their sidecars and, where they are there,
    judge.json and the audit in the sidecars: what they are, how they were made, what they are not
    for."""
    folder = Path(folder)
    cases = [(case, synthetic_facts(case)) for case in nifti.find_cases(folder)]
    several = lambda name: ", ".join(sorted({str(facts[name]) for _, facts in cases
                                             if name in facts}))
    volumes = {name: [facts["VolumesML"][name] for _, facts in cases]
               for name in (*bs.LABELS, "WT")}
    lines = ["# Datasheet", "", f"**SYNTHETIC.** {len(cases)} cases, made by brainsyn "
             f"{several('GeneratorVersion')}. No patient was scanned for any of these pictures.",
             "", "## What they are", "", "Four modalities (T1, T1ce, T2, FLAIR) and a tumour label "
             "map (1 NCR, 2 ED, 3 ET) of each case, skull-stripped, aligned, as NIfTI in "
             "BraTS-2023 folders; `dataset.json` lists them for nnU-Net and MONAI. Signal is in "
             "arbitrary counts, 0 in air, up to 1000.", "", "| volume in mL | least | median | "
             "most |", "|---|---|---|---|", *(f"| {name} | {min(its):.1f} | {np.median(its):.1f} | "
                                              f"{max(its):.1f} |" for name, its in volumes.items()),
             "", "## How they were made", "", "A v-prediction diffusion model drew each slice "
             f"from a label map (condition: {several('Condition')}; {several('Steps')} network "
             f"calls, sampler {several('Sampler')}, guidance {several('Guidance')}, noise shared "
             f"along z over {several('Coherence')} mm). Label maps: {several('LabelMaps')}, edits: "
             f"{several('Edits')}. Every case has a JSON sidecar with checkpoint, seed, settings "
             "and hashes; the same command makes the same voxels.", "", "## From what data", "",
             f"The generator was trained on {several('GeneratorPatients')} cases "
             f"({several('GeneratorData')})" + (", that of the label maps on "
                                                f"{several('LabelGeneratorPatients')}"
                                                if "generated" in several("LabelMaps") else "")
             + ". Their hashes are in every sidecar. "
             f"{sum(facts['UsedInTraining'] for _, facts in cases)} of {len(cases)} cases carry a "
             "label map or brain outline of its training cases"
             + ("; phantoms are no persons." if several("GeneratorData") == "phantoms"
                else "; such outlines are patient data."), "", "## Figures", ""]
    try:
        report = json.loads((folder / "judge.json").read_text())
        lines += [f"Judged against {report['held_out_cases']} held-out cases:", "",
                  "| figure | synthetic | real |", "|---|---|---|",
                  *(f"| {name} | {report['synthetic'][name]} | {value} |" for name,
                    value in report["real"].items()), ""]
    except (OSError, ValueError, KeyError):
        lines += ["Not judged: `python sample.py --judge` compares them with held-out cases.", ""]
    audits = {json.dumps(facts["Audit"], sort_keys=True) for _, facts in cases if "Audit" in facts}
    if len(audits) == 1 and all("Audit" in facts for _, facts in cases):
        audit = json.loads(audits.pop())
        lines += [f"Audited for copies of training cases: **{audit['verdict']}**. "
                  + audit["words"], ""]
    else:
        lines += ["Not audited for copies of training cases: `python sample.py --audit` does that.",
                  ""]
    lines += ["## What they must not be used for", "", "- Nothing clinical: no diagnosis, no "
              "treatment, no teaching of what a disease looks like.", "- No validation of a "
              "clinical claim, and no test set for a segmenter that people rely on: validate on "
              "real scans.", "- No claim of privacy: an audit that finds nothing bounds the share "
              "of copies, no more.", "", "## Known limits", "", "- Slices are drawn one by one; "
              "they agree along z by shared noise only, and folds may not run through.",
              "- Anatomy outside the tumour is plausible at best; disease other than the labels is "
              "not modelled.", "- What the generator's training data lacked, these lack: other "
              "scanners, ages, diseases, artefacts.", ""]
    files.replace_file(folder / "DATASHEET.md", lambda temporary: temporary.write_text(
        "\n".join(lines)))


def synthetic_facts(case):
    """The sidecar of a synthetic Case as a dict. BadInput where there is none: its source is
    unknown."""
    path = case.folder / f"{case.case}.json"
    try:
        facts = json.loads(path.read_text())
        if facts["SyntheticData"] != "YES" or not {"LabelMapSHA256", "BrainSHA256",
                                                   "GeneratorTrainedOn"} <= set(facts):
            raise ValueError("it does not say SyntheticData YES and where it comes from")
        return facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise bs.BadInput(f"{path}: no sidecar of a synthetic case ({error}); make the set with "
                          "sample.py") from error


def sidecar_hash(case):
    """sha256 of what the sidecar of a synthetic Case says of how it was made; an audit added later
    is no change."""
    facts = {k: v for k, v in synthetic_facts(case).items() if k != "Audit"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def contaminated(case, hashes):
    """Whether a synthetic Case owes anything to label maps with these hashes: its own map, the
    outline, or one its generator was trained on."""
    facts, known = synthetic_facts(case), {digest[:16] for digest in hashes}
    return any(digest[:16] in known for digest in
               (facts["LabelMapSHA256"], facts["BrainSHA256"], *facts["GeneratorTrainedOn"]))
