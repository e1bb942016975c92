"""Folders of BraTS cases: NIfTI files read and written, label conventions. Every doubt is a
BadInput.
"""
from __future__ import annotations

import math
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

import brainsyn as bs
from kit import files


NAMES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}      # names since BraTS 2023


MAX_BYTES = 2 ** 31                     # no volume of this field needs more; stops a gzip bomb
CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FILE_NAME = re.compile(r"^(?P<case>.+?)[-_](?P<what>t1|t1ce|t2|flair|t1n|t1c|t2w|t2f|seg)\.nii(\.gz)?$")
MODERN = {modern: name for name, modern in NAMES_2023.items()}
# How a person's name gets into a header: DICOM writes DOE^JOHN.
PERSON = re.compile(rb"[A-Za-z]{2,}\^[A-Za-z]|patient|birth", re.IGNORECASE)


def spacing_of(affine):
    """Affine (4, 4) -> mm a voxel along each axis (3,)."""
    return np.linalg.norm(affine[:3, :3], axis=0)


KINDS = ("rejected", "warned", "normalised")


@dataclass(frozen=True)
class Finding:
    """What a check has to say of a file or folder `where`. kind: "rejected" is not used, "warned"
    is used and worth a look, "normalised" was unusual and is read rightly. text: what it is, what
    to do."""
    kind: str
    where: str
    text: str


def unpack(path):
    """The bytes of a NIfTI file, unpacked and verified -> (bytes, whether it was packed).
    ValueError says what is wrong.

    The header is unpacked first: it says how long the rest may be, so that a small file cannot
    unfold without end. Then the whole stream is, and its checksums are verified, before a voxel is
    used: readers that stop at the last voxel return wrong values in silence when a bit has flipped.
    """
    raw = Path(path).read_bytes()
    if not raw:
        raise ValueError("it is empty")
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS, not the file; git lfs pull fetches it")
    if raw[:100].lstrip()[:1] == b"<":
        raise ValueError("it is a web page, not a scan")
    if raw[:2] != b"\x1f\x8b":
        return raw, False
    head, parts = zlib.decompressobj(31).decompress(raw, 540), []
    room = expected_bytes(head)
    while raw.rstrip(b"\0"):                    # a gzip file may have several members
        stream = zlib.decompressobj(31)
        parts.append(stream.decompress(raw, room + 1))
        if not stream.eof:
            raise ValueError("the gzip stream ends early" if len(parts[-1]) <= room else
                             "it unfolds to more than its header says")
        raw, room = stream.unused_data, room - len(parts[-1])
    return b"".join(parts), True


def nifti_header(raw):
    """The nibabel header class and header that these first bytes of a NIfTI-1 or -2 file hold, of
    either byte order. ValueError where they are neither."""
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        size = kind.header_class.template_dtype.itemsize
        if size in (int.from_bytes(raw[:4], order) for order in ("little", "big")) and len(
            raw) >= size:
            return kind, kind.header_class(raw[:size], check=False)
    raise ValueError("it does not begin like a NIfTI file")


def expected_bytes(raw):
    """How long the file must be of which `raw` is the beginning. ValueError where its header makes
    no sense."""
    header = nifti_header(raw)[1]
    if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
        raise ValueError("it is one of a pair of header and image files, or no NIfTI")
    if not {int(header["sform_code"]), int(header["qform_code"])} <= set(range(6)):
        raise ValueError(f"its header has sform code {header['sform_code']}, qform code "
                         f"{header['qform_code']}")
    shape, dtype = [int(n) for n in header["dim"][1:1 + int(header["dim"][
        0])]], header.get_data_dtype()
    if int(header["bitpix"]) != 8 * dtype.itemsize or not 1 <= len(shape) <= 7 or min(shape) < 1:
        raise ValueError(f"its header claims {header['bitpix']} bits a voxel of {dtype} in shape "
                         f"{shape}")
    size = int(header["vox_offset"]) + math.prod(shape) * dtype.itemsize
    if not 348 <= int(header["vox_offset"]) == header["vox_offset"] <= size <= MAX_BYTES:
        raise ValueError(f"its header claims {size} bytes for shape {shape}, from byte "
                         f"{header['vox_offset']} on")
    return size


