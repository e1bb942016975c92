"""Folders of BraTS cases: NIfTI files read and written, label conventions. Whatever is wrong with
a file is a BadInput.
"""
import gzip
import io
import json
import math
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

import brainsyn as bs
from kit import files


NAMES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}      # names since BraTS 2023
# How files of a modality, or of labels, end in the data sets people have, in any case of letters:
# BraTS, UCSF-PDGM, UPENN-GBM, BIDS. Of several label files of a case the first kind is read.
SUFFIXES = {"t1": ("t1", "t1n", "t1w"), "t1ce": ("t1ce", "t1c", "t1gd", "ce-gd_t1w"),
            "t2": ("t2", "t2w"), "flair": ("flair", "t2f"),
            "seg": ("seg", "segm", "tumor_segmentation", "dseg", "automated_approx_segm")}
MAX_BYTES = 2 ** 31                     # no volume of this field needs more; stops a gzip bomb
CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PHANTOM = re.compile(r"BraTS(-PHA-|20_Phantom_)(\d+)(-000)?")             # see kit/phantoms.py
# How a person's name gets into a header: DICOM writes DOE^JOHN.
PERSON = re.compile(rb"[A-Za-z]{2,}\^[A-Za-z]|patient|birth", re.IGNORECASE)
KINDS = ("rejected", "warned", "normalised")
COMMENTS = ("descrip", "intent_name", "aux_file", "db_name")    # header fields of free text
# --label-map: {value in files of labels: number of a label}; where it is empty, those of BraTS.
LABEL_VALUES = {}
MOST_VISITS = 12                        # what is shared by more cases is no patient's name
# What people have that is not read, by the ends of file names.
UNREADABLE = {("_unstripped.nii.gz",): "scans with skull; give those without",
              (".dcm",): "DICOM series; convert them with dcm2niix and strip the skull",
              (".mha", ".mgz", ".nrrd"): "MetaImage, FreeSurfer or NRRD; convert them to NIfTI",
              (".h5",): "HDF5 slices; take the NIfTI release",
              (".png", ".tif"): "pictures; volumes are needed"}
LINK = "is a link that leads out of the folder; copy the files, or name the folder they lie in"
spacing_of = nib.affines.voxel_sizes    # affine (4, 4) -> mm a voxel along each axis (3,)


