"""Synthetic cases as BraTS-2023 folders that say what they are: sidecars, dataset.json, datasheet.
"""
import hashlib
import json
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

import brainsyn as bs
from kit import files, nifti, pictures, slices


# beside a synthetic case: all classes of its condition, where those are more than tumour labels
CLASSES_NAME = "{}-classes.nii.gz"
# What stands beside synthetic cases begins with the file of its name here; in datasheet.md are
# {entries} of sidecars, see write_datasheet.
HERE = Path(__file__).parent
ORIGIN = "LabelMapSHA256", "BrainSHA256"        # in a sidecar: case_hashes


def image_counts(images, classes):
    """Images float (D, C, R, R) in [-1, 1], class maps (D, R, R) -> int16 counts 0..1000: 0 in air
    (class 0), at least 1 in the brain, where -1 is black and 1 is 1000.

    The outline is part of the condition, so what lies outside is written as the air it is.
    """
    counts = np.clip(np.rint((np.asarray(images) + 1) * 500), 1, 1000)
    return np.where(np.asarray(classes)[:, None] > 0, counts, 0).astype(np.int16)


def write_case(folder, case, images, labels, affine, facts, classes=None):
    """Write one synthetic case as a BraTS-2023 folder, whole or not at all; returns the folder.

    images: counts int16 (C, X, Y, Z); labels: uint8 (X, Y, Z) in 0..L; both canonical, with affine
    (4, 4). facts: what goes into the JSON sidecar beside the volumes. classes: uint8 (X, Y, Z),
    values index the condition; written as CLASSES_NAME. Every file says SYNTHETIC.
    """
    volumes = {f"{case}-{nifti.NAMES_2023.get(name, name)}.nii.gz": image
               for name, image in zip(bs.MODALITIES, images)}
    volumes[f"{case}-seg.nii.gz"] = labels
    if classes is not None:
        volumes[CLASSES_NAME.format(case)] = classes
    words = f"SYNTHETIC brainsyn {bs.__version__}"

    def write(building):
        building.mkdir()
        for name, volume in volumes.items():
            nifti.write_nifti(building / name, volume, affine, words, 2)
        files.write_json(building / f"{case}.json", facts)

    files.replace_file(Path(folder) / case, write)
    return Path(folder) / case


def write_description(folder):
    """dataset_description.json of a set of synthetic cases, as BIDS wants it for derived data: the
    mark that stands above all its cases."""
    facts = json.loads((HERE / "dataset_description.json").read_text(encoding="utf-8"))
    facts["GeneratedBy"][0]["Version"] = bs.__version__
    files.write_json(Path(folder) / "dataset_description.json", facts)


def write_dataset_json(folder):
    """dataset.json of all cases in a folder, for nnU-Net (`dataset`; training on regions) and MONAI
    (`training`). regions_class_order: what is WT and nothing more is ED (2), and so on."""
    facts = json.loads((HERE / "dataset.json").read_text(encoding="utf-8"))
    facts["channel_names"] = {str(c): name.upper() for c, name in enumerate(bs.MODALITIES)}
    if bs.LABELS != bs.BRATS[1]:
        facts["labels"] = {"background": 0} | {name: k for k, name in enumerate(bs.LABELS, 1)}
        del facts["regions_class_order"]
    for case in nifti.find_cases(folder):
        paths = {name: path.relative_to(folder).as_posix() for name, path in case.files.items()}
        images = [paths[name] for name in bs.MODALITIES]
        facts["dataset"][case.case] = {"images": images, "label": paths["seg"]}
        facts["training"].append({"image": images, "label": paths["seg"]})
    facts["numTraining"] = len(facts["training"])
    files.write_json(Path(folder) / "dataset.json", facts)


def write_datasheet(folder):
    """DATASHEET.md of a set of synthetic cases: what they are, how they were made, what they must
    not be used for. Made from their sidecars with the marks of an audit, and from judge.json: an
    entry that differs between sidecars is written as all its values, "missing" among them."""
    facts = [synthetic_facts(case) for case in nifti.find_cases(folder)]
    sidecars = [row | row.get("Audit", {}) for row in facts]
    values = defaultdict(lambda: "missing")     # of an entry that no sidecar has
    for name in set().union(*sidecars):
        values[name] = ", ".join(sorted({str(row.get(name, "missing")) for row in sidecars}))
    rows = []
    for name in sidecars[0]["VolumesML"]:
        ml = [sidecar["VolumesML"][name] for sidecar in sidecars]
        rows.append(f"| {name} | {min(ml):.1f} | {np.median(ml):.1f} | {max(ml):.1f} |")
    judged = {"synthetic": {}, "prior": {}, "real": {}}
    with suppress(OSError, ValueError):         # there is no judge.json yet
        judged |= json.loads((Path(folder) / "judge.json").read_text(encoding="utf-8"))
    sets = [judged[name] for name in ("synthetic", "prior", "real")]
    figures = [f"| {name} | " + " | ".join(str(row.get(name, "missing")) for row in sets) + " |"
               for name in judged["real"]]
    values |= judged | {
        "cases": len(sidecars), "volumes": "\n".join(rows), "figures": "\n".join(figures),
        "used": sum(sidecar["UsedInTraining"] for sidecar in sidecars)}
    text = (HERE / "datasheet.md").read_text(encoding="utf-8").format_map(values)
    files.replace_file(Path(folder) / "DATASHEET.md", lambda path: path.write_text(text, "utf-8"))


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
    with suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["SyntheticData"] == "YES" and {*ORIGIN, "GeneratorTrainedOn"} <= set(facts):
            return facts
    raise bs.BadInput(f"{path}: no sidecar of a synthetic case; delete the folder, make it again")


def synthetic_facts(case):
    """The sidecar of a synthetic Case as a dict, see read_sidecar."""
    return read_sidecar(case.folder / f"{case.case}.json")


def already_there(folder, facts, source):
    """True if case facts["Case"] is in `folder` and its sidecar says what `facts` say, and that its
    label map and outline are those of `source`, a Case or None, which is read only if it is there.
    BadInput where the sidecar says otherwise, or there is none."""
    case = Path(folder) / facts["Case"]
    if not case.exists():
        return False
    found = read_sidecar(case / f"{case.name}.json")
    hashes = slices.hashes_of(source) if source else ()
    for name, wanted in json.loads(json.dumps(facts | dict(zip(ORIGIN, hashes)))).items():
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