def read_nifti(path, notes=None):
    """One NIfTI volume in canonical axes (RAS+): array (X, Y, Z) and affine (4, 4), voxel -> mm.

    notes: list that takes a Finding for whatever was unusual. BadInput where the file is damaged,
    is not one volume of finite numbers, or does not say where it lies.
    """
    note = lambda kind, text: notes is not None and notes.append(Finding(kind, str(path), text))
    try:
        raw, packed = unpack(path)
        size = expected_bytes(raw)
        if len(raw) != size:
            raise ValueError(f"it holds {len(raw)} bytes where its header says {size}")
        kind, header = nifti_header(raw)
        image = kind.from_bytes(raw)
        turned = nib.as_closest_canonical(image)
        volume, affine = np.asanyarray(turned.dataobj), turned.affine
    except Exception as error:                  # nibabel raises what it likes on damaged headers
        raise bs.BadInput(f"{path}: cannot be read as NIfTI ({error}); copy or download it again") from error
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        raise bs.BadInput(f"{path}: its header does not say where it lies (no sform, no qform); "
                          "export it again")
    if not np.isfinite(affine).all() or not 0.05 < spacing_of(affine).min() <= spacing_of(
        affine).max() < 50:
        raise bs.BadInput(f"{path}: voxels of {spacing_of(affine).round(3).tolist()} mm; its "
                          "header is damaged, export it again")
    while volume.ndim > 3 and volume.shape[-1] == 1:
        volume = volume[..., 0]
        note("normalised", "one volume in more than three axes: the last one is dropped")
    if volume.ndim != 3 or volume.dtype.kind not in "biuf":
        raise bs.BadInput(f"{path}: holds {volume.dtype} voxels in shape {volume.shape}, not one "
                          "3-D volume of plain numbers; split it into one file per modality")
    if min(volume.shape) < 2:
        raise bs.BadInput(f"{path}: is one slice (shape {volume.shape}), wanted is a volume")
    if volume.dtype.kind == "f" and not np.isfinite(volume).all():
        raise bs.BadInput(f"{path}: contains NaN or infinite voxels; export it again or repair it")
    if not packed and str(path).endswith(".gz"):
        note("normalised", "named .gz, but not packed: read as it is")
    if header.endianness != nib.volumeutils.native_code:
        note("normalised", "bytes stored the other way round: turned")
    if header.get_slope_inter() not in ((None, None), (1.0, 0.0)):
        note("normalised", "its header scales the voxels (scl_slope, scl_inter): applied")
    if nib.aff2axcodes(image.affine) != ("R", "A", "S"):
        note("normalised", f"axes stored as {''.join(nib.aff2axcodes(image.affine))}: turned to "
             "RAS")
    words = b" ".join(header[name].item() for name in ("descrip", "intent_name", "aux_file",
                                                       "db_name") if name in header.keys())
    if PERSON.search(words) or any(its.get_code() == 2
                                   or PERSON.search(bytes(str(its.get_content()), "utf8"))
                                   for its in image.header.extensions):
        note("warned", "its header seems to name a person, or holds DICOM fields; it never travels "
             "into synthetic files, but clean it before you pass this one on")
    return volume, affine


@dataclass
class Case:
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
        if self.case.startswith("BraTS-"):
            return re.sub(r"-\d{3}$", "", self.case)
        return re.sub(r"_\d$", "", self.case) if re.match(r"(?i)brats1\d", self.case) else self.case


