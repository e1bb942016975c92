"""Checking: every fault of a long list is planted in a case, and none passes in silence."""
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import brainsyn as bs
from kit import checks, desk, nifti, phantoms

ROOT = Path(bs.__file__).parent


def data(image):
    """Voxels of an image as stored."""
    return np.asanyarray(image.dataobj)


def rewrite(path, change=lambda d: d, affine=None, kind=nib.Nifti1Image, header=lambda h: None):
    """Save a file again with changed voxels, affine, header."""
    image = nib.load(path)
    voxels = change(data(image))
    new = kind(voxels, image.affine if affine is None else affine)
    header(new.header)
    nib.save(new, path)


def voxels(change):
    """Function that changes the voxels of a file."""
    return lambda path: rewrite(path, change)


def content(change):
    """Function that changes the bytes of a file."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def unpacked(change):
    """Function that changes the unpacked bytes of a .nii.gz, and packs them with a right
    checksum."""
    def plant(path):
        raw = bytearray(gzip.decompress(path.read_bytes()))
        path.write_bytes(gzip.compress(bytes(change(raw)), 1))
    return plant


def field(name, value):
    """Function: bytes of a NIfTI-1 file -> the same with one header field set."""
    def change(raw):
        header = nib.Nifti1Header(bytes(raw[:348]), check=False)
        header[name] = value
        return header.binaryblock + raw[348:]
    return change


def flip_bit(path, at=0.5, bit=4):
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= bit
    path.write_bytes(raw)


def bomb(path):
    """A small gzip file that holds 200 MB more than its valid header says."""
    raw = gzip.decompress(path.read_bytes())
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [pack.compress(raw)] + [pack.compress(bytes(2 ** 20)) for _ in range(200)]
    path.write_bytes(b"".join(parts) + pack.flush())


def roll(path, axis, mm):
    image = nib.load(path)
    rewrite(path, lambda d: np.roll(d, round(mm / image.header.get_zooms()[axis]), axis))


def swapped(d):
    return np.array([0, 2, 1, 3], np.uint8)[d]


def moved(path, by):
    affine = nib.load(path).affine.copy()
    affine[:3, 3] += by
    rewrite(path, affine=affine)


def spaced(path):
    affine = nib.load(path).affine.copy()
    affine[:3, :3] *= 1.1
    rewrite(path, affine=affine)


def linked_out(path):
    other = path.parents[2] / "elsewhere.nii.gz"
    shutil.move(path, other)
    path.symlink_to(other)


def twice(path):
    shutil.copytree(path.parent, path.parents[1] / "again" / path.parent.name)


def other_name(path):
    """The same scans as another case."""
    target = path.parents[1] / "BraTS-PHA-77777-000"
    target.mkdir()
    for file in path.parent.iterdir():
        shutil.copy(file, target / file.name.replace("BraTS-PHA-00000-000", target.name))


def as_directory(path):
    path.unlink()
    path.mkdir()


def unreadable(path):
    """No permission; root may read all the same, so there it is a file without its disk block."""
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.unlink()
        path.symlink_to(path.parent / "gone.nii.gz")


def wild_name(path):
    """A case whose name would not do as a name of files."""
    for file in list(path.parent.iterdir()):
        file.rename(file.with_name(file.name.replace("BraTS-PHA", "a b;c")))


def as_colours(d):
    """Voxels of red, green, blue."""
    grey = np.stack([d.clip(0, 255).astype(np.uint8)] * 3, -1)
    return grey.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]


def with_skull(d):
    """No voxel has the value of air."""
    return (d + np.random.default_rng(0).integers(1, 900, d.shape)).astype(np.int16)


def corner(path):
    """A head of 20 voxels across, without tumour."""
    for file in path.parent.iterdir():
        rewrite(file, lambda d: d * (np.indices(d.shape).max(0) < 20) * (file != path))


def stray(d):
    """A corner of the volume is tumour."""
    return np.maximum(d, (np.indices(d.shape).max(0) < 15).astype(np.uint8))


def extended(code, text):
    """Function that adds an extension to a header."""
    def change(header):
        header.extensions.append(nib.nifti1.Nifti1Extension(code, text))
    return lambda path: rewrite(path, header=change)


def named(header):
    header["db_name"] = b"DOE^JOHN"


def replaced(value, by, dtype=np.uint8):
    """Function that puts another value in the place of a label."""
    return voxels(lambda d: np.where(d == value, by, d.astype(dtype)).astype(dtype))


def relabelled(*labels):
    """Function that puts other values in the place of 1, 2, 3."""
    return voxels(lambda d: np.array([0, *labels], d.dtype)[d])


def exchanged(first, second):
    """Function that gives two scans of a case the names of each other."""
    def plant(path):
        a, b = [path.with_name(f"BraTS-PHA-00000-000-{what}.nii.gz") for what in (first, second)]
        a.rename(path.with_name("x")), b.rename(a), path.with_name("x").rename(b)
    return plant


def another_head(path):
    """The scan is phantom 5's."""
    with tempfile.TemporaryDirectory() as folder:
        case = nifti.find_cases(phantoms.write_phantom(folder, 5))[0]
        rewrite(path, lambda _: data(nib.load(case.files["t2"])))