def in_threads(function, items):
    """[function(item) for item in items], in up to four threads."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


class Finding(NamedTuple):
    """What a check says of a file or folder `where`. kind: "rejected" is not used, "warned" is used
    and worth a look, "normalised" is unusual and read rightly. text: what it is, what to do."""
    kind: str
    where: str
    text: str


def parse_header(raw):
    """The first bytes of a NIfTI-1 or -2 file, of either byte order -> (nibabel's image class, how
    many bytes the whole file must have). ValueError or nibabel's errors where they make no sense.
    """
    kinds = {348: nib.Nifti1Image, 540: nib.Nifti2Image}                # by size of the header
    claimed = {int.from_bytes(raw[:4], order) for order in ("little", "big")} & set(kinds)
    if not claimed:                             # a web page, a pointer of Git LFS, nothing
        raise ValueError(f"it begins with {raw[:24]}, not like a NIfTI file")
    image_class = kinds[max(claimed)]
    header = image_class.header_class(raw[:max(claimed)], check=False)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    offset = float(header["vox_offset"])
    size = int(offset) + math.prod(shape) * dtype.itemsize
    if not (header["magic"].item()[:3] in (b"n+1", b"n+2")          # one file, not a pair
            and {int(header["sform_code"]), int(header["qform_code"])} <= set(range(6))
            and header["bitpix"] == 8 * dtype.itemsize and shape and min(shape) >= 1
            and 348 <= int(offset) == offset <= size <= MAX_BYTES):
        raise ValueError(f"its header claims {size} bytes for {dtype} voxels in shape {shape}")
    return image_class, size


def unpack(path):
    """The bytes of a NIfTI file, packed or not, whatever its name, unpacked and verified ->
    (bytes, nibabel's image class). ValueError, EOFError, OSError or zlib.error says what is wrong.

    The header is unpacked first: it says how long the file is, so that a small file cannot unfold
    without end. Then the whole stream is, to its end, where gzip compares checksums: readers that
    stop at the last voxel return wrong values in silence when a bit has flipped.
    """
    stream = io.BytesIO(Path(path).read_bytes())
    if stream.getbuffer()[:2] == b"\x1f\x8b":
        stream = gzip.GzipFile(fileobj=stream)
    content = stream.read(540)                  # a NIfTI-2 header
    image_class, size = parse_header(content)
    content += stream.read(max(0, size + 1 - len(content)))
    if len(content) != size:
        raise ValueError(f"it does not hold the {size} bytes that its header claims")
    return content, image_class


def note_oddities(path, image, notes):
    """Add to `notes`, a list, Findings on a NIfTI file that is read rightly all the same. image: as
    stored."""
    header, extensions = image.header, image.header.extensions
    axes = "".join(nib.aff2axcodes(image.affine))
    if axes != "RAS":
        notes.append(Finding("normalised", str(path), f"axes stored as {axes}: turned to RAS"))
    comments = [header[name].item() for name in COMMENTS if name in header.keys()]
    comments += [bytes(str(extension.get_content()), "utf8") for extension in extensions]
    if PERSON.search(b" ".join(comments)) or 2 in extensions.get_codes():       # 2 is DICOM
        notes.append(Finding("warned", str(path), "its header seems to name a person; clean it"))


def read_nifti(path, notes=None, channel=None):
    """One NIfTI volume in canonical axes (RAS+): array (X, Y, Z) and affine (4, 4), voxel -> mm.
    channel: which volume of a file that holds several, (X, Y, Z, channels).

    Byte order, scl_slope and scl_inter, and axes of length 1 behind the third are seen to. notes:
    list that takes a Finding on axes that were turned and on a header that names a person. BadInput
    where the file is damaged, is not one volume of finite numbers, or does not say where it lies.
    """
    try:
        raw, image_class = unpack(path)
        image = image_class.from_bytes(raw)
        canonical = nib.as_closest_canonical(nib.squeeze_image(image))
        volume, affine = np.asanyarray(canonical.dataobj), canonical.affine
        volume = volume if channel is None else volume[..., channel]
    except Exception as error:                  # nibabel raises what it likes on damaged headers
        raise bs.BadInput(f"{path}: cannot be read ({error}); copy or download it again") from error
    spacing = spacing_of(affine)
    placed = max(image.header["sform_code"], image.header["qform_code"]) > 0
    if not (placed and np.isfinite(affine).all() and 0.05 < spacing.min() <= spacing.max() < 50):
        raise bs.BadInput(f"{path}: does not say where it is ({spacing} mm a voxel); export again")
    if volume.ndim != 3 or min(volume.shape) < 2 or volume.dtype.kind not in "biuf":
        raise bs.BadInput(f"{path}: {volume.dtype} {volume.shape}; give plain numbers in 3-D")
    if not np.isfinite(volume).all():
        raise bs.BadInput(f"{path}: contains NaN or infinite voxels; repair it or export it again")
    if notes is not None:
        note_oddities(path, image, notes)
    return volume, affine


class Case(NamedTuple):
    """A case on disk: nothing is read yet."""
    case: str                                   # as in the file names
    files: dict                                 # {"t1": path, ..., "seg": path}; seg may be missing
    modern: bool = False                        # 2023 names: 3 is ET, 4 may be a cavity
    channels: dict | None = None                # {"t1": 0, ...} where one file holds all scans
    values: dict | None = None                  # {value in its labels: number}, where that is known
    known_as: str = ""                          # the patient, where the name does not tell

    @property
    def folder(self):
        """Where its scans lie."""
        return self.files[next(iter(self.files))].parent

    @property
    def patient(self):
        """Time points of one patient share it: BraTS-GLI-00012-000 and -001; Brats18_X_1 and _2;
        UPENN-GBM-00001_11 and _21; P7_visit1 and P7_visit2."""
        return self.known_as or patient_of(self.case)


# What follows the patient in the name of a case: up to three digits, or a date or a word.
VISIT = re.compile(r"[-_]((?P<number>\d{1,3})|\d{8}|\d{4}-\d\d-\d\d|(ses|visit|tp|time|fu|follow"
                   r"|scan|day|week|month|pre|post|base)[a-z]*[-_]?\w*)$", re.IGNORECASE)


def patient_of(name):
    """The name of a case without what says which visit it is. What is left must end in a number: of
    digits alone, and no year, where the visit is a number too; or be a name of BraTS 2017 to 2019.
    """
    visit = VISIT.search(name)
    if not visit:
        return name
    stem = name[:visit.start()]
    numbered = r"[-_](?!(19|20)\d\d$)\d+$" if visit["number"] else r"\d$"
    return stem if re.search(numbered, stem) or re.match(r"(?i)brats1\d_", name) else name


def leads_out(path, folder):
    """True if a path is a link to something outside the folder."""
    return path.is_symlink() and folder.resolve() not in path.resolve().parents


def list_files(folder, findings):
    """All files below a folder that are not hidden, sorted. findings: list that takes Findings on
    folders that are links or cannot be read."""
    def refuse(error):
        if not Path(folder).exists():
            return
        text = f"cannot be read ({error.strerror}); change its permissions or move it away"
        findings.append(Finding("rejected", error.filename, text))

    listed = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place, name) for name in folders]
        findings += [Finding("rejected", str(path), LINK) for path in paths
                     if leads_out(path, folder)]
        listed += [path for path in [Path(place, name) for name in names] + paths
                   if not path.name.startswith(".")]
    return sorted(listed)


def plain(text):
    """A name in lower case without signs and spaces: "T1-Gd" -> "t1gd"."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def kind_of(name):
    """What a part of a file name, or the name of a channel, stands for: "T1Gd" -> "t1ce"; for a
    name that is not in SUFFIXES the name itself, in lower case."""
    kinds = [kind for kind, suffixes in SUFFIXES.items() if plain(name) in map(plain, suffixes)]
    return kinds[0] if kinds else plain(name)


def file_name():
    """A pattern for names of files: CASE_t1.nii.gz, CASE-t1n.nii ..., in any case of letters."""
    words = [word for kind in (*SUFFIXES, *bs.MODALITIES) for word in SUFFIXES.get(kind, (kind,))]
    what = "|".join(map(re.escape, words))
    return re.compile(rf"(?P<case>.+?)[-_](?P<what>{what})\.nii(\.gz)?$", re.IGNORECASE)


def sort_by_name(folder, paths, labelled, findings):
    """Files below a folder that are named by case and modality -> {case: [("t1" .. "seg", path)]}.
    findings: list that takes Findings on the layout and on other NIfTI files."""
    found, pattern, others = {}, file_name(), set()
    for path in paths:
        match = pattern.match(path.name)
        if match and (labelled or kind_of(match["what"]) != "seg"):
            found.setdefault(match["case"], []).append((kind_of(match["what"]), path))
            others.add(match["what"].lower())
        elif not match and re.search(r"(?<!-classes)\.nii(\.gz)?$", path.name, re.IGNORECASE):
            findings.append(Finding("warned", str(path), "its name says of no scan what it is: not "
                                    "used"))
    for name, sign in (("UCSF-PDGM", "tumor_segmentation"), ("UPENN-GBM", "t1gd"), ("BIDS", "t1w")):
        if sign in others:
            text = f"laid out as {name}: read in place, files end in {', '.join(sorted(others))}"
            findings.append(Finding("normalised", str(folder), text))
    return found


def label_named(name):
    """The label, in LABELS or "background", that a data set calls so; None where it cannot be told.
    "edema" and "whole tumor" are ED (a region gives the label that only it has), "non-enhancing"
    and "tumor core" NCR, "enhancing tumor" ET."""
    known = [label for label in (*bs.LABELS, "background") if plain(label) == plain(name)]
    if not known and bs.LABELS == bs.BRATS[1]:
        known = [label for words, label in (("nonenhanc|netc", "NCR"), ("enhanc", "ET"),
                                            ("oedema|edema|snfh|whole", "ED"),
                                            ("necro|core", "NCR")) if re.search(words, plain(name))]
    return known[0] if known else None


def values_of(path, labels):
    """What the values in labels mean, by the "labels" of a dataset.json: {"0": "background"} of the
    decathlon, {"background": 0} or regions {"whole": [1, 2, 3]} of nnU-Net -> {value: number of a
    label}. BadInput where a name is not understood."""
    regions = []
    for key, entry in labels.items():
        name, values = (entry, key) if str(key).isdecimal() else (key, entry)
        regions.append((values if isinstance(values, list) else [values], name))
    regions.sort(key=lambda region: -len(region[0]))            # of several the smallest counts
    names = {int(value): name for values, name in regions for value in values}
    found = {value: label_named(name) for value, name in names.items()}
    unknown = [names[value] for value, label in found.items() if label is None]
    if unknown:
        raise bs.BadInput(f"{path}: its label {unknown[0]!r} is none of {', '.join(bs.LABELS)}; "
                          "say what values mean, --label-map 1=NCR,2=ED,3=ET or lesion=1")
    return {value: ("background", *bs.LABELS).index(label) for value, label in found.items()}


def list_raw(home, facts, labelled):
    """Raw data of nnU-Net (X_0000.nii.gz, X_0001 ...: a file a channel) or of the Medical
    Segmentation Decathlon (X.nii.gz: all channels in one file), whose dataset.json in the folder
    `home` says `facts` -> {case: [(kind, path)]} and {kind: channel}, None for nnU-Net."""
    names = facts.get("channel_names") or facts.get("modality") or {}
    kinds = {int(number): kind_of(name) for number, name in names.items()}
    found, in_one = {}, False
    for path in sorted(path for part in ("imagesTr", *["imagesTs"] * (not labelled))
                       for path in (home / part).glob("[!.]*.nii*")):
        case, _, number = path.name.split(".nii")[0].rpartition("_")
        if re.fullmatch(r"\d{4}", number) and int(number) in kinds:
            found.setdefault(case, []).append((kinds[int(number)], path))
        else:
            in_one = True
            found[path.name.split(".nii")[0]] = [(kind, path) for kind in kinds.values()]
    for case, parts in found.items():
        parts += [("seg", path) for path in (home / "labelsTr").glob(f"{case}.nii*") if labelled]
    return found, {kind: number for number, kind in kinds.items()} if in_one else None


def list_layouts(folder, labelled, findings):
    """Every case below a folder -> [(case, [(kind, path)], channels, values)], see Case. findings:
    list that takes what is to be said of files and layouts."""
    paths, raw, entries = list_files(folder, findings), [], []
    for path in paths:
        if path.name == "dataset.json" and (path.parent / "imagesTr").is_dir():
            try:
                facts = json.loads(path.read_text(encoding="utf-8"))
                values = labelled and (LABEL_VALUES or values_of(path, facts.get("labels", {})))
                found, channels = list_raw(path.parent, facts, labelled)
            except (ValueError, AttributeError, TypeError) as error:
                findings.append(Finding("rejected", str(path), f"cannot be read ({error})"))
                continue
            name = "the Medical Segmentation Decathlon" if channels else "nnU-Net"
            meant = [f"{value} {bs.LABELS[k - 1]}" for value, k in (values or {}).items() if k]
            findings.append(Finding("normalised", str(path.parent), "laid out as raw data of "
                                    f"{name}: read in place; labels: {', '.join(meant) or 'none'}"))
            entries += [(case, parts, channels, values) for case, parts in found.items()]
            raw.append(path.parent)
    rest = [path for path in paths if not any(home in path.parents for home in raw)]
    entries += [(case, parts, None, None)
                for case, parts in sort_by_name(folder, rest, labelled, findings).items()]
    if not entries and not any(finding.kind == "rejected" for finding in findings):
        looks = [f" (these look like {what})" for ends, what in UNREADABLE.items()
                 if any(path.name.lower().endswith(ends) for path in paths)]
        raise bs.BadInput(f"{folder}: no such folder, or no case in it{''.join(looks[:1])}; "
                          "expected files like X/X-t1c.nii.gz")
    return sorted(entries)


def fault_of_case(case, found, folder, labelled):
    """What is wrong with the files of a case, [(kind, path)]: (path, text), or None."""
    links = [path for _, path in found if leads_out(path, folder)]
    missing = [kind for kind in (*bs.MODALITIES, *["seg"] * labelled) if kind not in dict(found)]
    scans = [path.parent for kind, path in found if kind != "seg"]
    first, last = found[0][1].parent, found[-1][1].parent
    if links:
        return links[0], LINK
    if not CASE_NAME.fullmatch(case):
        return first, f"case {case!r}: use letters, digits, dot, _ and - only, 64 at most"
    if len(set(scans)) > 1 or len(dict(found)) < len(found):
        return last, f"files of case {case} are there twice, here or in {first}; keep one of each"
    text = f"case {case} has no {' and no '.join(missing)}; add files or move it away"
    return (first, text) if missing else None


def files_of_case(found):
    """The files of a case that are used, [(kind, path)]: of modalities, in their order, and labels;
    of several kinds of label files the first one in SUFFIXES."""
    ends = [[path for kind, path in found if kind == "seg" and
             re.search(rf"[-_]{end}\.nii", path.name, re.IGNORECASE)] for end in SUFFIXES["seg"]]
    labels = next(filter(None, ends), [path for kind, path in found if kind == "seg"])
    return [*((kind, path) for name in bs.MODALITIES for kind, path in found if kind == name),
            *(("seg", path) for path in labels)]


def find_cases(folder, labelled=True, findings=None):
    """All cases below `folder`, at any depth, sorted by name: [Case]. .nii and .nii.gz, named and
    laid out as BraTS, UCSF-PDGM, UPENN-GBM, BIDS (see SUFFIXES), nnU-Net or the decathlon have
    them; labels may lie in another folder than scans. labelled: labels are wanted; else they are
    left out where they are there. BadInput when there are no cases, a file is missing or there
    twice, two folders hold the same case, or a link leads out of the folder.

    findings: list that takes these as Findings instead; cases they concern are left out.
    """
    cases, noted = [], []
    entries = list_layouts(Path(folder), labelled, noted)
    often = Counter(case for case, *_ in entries)
    for case, found, channels, values in entries:
        used = files_of_case(found)
        fault = fault_of_case(case, used or found, Path(folder), labelled)
        if often[case] > 1:
            fault = found[0][1], f"case {case} is there twice, in another folder too; keep one"
        if fault:
            noted.append(Finding("rejected", str(fault[0]), fault[1]))
            continue
        modern = all(path.name.split(".nii")[0].endswith(NAMES_2023[kind]) for kind, path in used
                     if kind in NAMES_2023)
        if case.startswith("BraTS-SYN-"):       # made by sample.py
            values = {k: k for k in range(1, len(bs.LABELS) + 1)}
        if PHANTOM.fullmatch(case) and len(bs.LABELS) == 1:     # the whole tumour is that label
            values = dict.fromkeys((1, 2, 3, 4), 1)
        cases.append(Case(case, dict(used), modern, channels, values))
    rejected = [finding for finding in noted if finding.kind == "rejected"]
    if findings is not None:
        findings += noted
    elif rejected:
        raise bs.BadInput(f"{rejected[0].where}: {rejected[0].text}")
    shared = Counter(case.patient for case in cases)            # no patient was scanned that often
    return [case._replace(known_as=case.case) if shared[case.patient] > MOST_VISITS else case
            for case in cases]


def standard_labels(labels, values, path="labels"):
    """A label map as stored -> uint8 with 0 and the numbers of LABELS: 1 NCR, 2 ED, 3 ET. values:
    {value in the file: number}. BadInput where it holds a value that is not among these."""
    rounded = labels.round()
    if np.abs(labels - rounded).max() > 0.05:   # files written from floats read as 1.992
        raise bs.BadInput(f"{path}: labels are fractional; resample labels by nearest neighbour")
    low, high = rounded.min(), rounded.max()
    if low < 0 or high > 255:
        raise bs.BadInput(f"{path}: labels {low:.0f} to {high:.0f}; use 0, 1 NCR, 2 ED, 3 or 4 ET")
    rounded, table = rounded.astype(np.uint8), np.zeros(256, np.uint8)
    table[list(values)] = list(values.values())
    there = np.flatnonzero(np.bincount(rounded.ravel(), minlength=256))
    unknown = [value for value in there if value and value not in values]
    if unknown:
        raise bs.BadInput(f"{path}: nothing says what label {unknown[0]} is; give --label-map, "
                          "such as 1=NCR,2=ED,3=ET,4=background")
    return table[rounded]


def enhances(case, mask):
    """True if voxels of a case, bool (X, Y, Z), are brighter than the rest of the brain on T1ce."""
    scan = read_scan(case, "t1ce")[0]
    rest = scan[(scan != scan[0, 0, 0]) & ~mask]
    return bool(len(rest) and scan[mask].mean() > np.median(rest))


def values_in(case, labels, notes):
    """{value: number} of a Case, see there: what its data set or --label-map says; else as BraTS
    has it. ET is 4 up to 2021 and 3 since 2023; since 2024, 4 is a resection cavity: where names do
    not tell, the scans do. notes: list that takes a Finding on that."""
    if case.values or LABEL_VALUES:
        return case.values or LABEL_VALUES
    fours = np.abs(labels - 4) < 0.5
    if not fours.any() or bs.LABELS != bs.BRATS[1]:
        return {k: k for k in range(1, len(bs.LABELS) + 1)}
    beside = (np.abs(labels - 3) < 0.5).any()
    asked = case.modern and not beside and "t1ce" in case.files
    if beside or asked and not enhances(case, fours):
        raise bs.BadInput(f"{case.files['seg']}: label 4 is a cavity here (since 2024) or oedema "
                          "(BraTS-PED: --label-map 1=ET,2=NCR,3=NCR,4=ED); say what it is, such as "
                          "--label-map 1=NCR,2=ED,3=ET,4=background, or move the case away")
    if notes is not None:
        notes.append(Finding("normalised", str(case.files["seg"]), "ET is 4: read as 3"))
    return {1: 1, 2: 2, 4: 3}


def read_labels(case, notes=None):
    """The label map of a Case: uint8 (X, Y, Z), 0 or the number of a label, canonical, and its
    affine. notes: as read_nifti."""
    labels, affine = read_nifti(case.files["seg"], notes)
    values = values_in(case, labels, notes)
    return standard_labels(labels, values, case.files["seg"]), affine


def read_scan(case, name, notes=None):
    """One scan of a Case and its affine, see read_nifti. name: of MODALITIES."""
    return read_nifti(case.files[name], notes, case.channels and case.channels[name])


def read_case(case, notes=None):
    """Read one Case: scans float32 (C, X, Y, Z) as stored, labels uint8 (X, Y, Z) (0 where the case
    has none), affine. All canonical (RAS+). notes: as read_nifti. BadInput where shapes or
    affines of the files differ, or a scan cannot be one.
    """
    labels, affine = read_labels(case, notes) if "seg" in case.files else (None, None)
    for c, name in enumerate(bs.MODALITIES):
        path = case.files[name]
        scan, place = read_scan(case, name, notes)
        if labels is None:
            labels, affine = np.zeros(scan.shape, np.uint8), place
        if c == 0:
            # x runs fastest in memory, as in the files: a third faster than the other way round
            scans = np.empty((len(bs.MODALITIES), *labels.shape[::-1]), np.float32).swapaxes(1, 3)
        if scan.shape != labels.shape or not np.allclose(place, affine, atol=0.02):
            raise bs.BadInput(f"{path}: shapes or affines differ; register the case to one grid")
        low, high = float(scan.min()), float(scan.max())
        wrapped = scan.dtype.type is np.int16 and min(-low, high) > 29490       # 0.9 of its range
        if wrapped or low == high or not 1e-6 < max(-low, high) < 1e9:
            raise bs.BadInput(f"{path}: from {low:g} to {high:g}, which no scan has; export again")
        scans[c] = scan
        for earlier in range(c):
            if np.array_equal(scans[c], scans[earlier]):
                raise bs.BadInput(f"{path}: the same scan as {bs.MODALITIES[earlier]}; replace it")
    return scans, labels, affine


def write_nifti(path, volume, affine, words, code):
    """Write a volume (X, Y, Z) as a packed NIfTI file, whatever its name, and read it back: OSError
    where other bytes come back than were sent.

    The header is fresh: nothing of a source file (names, comments, extensions) can travel along.
    words: what it says of itself, 79 letters at most; code: NIfTI's code for what the affine refers
    to (1 scanner, 2 another file).
    """
    image = nib.Nifti1Image(np.ascontiguousarray(volume), affine)
    image.header["descrip"] = words.encode()
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    with open(path, "wb") as handle, gzip.GzipFile("", "wb", 1, handle, 0) as packed:
        packed.write(image.to_bytes())
    files.sync(path)
    try:
        if unpack(path)[0] != image.to_bytes():
            raise ValueError("other bytes than were sent")
    except Exception as error:
        raise OSError(f"{path} cannot be read back ({error})") from error


def write_labels(path, labels, case, affine):
    """Write predicted labels uint8 (X, Y, Z), canonical with `affine`, as NIfTI voxel for voxel on
    the grid of the case's own files, in their storage order: numbers of LABELS."""
    there = nib.load(case.files[bs.MODALITIES[0]]).affine
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(there))
    stored = nib.apply_orientation(labels, turn).astype(np.uint8)
    names = " ".join(f"{k} {name}" for k, name in enumerate(bs.LABELS, 1))
    words = f"brainsyn {bs.__version__} prediction {names}"[:79]
    files.replace_file(path, lambda temporary: write_nifti(temporary, stored, there, words, 1))
