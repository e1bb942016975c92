"""Folders of BraTS cases: NIfTI files read and written, label conventions. Whatever is wrong with
a file is a BadInput.
"""
import gzip
import io
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

import brainsyn as bs
from kit import files


NAMES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}      # names since BraTS 2023
MODERN = {modern: name for name, modern in NAMES_2023.items()}
MAX_BYTES = 2 ** 31                     # no volume of this field needs more; stops a gzip bomb
CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FILE_NAME = re.compile(r"(?P<case>.+?)[-_](?P<what>t1(ce|n|c)?|t2[wf]?|flair|seg)\.nii(\.gz)?$")
# How a person's name gets into a header: DICOM writes DOE^JOHN.
PERSON = re.compile(rb"[A-Za-z]{2,}\^[A-Za-z]|patient|birth", re.IGNORECASE)
KINDS = ("rejected", "warned", "normalised")
COMMENTS = ("descrip", "intent_name", "aux_file", "db_name")    # header fields of free text
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


def read_nifti(path, notes=None):
    """One NIfTI volume in canonical axes (RAS+): array (X, Y, Z) and affine (4, 4), voxel -> mm.

    Byte order, scl_slope and scl_inter, and axes of length 1 behind the third are seen to. notes:
    list that takes a Finding on axes that were turned and on a header that names a person. BadInput
    where the file is damaged, is not one volume of finite numbers, or does not say where it lies.
    """
    try:
        raw, image_class = unpack(path)
        image = image_class.from_bytes(raw)
        canonical = nib.as_closest_canonical(nib.squeeze_image(image))
        volume, affine = np.asanyarray(canonical.dataobj), canonical.affine
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
    """A case on disk: nothing is read yet. files: {"t1": path, ..., "seg": path}; seg may be
    missing."""
    case: str                                   # as in the file names
    files: dict
    modern: bool                                # 2023 names: 3 is ET, 4 would be a cavity

    @property
    def folder(self):
        """Where its files lie."""
        return self.files["t1"].parent

    @property
    def patient(self):
        """Time points of one patient share it: BraTS-GLI-00012-000 and -001; Brats18_X_1, _2."""
        return re.sub(r"^(BraTS-.*)-\d{3}$|^((?i:brats1\d).*)_\d$", r"\1\2", self.case)


def leads_out(path, folder):
    """True if a path is a link to something outside the folder."""
    return path.is_symlink() and folder.resolve() not in path.resolve().parents


def list_files(folder, labelled):
    """All files below a folder that are named like those of a case, of labels only if labelled,
    sorted by path: {case: [("t1" .. "seg", path)]}; and [Finding] on links and other NIfTI files.
    """
    found, findings = {}, []
    for path in sorted(folder.rglob("*")):
        match = FILE_NAME.match(path.name)
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or match and match["what"] == "seg" and not labelled:
            continue
        if match:
            kind = MODERN.get(match["what"], match["what"])
            found.setdefault(match["case"], []).append((kind, path))
        elif path.is_dir() and leads_out(path, folder):
            findings.append(Finding("rejected", str(path), LINK))
        elif re.search(r"(?<!-classes)\.nii(\.gz)?$", path.name):
            findings.append(Finding("warned", str(path), "has no name of BraTS: not used"))
    return found, findings


def fault_of_case(case, found, folder, labelled):
    """What is wrong with the files of a case, see list_files: (path, text), or None."""
    links = [path for _, path in found if leads_out(path, folder)]
    missing = [kind for kind in (*bs.MODALITIES, *["seg"] * labelled) if kind not in dict(found)]
    first, last = found[0][1].parent, found[-1][1].parent
    if links:
        return links[0], LINK
    if not CASE_NAME.fullmatch(case):
        return first, f"case {case!r}: use letters, digits, dot, _ and - only, 64 at most"
    if first != last or len(dict(found)) < len(found):
        return last, f"files of case {case} are there twice, here or in {first}; keep one of each"
    text = f"case {case} has no {' and no '.join(missing)}; add files or move it away"
    return (first, text) if missing else None


def find_cases(folder, labelled=True, findings=None):
    """All cases below `folder`, at any depth, sorted by name: [Case]. Both generations of BraTS
    names, .nii and .nii.gz. labelled: labels are wanted; else they are left out where they are
    there. BadInput when there are no cases, a file is missing or there twice, two folders hold the
    same case, or a link leads out of the folder.

    findings: list that takes these as Findings instead; cases they concern are left out.
    """
    cases = []
    listed, noted = list_files(Path(folder), labelled)
    if not listed:
        raise bs.BadInput(f"{folder}: no such folder, or no BraTS case like X/X-t1c.nii.gz in it")
    for case, found in sorted(listed.items()):
        fault = fault_of_case(case, found, Path(folder), labelled)
        if fault:
            noted.append(Finding("rejected", str(fault[0]), fault[1]))
        else:
            modern = any(FILE_NAME.match(path.name)["what"] in MODERN for _, path in found)
            cases.append(Case(case, dict(found), modern))
    rejected = [finding for finding in noted if finding.kind == "rejected"]
    if findings is not None:
        findings += noted
    elif rejected:
        raise bs.BadInput(f"{rejected[0].where}: {rejected[0].text}")
    return cases


def standard_labels(labels, modern, path="labels"):
    """Any BraTS label map -> uint8 with 0, 1 NCR, 2 ED, 3 ET. ET is 4 up to BraTS 2021 and 3 since
    2023; since 2024, 4 is a resection cavity, which has no place here and is refused."""
    rounded = labels.round()
    if np.abs(labels - rounded).max() > 0.05:   # files written from floats read as 1.992
        raise bs.BadInput(f"{path}: labels are fractional; resample labels by nearest neighbour")
    low, high = rounded.min(), rounded.max()
    if low < 0 or high > 4:
        raise bs.BadInput(f"{path}: labels {low:.0f} to {high:.0f}; use 0, 1 NCR, 2 ED, 3 or 4 ET")
    if high == 4 and (modern or (rounded == 3).any()):
        raise bs.BadInput(f"{path}: label 4 is a cavity here; relabel it, or move the case away")
    return np.where(rounded == 4, 3, rounded).astype(np.uint8)


def read_labels(case, notes=None):
    """The label map of a Case: uint8 (X, Y, Z) in 0..3, canonical, and its affine. notes: as
    read_nifti."""
    labels, affine = read_nifti(case.files["seg"], notes)
    if notes is not None and 3.5 < labels.max() < 4.5:
        notes.append(Finding("normalised", str(case.files["seg"]), "ET is 4: read as 3"))
    return standard_labels(labels, case.modern, case.files["seg"]), affine


def read_case(case, notes=None):
    """Read one Case: scans float32 (C, X, Y, Z) as stored, labels uint8 (X, Y, Z) in 0..3 (0 where
    the case has none), affine. All canonical (RAS+). notes: as read_nifti. BadInput where shapes or
    affines of the files differ, or a scan cannot be one.
    """
    labels, affine = read_labels(case, notes) if "seg" in case.files else (None, None)
    for c, name in enumerate(bs.MODALITIES):
        path = case.files[name]
        scan, place = read_nifti(path, notes)
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
    the grid of the case's own files, in their storage order: 1 NCR, 2 ED, 3 ET."""
    there = nib.load(case.files["t1"]).affine
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(there))
    stored = nib.apply_orientation(labels, turn).astype(np.uint8)
    words = f"brainsyn {bs.__version__} prediction 1 NCR 2 ED 3 ET"
    files.replace_file(path, lambda temporary: write_nifti(temporary, stored, there, words, 1))