def as_lps(path):
    nib.save(nib.load(path).as_reoriented([[0, -1], [1, -1], [2, 1]]), path)


def scaled_labels(path):
    """Labels as scaled integers."""
    path = path.with_name(path.name.replace("t2w", "seg"))
    image = nib.load(path)
    nib.save(nib.Nifti1Image(data(image) * 0.996, image.affine, dtype=np.uint8), path)


def big_endian(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(data(image), image.affine, nib.Nifti1Header(endianness=">")), path)


def mirrored_header(path):
    rewrite(path, affine=nib.load(path).affine @ np.diag([-1, 1, 1, 1.0]))


def nowhere(raw):
    """Neither sform nor qform."""
    return field("qform_code", 0)(bytearray(field("sform_code", 0)(raw)))


def alone(path):
    """The other files of the case are gone."""
    for file in path.parent.iterdir():
        if file != path:
            file.unlink()


def old_names(path):
    """The case as up to BraTS 2021: old names of files, ET is 4."""
    replaced(3, 4)(path)
    for file in list(path.parent.iterdir()):
        case, what = file.name.removesuffix(".nii.gz").rsplit("-", 1)
        old = {modern: name for name, modern in nifti.NAMES_2023.items()}.get(what, what)
        file.rename(file.with_name(f"{case}_{old}.nii.gz"))