def find_cases(folder, labelled=True, findings=None):
    """All cases below `folder`, at any depth, sorted by name: [Case]. Both generations of BraTS
    names, .nii and .nii.gz. BadInput when there are none, a modality or (if labelled) the labels
    are missing, two folders hold the same case, or a link leads out of the folder.

    findings: list that takes these as Findings instead; cases they concern are left out.
    """
    def refuse(where, text):
        if findings is None:
            raise bs.BadInput(f"{where}: {text}")
        findings.append(Finding("rejected", str(where), text))

    folder = Path(folder)
    if not folder.is_dir():
        raise bs.BadInput(f"{folder}: no such folder; expected a folder of BraTS cases")
    found, bad, home = {}, set(), folder.resolve()
    paths = [Path(at) / name for at, folders, names in os.walk(folder)
             for name in [*folders, *names]]
    for path in sorted(paths):
        match = FILE_NAME.match(path.name)
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if (match or path.is_dir()) and path.is_symlink() and home not in path.resolve().parents:
            refuse(path, "is a link that leads out of the folder; copy the files, or name the "
                   "folder they lie in")
            bad.add(match and match["case"])
        elif match:
            found.setdefault(match["case"], []).append((MODERN.get(match["what"], match["what"]),
                                                        path))
        elif findings is not None and re.search(r"(?<!-classes)\.nii(\.gz)?$", path.name):
            findings.append(Finding("warned", str(path), "has no name of BraTS (CASE_t1ce.nii.gz, "
                                    "CASE-t1c.nii.gz): not used"))
    if not found and not bad:
        refuse(folder, "holds no BraTS case; expected files like CASE/CASE_t1ce.nii.gz or "
               "CASE/CASE-t1c.nii.gz")
    cases = []
    for case, found_files in sorted(found.items()):
        names, where = [name for name, _ in found_files], [path.parent for _, path in found_files]
        missing = [name for name in (*bs.MODALITIES, *["seg"] * labelled) if name not in names]
        twice = [path for i, (name, path) in enumerate(found_files) if name in names[:i]]
        if case in bad:
            continue
        if not CASE_NAME.fullmatch(case):
            refuse(where[0], f"case {case!r} is no name to use; letters, digits, dot, _ and - "
                   "only, 64 at most")
        elif len(set(where)) > 1:
            refuse(where[-1], f"case {case} is also in {where[0]}; keep one of them")
        elif twice:
            refuse(twice[0], f"this file of case {case} is there twice; keep one of them")
        elif missing:
            refuse(where[0], f"case {case} has " + ("labels but no scans" if names == ["seg"]
                                                    else "no " + " and no ".join(missing))
                   + "; add the files or move the case away")
        else:
            cases.append(Case(case, dict(found_files),
                              any(FILE_NAME.match(p.name)["what"] in MODERN for _,
                                  p in found_files)))
    return cases


def standard_labels(labels, modern, path="labels"):
    """Any BraTS label map -> uint8 with 0, 1 NCR, 2 ED, 3 ET. ET is 4 up to BraTS 2021 and 3 since
    2023; since 2024, 4 is a resection cavity, which has no place here and is refused."""
    rounded = labels
    if labels.dtype.kind == "f":
        rounded = np.rint(labels)               # files written from floats read as 1.992
        if np.abs(labels - rounded).max() > 0.05:
            raise bs.BadInput(f"{path}: labels are fractional; resample labels by nearest "
                              "neighbour")
    values = {value for value in range(5) if (rounded == value).any()} | {int(rounded.min()),
                                                                          int(rounded.max())}
    if values == {0, 255}:
        raise bs.BadInput(f"{path}: is a mask of 0 and 255, not labels; expected 0, 1 NCR, 2 ED "
                          "and 3 or 4 ET")
    if not values <= {0, 1, 2, 3, 4}:
        raise bs.BadInput(f"{path}: label values from {min(values)} to {max(values)}; expected 0, "
                          "1 NCR, 2 ED and 3 or 4 ET")
    if 4 in values and (modern or 3 in values):
        raise bs.BadInput(f"{path}: label 4 is a resection cavity in this convention, which the "
                          "model does not know; move the case away or relabel it")
    return np.where(rounded == 4, 3, rounded).astype(np.uint8)


def read_labels(case, notes=None):
    """The label map of a Case: uint8 (X, Y, Z) in 0..3, canonical, and its affine. notes: as
    read_nifti."""
    labels, affine = read_nifti(case.files["seg"], notes)
    if notes is not None and 3.5 < labels.max() < 4.5:
        notes.append(Finding("normalised", str(case.files["seg"]), "ET is 4, as up to BraTS 2021: "
                             "read as 3"))
    return standard_labels(labels, case.modern, case.files["seg"]), affine


