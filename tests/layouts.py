"""Phantoms in the layouts that data sets have: what people put behind --data.

    python tests/layouts.py FOLDER      eight coarse phantoms in each of FOLDER/nnunet, ...
"""
import json
import shutil
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import brainsyn as bs
from kit import nifti, phantoms


def relabelled(path, values):
    """The labels in a file, 1 NCR, 2 ED, 3 or 4 ET, as an image with other values: {label: value}.
    """
    image = nib.load(path)
    labels = np.asanyarray(image.dataobj)
    labels = np.where(labels == 4, 3, labels)
    table = np.array([0, *(values[name] for name in bs.BRATS[1])], np.uint8)
    return nib.Nifti1Image(table[labels], image.affine)


def write_named(cases, folder, name, ends, values, labels_in=None):
    """Files that are named by case: name, a function of the number of a case; ends: {"t1": end of
    the file's name, ..., "seg": ...}; labels_in: another folder for labels."""
    for number, case in enumerate(cases):
        home = folder / name(number)
        home.mkdir(parents=True)
        for kind in bs.BRATS[0]:
            shutil.copy(case.files[kind], home / f"{name(number)}{ends[kind]}.nii.gz")
        place = labels_in or home
        place.mkdir(exist_ok=True)
        labels = relabelled(case.files["seg"], values)
        nib.save(labels, place / f"{name(number)}{ends['seg']}.nii.gz")


OLD, NEW = {"NCR": 1, "ED": 2, "ET": 4}, {"NCR": 1, "ED": 2, "ET": 3}


def brats(cases, folder):
    """BraTS 2021."""
    ends = {kind: f"_{kind}" for kind in (*bs.BRATS[0], "seg")}
    write_named(cases, folder, "BraTS2021_{:05d}".format, ends, OLD)


def capitals(cases, folder):
    """The same from a file system that shouts."""
    ends = {kind: f"_{kind.upper()}" for kind in (*bs.BRATS[0], "seg")}
    write_named(cases, folder, "CASE_{:05d}".format, ends, OLD)


def ucsf(cases, folder):
    """UCSF-PDGM: labels in a second folder, 4 is ET."""
    ends = {"t1": "_T1", "t1ce": "_T1c", "t2": "_T2", "flair": "_FLAIR",
            "seg": "_tumor_segmentation"}
    write_named(cases, folder / "scans", "UCSF-PDGM-{:04d}".format, ends, OLD, folder / "labels")


def upenn(cases, folder):
    """UPENN-GBM: labels in a second folder; pairs of cases are visits of one patient."""
    ends = {"t1": "_T1", "t1ce": "_T1GD", "t2": "_T2", "flair": "_FLAIR", "seg": "_segm"}
    write_named(cases, folder / "images_structural",
                lambda number: f"UPENN-GBM-{number // 2:05d}_{11 + 10 * (number % 2)}", ends, OLD,
                folder / "images_segm")


def bids(cases, folder):
    """BIDS names, registered and stripped, labels as derivatives."""
    ends = {"t1": "_T1w", "t1ce": "_ce-gd_T1w", "t2": "_T2w", "flair": "_FLAIR", "seg": "_dseg"}
    write_named(cases, folder, "sub-{:02d}".format, ends, NEW, folder / "derivatives")


def nnunet(cases, folder):
    """Raw data of nnU-Net: a file a channel, in another order than here; regions as labels."""
    order = ("flair", "t1", "t1ce", "t2")
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number, case in enumerate(cases):
        for c, kind in enumerate(order):
            shutil.copy(case.files[kind], folder / f"imagesTr/glioma_{number:03d}_{c:04d}.nii.gz")
        nib.save(relabelled(case.files["seg"], {"NCR": 2, "ED": 1, "ET": 3}),
                 folder / f"labelsTr/glioma_{number:03d}.nii.gz")
    facts = {"channel_names": {str(c): kind.upper() for c, kind in enumerate(order)},
             "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3],
                        "enhancing tumor": [3]},
             "numTraining": len(cases), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(facts))


def decathlon(cases, folder):
    """Task01 of the Medical Segmentation Decathlon: all scans of a case in one file."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number, case in enumerate(cases, 1):
        scans = [nib.load(case.files[kind]) for kind in ("flair", "t1", "t1ce", "t2")]
        volume = np.stack([np.asanyarray(scan.dataobj) for scan in scans], -1)
        nib.save(nib.Nifti1Image(volume, scans[0].affine),
                 folder / f"imagesTr/BRATS_{number:03d}.nii.gz")
        nib.save(relabelled(case.files["seg"], {"NCR": 2, "ED": 1, "ET": 3}),
                 folder / f"labelsTr/BRATS_{number:03d}.nii.gz")
    facts = {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
             "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor",
                        "3": "enhancing tumour"}}
    (folder / "dataset.json").write_text(json.dumps(facts))


LAYOUTS = {layout.__name__: layout
           for layout in (brats, capitals, ucsf, upenn, bids, nnunet, decathlon)}


def main():
    """Write all of them."""
    with tempfile.TemporaryDirectory() as heads:
        phantoms.make_phantoms(heads, 8, scale=2)
        cases = nifti.find_cases(heads)
        for name, layout in LAYOUTS.items():
            layout(cases, Path(sys.argv[1], name))
            print(Path(sys.argv[1], name))


if __name__ == "__main__":
    main()