LFS = b"version https://git-lfs.github.com/spec/v1\n"
HUGE = [3, 30000, 30000, 30000, 1, 1, 1, 1]
# name: (file it is planted in, how, words the finding must have)
REJECTED = {
    "truncated": ("t1n", content(lambda raw: raw[:-2000]), "ended before"),
    "bit flipped": ("t1n", flip_bit, "cannot be read"),
    "checksum missing": ("t1n", content(lambda raw: raw[:-8]), "ended before"),
    "empty file": ("t1n", content(lambda raw: b""), "begins with b''"),
    "web page": ("t1n", content(lambda raw: b"\n<!DOCTYPE html><html>"), "DOCTYPE"),
    "LFS pointer": ("t1n", content(lambda raw: LFS), "git-lfs"),
    "garbage behind": ("t1n", content(lambda raw: raw + b"garbage"), "cannot be read"),
    "modality missing": ("t2w", lambda path: path.unlink(), "has no t2"),
    "label missing": ("seg", lambda path: path.unlink(), "has no seg"),
    "orphan label": ("seg", alone, "has no t1 and no t1ce"),
    "shapes differ": ("t2w", voxels(lambda d: d[:-1]), "shapes or affines differ"),
    "label shifted": ("seg", lambda path: moved(path, 4), "affines differ"),
    "label shifted, same header": ("seg", lambda path: roll(path, 1, 30), "shifted or mirrored"),
    "label mirrored": ("seg", voxels(lambda d: d[::-1]), "shifted or mirrored"),
    "label of another header": ("seg", mirrored_header, "affines differ"),
    "spacing differs": ("t2w", spaced, "affines differ"),
    "fractional labels": ("seg", voxels(lambda d: d * np.float32(0.7)), "fractional"),
    "negative labels": ("seg", replaced(2, -1, np.int16), "labels -1 to"),
    "unknown labels": ("seg", replaced(2, 7), "label 7"),
    "0/255 mask": ("seg", voxels(lambda d: (d > 0).astype(np.uint8) * 255), "label 255"),
    "cavity": ("seg", replaced(1, 4), "cavity"),
    "cavity, no ET": ("seg", voxels(lambda d: np.array([0, 4, 2, 0], d.dtype)[d]), "cavity"),
    "NaN voxel": ("t2w", voxels(lambda d: np.where(d == d.max(), np.nan, d * 1.0)), "NaN"),
    "infinite label": ("seg", replaced(1, np.inf, np.float32), "infinite"),
    "all zero": ("t2w", voxels(lambda d: d * 0), "from 0 to 0"),
    "constant": ("t2w", voxels(lambda d: d * 0 + 9), "from 9 to 9"),
    "one file as two modalities": (
        "t2w", lambda path: shutil.copy(str(path).replace("t2w", "t2f"), path), "the same scan as"),
    "4-D": ("t2w", voxels(lambda d: np.stack([d, d], -1)), "in 3-D"),
    "RGB": ("t2w", voxels(as_colours), "plain numbers"),
    "complex": ("t2w", voxels(lambda d: d.astype(np.complex64)), "plain numbers"),
    "int16 wrap-around": ("t2w", voxels(lambda d: (d.astype(int) * 25).astype(np.int16)),
                          "which no scan has"),
    "scl_slope 1e30": ("t2w", unpacked(field("scl_slope", 1e30)), "which no scan has"),
    "no sform, no qform": ("t2w", unpacked(nowhere), "does not say where"),
    "zero-length axis": ("t2w", unpacked(lambda raw: raw[:42] + b"\0\0" + raw[44:]), "claims"),
    "30000^3": ("t2w", unpacked(field("dim", HUGE)), "claims"),
    "header and voxels disagree": ("t2w", unpacked(lambda raw: raw[:-64]),
                                   "does not hold"),
    "more after the voxels": ("t2w", content(lambda raw: gzip.decompress(raw) + b"more"),
                              "does not hold"),
    "same case twice": ("seg", twice, "are there twice"),
    "same scans under two names": ("seg", other_name, "same scans as"),
    "one file twice": ("t1n", lambda path: shutil.copy(path, str(path).replace("t1n", "t1")),
                       "are there twice"),
    "link out of the folder": ("t2w", linked_out, "leads out"),
    "one slice": ("t2w", voxels(lambda d: d[:, :, :1]), "in 3-D"),
    "gzip bomb": ("t2w", bomb, "does not hold"),
    "unreadable": ("t2w", unreadable, ""),
    "directory named x.nii.gz": ("t2w", as_directory, "cannot be read"),
    "name that is no name": ("seg", wild_name, "use letters"),
    "skull still there": ("t2w", voxels(with_skull), "skull"),
    "hardly any brain": ("seg", corner, ""),
}
WARNED = {
    "empty mask": ("seg", voxels(lambda d: d * 0), "no tumour"),
    "labels 1 and 2 swapped": ("seg", voxels(swapped), "swapped"),
    "name in the header": ("t2w", lambda path: rewrite(path, header=named), "person"),
    "name in an extension": ("t2w", extended("comment", b"Patient: John Doe"), "person"),
    "DICOM in an extension": ("t2w", extended(2, b"anything"), "person"),
    "tumour outside the brain": ("seg", voxels(stray), "outside the brain"),
    "cut scan": ("t2f", voxels(lambda d: d * (np.arange(d.shape[2]) < 34)), "of the brain"),
    "t1 and t1ce exchanged": ("t1n", exchanged("t1n", "t1c"), "exchanged"),
    "t2 and flair exchanged": ("t2w", exchanged("t2w", "t2f"), "exchanged"),
    "t1 and t2 exchanged": ("t2w", exchanged("t2w", "t1n"), "exchanged"),
    "t2 mirrored": ("t2w", voxels(lambda d: d[::-1]), "fits none of the others"),
    "t2 of another head": ("t2w", another_head, "fits none of the others"),
    "labels of BraTS-PED": ("seg", relabelled(3, 2, 1), "1=ET,2=ED,3=NCR"),
    "labels in another order": ("seg", relabelled(2, 3, 1), "1=ET,2=NCR,3=ED"),
    "file of another name": (
        "t2w", lambda path: shutil.copy(path, path.parent / "notes.nii.gz"), "says of no scan"),
}
NORMALISED = {
    "orientation differs": ("t2w", as_lps, "LPS"),
    "ET is 4": ("seg", old_names, "ET is 4"),
    "ET is 4, new names": ("seg", replaced(3, 4), "ET is 4"),
}
KINDS = {"rejected": REJECTED, "warned": WARNED, "normalised": NORMALISED}
FAULTS = {(name, kind): fault for kind, faults in KINDS.items() for name, fault in faults.items()}