def read_case(case, notes=None):
    """Read one Case: scans float32 (C, X, Y, Z) as stored, labels uint8 (X, Y, Z) in 0..3 (0 where
    the case has none), affine. All canonical (RAS+). notes: as read_nifti. BadInput where shapes or
    affines of the files differ, or a scan cannot be one.
    """
    labels, affine = read_labels(case, notes) if "seg" in case.files else (None, None)
    scans = None
    for c, name in enumerate(bs.MODALITIES):
        path = case.files[name]
        scan, its_affine = read_nifti(path, notes)
        if scans is None:
            labels = np.zeros(scan.shape, np.uint8) if labels is None else labels
            affine = its_affine if affine is None else affine
            # x runs fastest in memory, as in the files: a third faster than the other way round
            scans = np.empty((len(bs.MODALITIES), *labels.shape[::-1]), np.float32).transpose(0, 3,
                                                                                              2, 1)
        if scan.shape != labels.shape:
            raise bs.BadInput(f"{path}: shape {scan.shape} differs from {labels.shape} of the "
                              "case; register it to one grid")
        if not np.allclose(its_affine, affine, atol=0.02):
            sizes = [spacing_of(a).round(2).tolist() for a in (its_affine, affine)]
            raise bs.BadInput(f"{path}: lies elsewhere in space than the case's other files "
                              "(affines differ" + (f", voxels of {sizes[0]} and {sizes[1]} mm"
                                                   if sizes[0] != sizes[1] else "")
                              + "); register the case to one grid")
        low, high = float(scan.min()), float(scan.max())
        if low == high:
            raise bs.BadInput(f"{path}: every voxel has the same value; export it again")
        if not 1e-6 < max(-low, high) < 1e9:
            raise bs.BadInput(f"{path}: voxels from {low:.3g} to {high:.3g}; the scale in its "
                              "header is damaged")
        if scan.dtype.kind == "i" and scan.dtype.itemsize > 1 and min(-low, high) > 0.9 * np.iinfo(
            scan.dtype).max:
            raise bs.BadInput(f"{path}: voxels from {low:.0f} to {high:.0f} have run over the end "
                              f"of {scan.dtype}; export it as float or unsigned")
        scans[c] = scan
        for other in range(c):                  # any() stops at the first slice that differs
            if not any((a != b).any() for a, b in zip(scans[c].T, scans[other].T)):
                raise bs.BadInput(f"{path}: is the same scan as "
                                  f"{case.files[bs.MODALITIES[other]].name}; put the right one in "
                                  "its place")
    return scans, labels, affine


def write_nifti(path, volume, affine, words, code):
    """Write a volume (X, Y, Z) as .nii.gz and read it back: OSError where other bytes come back
    than were sent.

    The header is fresh: nothing of a source file (names, comments, extensions) can travel along.
    words: what it says of itself, 79 letters at most; code: NIfTI's code for what the affine refers
    to (1 scanner, 2 another file).
    """
    image = nib.Nifti1Image(np.ascontiguousarray(volume), affine)
    image.header["descrip"] = words.encode()
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nib.save(image, path)
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    try:
        back = nib.Nifti1Image.from_bytes(unpack(path)[0])
        whole = np.array_equal(np.asanyarray(back.dataobj), volume) and np.allclose(back.affine,
                                                                                    affine,
                                                                                    atol=1e-4)
    except Exception as error:
        raise OSError(f"{path} cannot be read back ({error})") from error
    if not whole:
        raise OSError(f"{path} does not read back as it was written")


def write_labels(path, labels, case, affine):
    """Write predicted labels uint8 (X, Y, Z), canonical with `affine`, as NIfTI voxel for voxel on
    the grid of the case's own files, in their storage order: 1 NCR, 2 ED, 3 ET."""
    there = nib.load(case.files["t1"]).affine
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(there))
    stored = nib.apply_orientation(labels, turn).astype(np.uint8)

    def write(temporary):                       # nibabel goes by the ending of a name
        whole = temporary.with_suffix(".nii.gz")
        write_nifti(whole, stored, there, f"brainsyn {bs.__version__} prediction 1 NCR 2 ED 3 ET",
                    1)
        os.replace(whole, temporary)

    files.replace_file(path, write)