@pytest.fixture
def case_folder(phantom_folder, tmp_path):
    """A folder with a copy of phantom 0: 2023 names, RAS, all labels."""
    folder = tmp_path / "data"
    shutil.copytree(phantom_folder / "BraTS-PHA-00000-000", folder / "BraTS-PHA-00000-000")
    return folder


def check(folder, labelled=True):
    """All findings on a folder, and the cases that can be used."""
    findings = []
    good = checks.check_cases(nifti.find_cases(folder, labelled, findings), findings)
    return findings, good


@pytest.mark.parametrize("fault, kind", sorted(FAULTS))
def test_no_fault_passes_in_silence(case_folder, fault, kind):
    """Each planted fault gives one finding of its kind, which names the file or folder and says
    what it is."""
    what, plant, words = FAULTS[fault, kind]
    path = case_folder / "BraTS-PHA-00000-000" / f"BraTS-PHA-00000-000-{what}.nii.gz"
    before = nifti.read_case(nifti.find_cases(case_folder)[0]) if kind == "normalised" else None
    plant(path)
    findings, good = check(case_folder)
    found = [finding for finding in findings if finding.kind == kind]
    assert len(found) == 1 and words in found[0].text, findings
    assert str(case_folder) in found[0].where
    assert kind != "rejected" or "BraTS-PHA" in found[0].where or fault.startswith("name")
    rejected = [finding for finding in findings if finding.kind == "rejected"]
    assert bool(rejected) == (kind == "rejected")
    assert not good or kind != "rejected" or "twice" in fault or "two names" in fault
    if before:                                  # normalised: the right voxels, in the right place
        scans, labels, affine = nifti.read_case(good[0])
        assert np.array_equal(scans, before[0]) and np.array_equal(labels, before[1])
        assert np.allclose(affine, before[2])


def test_a_sound_case_has_nothing_to_be_said_of(case_folder):
    """Phantom 0 is RAS, of 2023 names and little-endian: no finding at all."""
    assert check(case_folder) == ([], nifti.find_cases(case_folder))


def zscored(path):
    """A scan as many pipelines leave it: mean 0, spread 1 in the brain, and air far below."""
    rewrite(path, lambda d: ((d - d[d > 0].mean()) / d[d > 0].std()).astype(np.float32))


def oblique(path):
    turn = np.array([[.996, -.087, 0, 3], [.087, .996, 0, -8], [0, 0, 1, 1], [0, 0, 0, 1.0]])
    for file in path.parent.iterdir():
        rewrite(file, affine=turn @ nib.load(file).affine)


def members(raw):
    """A gzip file of two members."""
    plain = gzip.decompress(raw)
    return gzip.compress(plain[:9999]) + gzip.compress(plain[9999:])


def plain_file(path):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


CONTROLS = {"big-endian": big_endian, "plain, named .gz": content(gzip.decompress),
            "trailing axis": voxels(lambda d: d[..., None]),
            "labels as scaled integers": scaled_labels,
            "scaled integers": unpacked(field("scl_slope", 2.5)),
            "z-scored, negative air": zscored, "oblique": oblique,
            "NIfTI-2": lambda path: rewrite(path, kind=nib.Nifti2Image),
            "several gzip members": content(members),
            "zeros behind": content(lambda raw: raw + bytes(512)),
            "float64": voxels(lambda d: d.astype(np.float64)), "plain .nii": plain_file}


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_sound_oddities_pass_with_the_right_voxels(case_folder, name):
    """A checker that refuses what is right is no better than one that lets wrong things pass."""
    path = case_folder / "BraTS-PHA-00000-000" / "BraTS-PHA-00000-000-t2w.nii.gz"
    before = nifti.read_case(nifti.find_cases(case_folder)[0])
    CONTROLS[name](path)
    findings, good = check(case_folder)
    assert len(good) == 1 and not findings, findings
    scans, labels, _ = nifti.read_case(good[0])
    expected = before[0]
    if name == "z-scored, negative air":
        t2 = expected[2]
        expected[2] = (t2 - t2[t2 > 0].mean()) / t2[t2 > 0].std()
    if name == "scaled integers":
        expected[2] *= 2.5
    assert np.allclose(scans, expected, atol=1e-4) and np.array_equal(labels, before[1])


def test_a_file_that_vanishes_is_named(case_folder):
    """Deleted between listing and reading."""
    cases = nifti.find_cases(case_folder)
    cases[0].files["t2"].unlink()
    findings = []
    assert not checks.check_cases(cases, findings)
    assert "t2w" in findings[0].where and findings[0].kind == "rejected"


def test_every_seventh_bit_of_a_header_is_read_rightly_or_refused(case_folder):
    """One bit of an uncompressed header flipped, where no checksum helps: a file either reads with
    the same voxels (scaled as a whole at most, as its header then says) in the same place, or is
    refused, here or for its place, which read_case compares."""
    path = case_folder / "BraTS-PHA-00000-000" / "BraTS-PHA-00000-000-t2w.nii.gz"
    raw, silent, refused = gzip.decompress(path.read_bytes()), [], 0
    before, place = nifti.read_nifti(path)
    few = (slice(None, None, 3),) * 3
    for bit in range(0, 348 * 8, 7):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            after, affine = nifti.read_nifti(path)
            if after.shape != before.shape or not np.allclose(affine, place, atol=0.02):
                refused += 1
            elif np.corrcoef(before[few].ravel(), after[few].ravel())[0, 1] < 0.9999:
                silent.append(bit)
        except bs.BadInput:
            refused += 1
    assert not silent and refused > 30, (silent, refused)


def test_many_findings_of_one_kind_are_one_line(capsys):
    """A folder with many healthy cases gives one warning that counts them; each rejected file has
    its line."""
    many = [nifti.Finding("warned", f"case{i}", "has no tumour") for i in range(9)]
    bad = [nifti.Finding("rejected", f"file{i}", "is empty") for i in range(9)]
    assert checks.print_findings(many + bad) == 9
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and "file0" in lines[0]
    assert lines[-1] == "warned: 9 files, such as case0: has no tumour"
    assert checks.print_findings(many[:3]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_one_patient_under_two_names_is_warned_of(coarse_folder, tmp_path):
    """The same head scanned again, with noise and another slice grid, is recognised among others;
    the others, however alike, are not."""
    folder = tmp_path / "data"
    shutil.copytree(coarse_folder, folder)
    twin = folder / "BraTS-PHA-99999-000"
    twin.mkdir()
    rng = np.random.default_rng(0)
    for path in (folder / "BraTS-PHA-00006-000").iterdir():
        image = nib.load(path)
        voxels = np.roll(data(image), 2, 0)
        if "seg" not in path.name:
            voxels = np.where(voxels > 0, voxels * 1.3 + rng.normal(0, 15, voxels.shape), 0).clip(0)
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), image.affine), twin
                 / path.name.replace("00006", "99999"))
    alike = [finding for finding in check(folder)[0] if "same patient" in finding.text]
    assert len(alike) == 1 and "99999" in alike[0].where and "00006" in alike[0].text


def test_real_cases_give_no_false_alarm(real_folder):
    """Every sixth real case and phantoms: nothing rejected; warned is only of what is known to be
    odd."""
    findings = []
    good = checks.check_cases(nifti.find_cases(real_folder)[::6], findings)
    assert len(good) == 10 and {finding.kind for finding in findings} <= {"normalised"}, findings


def test_the_command_says_what_it_found(case_folder, capsys):
    """`python brainsyn.py DIR`: one line a finding, a count, exit 1 if anything is rejected."""
    desk.main([str(case_folder)])
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 rejected, 0 warned, 0 normalised")
    for fault in ("empty mask", "truncated"):
        what, plant, _ = {**REJECTED, **WARNED}[fault]
        shutil.copytree(case_folder / "BraTS-PHA-00000-000", case_folder / fault)
        for path in (case_folder / fault).iterdir():
            path.rename(path.with_name(path.name.replace("00000", fault[:5])))
        plant(next((case_folder / fault).glob(f"*-{what}.nii.gz")))
    done = subprocess.run([sys.executable, ROOT / "brainsyn.py", case_folder], text=True,
                          capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["rejected", "rejected", "warned"], lines
    assert lines[-1] == "1 cases can be used; findings: 2 rejected, 1 warned, 0 normalised"


def test_scans_alone_are_checked_without_labels(case_folder, capsys):
    """--no-labels: labels are neither wanted nor looked at; without it their absence is a fault."""
    label = case_folder / "BraTS-PHA-00000-000" / "BraTS-PHA-00000-000-seg.nii.gz"
    label.write_bytes(b"rubbish")
    desk.main([str(case_folder), "--no-labels"])
    label.unlink()
    desk.main([str(case_folder), "--no-labels"])
    assert capsys.readouterr().out.count("1 cases can be used") == 2
    with pytest.raises(SystemExit) as left:
        desk.main([str(case_folder)])
    assert left.value.code == 1


def test_bad_cases_are_left_out_only_when_asked(coarse_folder, tmp_path, monkeypatch, capsys):
    """Without --skip-bad training does not begin; with it, they are named and counted. What was
    found is remembered of every case until one of its files changes."""
    folder, reads = tmp_path / "data", []
    shutil.copytree(coarse_folder, folder)
    paths = sorted(folder.glob("*/*t1ce*")) + sorted(folder.glob("*/*t1c.*"))
    flip_bit(paths[0])
    paths[-1].unlink()
    check_case = checks.check_case

    def counted(case):
        reads.append(case.case)
        return check_case(case)

    monkeypatch.setattr(checks, "check_case", counted)
    with pytest.raises(bs.BadInput, match="2 rejected.*--skip-bad"):
        checks.usable_cases(folder, False, tmp_path / "cache")
    assert len(reads) == 11
    capsys.readouterr()
    good = checks.usable_cases(folder, True, tmp_path / "cache")
    assert len(good) == 10 and len(reads) == 11
    said = capsys.readouterr().out.splitlines()
    assert "left out: 2 rejected, 10 cases are used" in said
    for place in (paths[0], paths[-1].parent):
        assert any(str(place) in line for line in said)
    os.utime(paths[1], (1, 1))
    checks.usable_cases(folder, True, tmp_path / "cache")
    assert len(reads) == 12 and reads[-1] in paths[1].name


def test_what_was_found_is_remembered_whole(case_folder, tmp_path, capsys):
    """Findings come back from the file as they were; where a bit of it has flipped it is made anew,
    with a note."""
    def found(memory=None):
        findings = []
        return checks.check_cases(cases, findings, memory), findings

    cases = nifti.find_cases(case_folder)
    rewrite(cases[0].files["seg"], swapped)
    fresh = found()
    assert len(fresh[1]) == 1
    assert found(tmp_path / "m") == fresh
    assert found(tmp_path / "m") == fresh and not capsys.readouterr().out
    path = next((tmp_path / "m").iterdir())
    raw = path.read_bytes()
    for at in range(64, len(raw), len(raw) // 40):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 8]) + raw[at + 1:])
        assert found(tmp_path / "m") == fresh
    assert "a bit has flipped" in capsys.readouterr().out


@pytest.mark.parametrize("mark", ["name", "header", "sidecar", "description"])
def test_one_mark_of_synthetic_data_is_enough(case_folder, mark):
    """Of name, header, sidecar and description of the set, any single one tells a synthetic case;
    none does not."""
    folder = case_folder / "BraTS-PHA-00000-000"
    assert not checks.is_synthetic(folder)
    if mark == "name":
        folder = folder.rename(case_folder / "BraTS-SYN-00000-000")
    elif mark == "header":
        for path in folder.iterdir():
            rewrite(path, header=lambda h: h.__setitem__("descrip", b"SYNTHETIC brainsyn"))
    elif mark == "sidecar":
        (folder / "BraTS-PHA-00000-000.json").write_text('{"SyntheticData": "YES"}')
    else:
        description = case_folder / "dataset_description.json"
        description.write_text('{"GeneratedBy": [{"Name": "brainsyn"}]}')
    assert checks.is_synthetic(folder)
    with pytest.raises(bs.BadInput, match="synthetic"):
        checks.refuse_synthetic([nifti.Case("x", {"t1": folder / "x.nii.gz"}, True)])
