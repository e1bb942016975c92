"""A reader that is wrong is wrong in silence, so most of these tests are about truth."""
import gzip
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import nifti, phantoms, slices


def copy_case(case, folder, change=lambda name, image: image):
    """A copy of a Case below folder with every volume passed through `change`."""
    target = folder / case.case
    target.mkdir(parents=True)
    for name, path in case.files.items():
        nib.save(change(name, nib.load(path)), target / path.name)
    return nifti.find_cases(folder)[0]


def test_both_naming_generations_are_found(coarse_folder):
    """The default data mixes both, so that a first run already proves the reader."""
    cases = nifti.find_cases(coarse_folder)
    assert len(cases) == 12 and {c.modern for c in cases} == {True, False}
    assert all(set(c.files) == {*bs.MODALITIES, "seg"} for c in cases)
    axes = {nib.aff2axcodes(nib.load(c.files["t1"]).affine) for c in cases}
    assert axes == {("R", "A", "S"), ("L", "P", "S")}


@pytest.mark.parametrize("seed", [2, 3])
def test_headers_lps_and_ras_agree_voxel_for_voxel(phantom_folder, seed, tmp_path):
    """Seeds 2 and 3 are stored LPS; read, they are the phantom itself, and a RAS copy reads
    equal."""
    name = f"BraTS-PHA-{seed:05d}-000" if seed % 2 == 0 else f"BraTS20_Phantom_{seed:05d}"
    case = next(c for c in nifti.find_cases(phantom_folder) if c.case == name)
    scans, labels, affine = nifti.read_case(case)
    truth = phantoms.phantom(seed)
    assert np.array_equal(labels, truth[1])
    assert np.corrcoef(scans[0].ravel(), truth[0][0].ravel())[0, 1] > 0.9999
    other = copy_case(case, tmp_path, lambda n, image: nib.as_closest_canonical(image))
    again = nifti.read_case(other)
    assert np.array_equal(scans, again[0]) and np.array_equal(labels, again[1])
    assert np.allclose(affine, again[2])


def test_plain_nii_and_nii_gz_read_equal(phantom_folder, tmp_path):
    """Uncompressed files, and plain ones that are only named .gz, are the same volume."""
    path = nifti.find_cases(phantom_folder)[0].files["t1"]
    raw = gzip.decompress(path.read_bytes())
    for name in ("a.nii", "b.nii.gz"):
        (tmp_path / name).write_bytes(raw)
        assert np.array_equal(nifti.read_nifti(tmp_path / name)[0], nifti.read_nifti(path)[0])


def test_label_conventions():
    """Values become the labels they are said to be; others, and fractions, are refused. 4 is ET
    where 3 is not there, and refused beside it."""
    old, new = np.array([[[0, 1, 2, 4]]]), np.array([[[0, 1, 2, 3]]])
    expected, case = new.astype(np.uint8), nifti.Case("x", {"seg": "x.nii.gz"})
    for labels in (old, new):
        values = nifti.values_in(case, labels, None)
        assert np.array_equal(nifti.standard_labels(labels, values), expected)
    assert np.array_equal(nifti.standard_labels(new * 0.999, values), expected), "1.998 is 2, not 1"
    assert nifti.standard_labels(old, {1: 3, 2: 1, 4: 2}).tolist() == [[[0, 3, 1, 2]]]
    assert nifti.standard_labels(old, {1: 1, 2: 1, 4: 0}).tolist() == [[[0, 1, 1, 0]]]
    for bad in (old, np.array([[[0, 255]]]), np.array([[[-1, 1]]]), new * 0.5):
        with pytest.raises(bs.BadInput):
            nifti.standard_labels(bad, values)
    with pytest.raises(bs.BadInput, match="--label-map"):
        nifti.values_in(case, np.array([[[3, 4]]]), None)


def test_a_folder_without_cases_is_refused(tmp_path):
    """No such folder, and one that holds nothing of use."""
    with pytest.raises(bs.BadInput, match="no such folder"):
        nifti.find_cases(tmp_path / "nowhere")
    with pytest.raises(bs.BadInput, match="no case in it"):
        nifti.find_cases(tmp_path)


def test_a_fault_ends_a_search_unless_findings_are_wanted(coarse_folder, tmp_path):
    """find_cases raises the first fault; with a list of findings it leaves those cases out."""
    folder = shutil.copytree(coarse_folder, tmp_path / "data")
    next(folder.rglob("*00004-000-t1c*")).unlink()
    with pytest.raises(bs.BadInput, match="BraTS-PHA-00004-000 has no t1ce"):
        nifti.find_cases(folder)
    findings = []
    assert len(nifti.find_cases(folder, findings=findings)) == 11
    assert [finding.kind for finding in findings] == ["rejected"]


def test_labels_that_are_not_wanted_are_not_read(coarse_folder, tmp_path):
    """labelled=False: a case without labels is a case, and labels that are there are left out."""
    folder = shutil.copytree(coarse_folder, tmp_path / "data")
    next(folder.rglob("*00004-000-seg*")).unlink()
    cases = nifti.find_cases(folder, labelled=False)
    assert len(cases) == 12 and all(set(case.files) == set(bs.MODALITIES) for case in cases)


def test_brain_mask_is_what_differs_from_air():
    """Air is 0 in BraTS and negative after z-scoring; a head with its skull on is refused."""
    rng = np.random.default_rng(0)
    truth = np.zeros((12, 14, 10), bool)
    truth[3:9, 4:11, 2:8] = True
    for air in (0.0, -3.7):
        scan = np.where(truth, rng.normal(1, 0.2, truth.shape), air).astype(np.float32)
        assert np.array_equal(slices.brain_mask(scan[None]), truth)
    with pytest.raises(bs.BadInput, match="skull"):
        slices.brain_mask(rng.normal(1, 0.2, (1, 12, 14, 10)).astype(np.float32))


def test_scaling_is_robust_and_ignores_units():
    """Zero stays 0, the median becomes 100; one hot voxel changes nothing, nor does the scanner's
    gain; after z-scoring gain and offset do not matter."""
    rng = np.random.default_rng(0)
    scan = rng.normal(100, 20, (20, 20, 20)).clip(1).astype(np.float32)
    brain = np.ones(scan.shape, bool)
    plain = slices.scale_to_bytes(scan, brain, 100)
    hot = scan.copy()
    hot[0, 0, 0] = 1e6
    assert np.abs(slices.scale_to_bytes(hot, brain, 100) - plain)[1:].max() < 2
    assert np.allclose(slices.scale_to_bytes(scan * 7, brain, 100), plain, atol=0.05)
    assert plain.max() == 255 and abs(np.median(plain) - 100) < 0.1
    assert np.allclose((plain / scan)[plain < 100], 100 / np.median(scan), rtol=1e-3)
    order = np.argsort(scan.ravel())
    assert (np.diff(plain.ravel()[order]) >= 0).all(), "brighter stays brighter"
    z = slices.scale_to_bytes((scan - 100) / 20, brain, 100)
    assert np.allclose(slices.scale_to_bytes((scan - 100) * 3 - 40, brain, 100), z, atol=0.05)


def test_area_weights_by_hand():
    """Four pixels to two: plain means. Six to four: overlaps of 1.5 pixels. Outside counts as
    zero."""
    assert slices.area_weights(4, 2, 0, 2).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert np.allclose(slices.area_weights(6, 4, 0, 1.5)[1], [0, 1 / 3, 2 / 3, 0, 0, 0])
    assert slices.area_weights(2, 2, -1, 2).tolist() == [[0.5, 0], [0, 0.5]]
    assert np.allclose(slices.area_weights(7, 20, -1.5, 0.5).sum(1)[3:17],
                       1), "enlarging keeps the level"


@pytest.mark.parametrize("resolution", [24, 64, 97])
def test_a_landmark_keeps_its_place_in_mm(resolution):
    """The affine of written files is right: a ball's centre of mass in mm is the same on the source
    grid and on the model's, for an oblique, anisotropic source."""
    turn = np.array([[0.9962, -0.0872, 0], [0.0872, 0.9962, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * [1.1, 0.9, 2.0], [-60, -81, 12]
    x, y, z = np.meshgrid(*map(np.arange, (110, 150, 40)), indexing="ij")
    brain = ((x - 52) / 45) ** 2 + ((y - 77) / 68) ** 2 + ((z - 20) / 18) ** 2 < 1
    ball = ((x - 30) * 1.1) ** 2 + ((y - 99) * 0.9) ** 2 + ((z - 24) * 2.0) ** 2 < 12 ** 2
    grid = slices.grid_over(brain, affine, resolution, 192.0)
    small = slices.from_slices(grid.shrink(slices.to_slices(ball)))

    def centre(volume, to_mm):
        middle = (np.stack(np.nonzero(volume)) * volume[volume > 0]).sum(1) / volume.sum()
        return to_mm @ [*middle, 1]

    assert small.shape == (resolution,) * 3
    assert np.allclose(centre(ball.astype(float), affine), centre(small, grid.model_affine()),
                       atol=0.1)
    volumes = [volume.sum() * np.linalg.det(to_mm[:3, :3]) for volume, to_mm in
               ((small, grid.model_affine()), (ball, affine))]
    assert np.isclose(*volumes, rtol=0.001), "volume in mm^3 is kept"


def test_growing_back_undoes_shrinking_where_images_are_smooth():
    """A smooth volume survives the way to the model's grid and back."""
    x, y, z = np.meshgrid(*map(np.arange, (96, 96, 60)), indexing="ij")
    brain = (x - 48) ** 2 + (y - 48) ** 2 + 2 * (z - 30) ** 2 < 40 ** 2
    grid = slices.grid_over(brain, np.diag([2.0, 2.0, 2.4, 1.0]), 64, 192.0)
    smooth = slices.to_slices(np.sin(x / 15) + np.cos(y / 12) + np.sin(z / 12))
    inside = slices.to_slices(brain)
    assert np.abs(grid.grow(grid.shrink(smooth)) - smooth)[inside].max() < 0.05


def test_slices_are_drawn_as_radiologists_look_at_them():
    """Row 0 is the front, column 0 the patient's right; from_slices is the way back."""
    volume = np.zeros((3, 4, 5))
    volume[2, 3, 1] = 1                          # most right, most front, second slice
    turned = slices.to_slices(volume)
    assert turned.shape == (5, 4, 3) and turned[1, 0, 0] == 1
    assert np.array_equal(slices.from_slices(turned), volume)
    four = np.arange(120).reshape(2, 3, 4, 5)
    assert np.array_equal(slices.from_slices(slices.to_slices(four)), four)


def test_prepared_slices_are_black_outside_and_labelled_inside(phantom_folder):
    """Air is exactly 0; labels keep their volume."""
    for case in nifti.find_cases(phantom_folder)[:4]:
        got = slices.prepare_case(case, 96, 192.0, "tumour")
        assert not got["images"].transpose(0, 2, 3, 1)[got["classes"] == 0].any()
        assert got["cut"] < 0.002
        for label in (1, 2, 3):
            before, after = (got["labels"] == label).sum(), (got["classes"] == label + 1).sum()
            after = after * np.prod(got["grid"].step)
            assert abs(after - before) <= 0.15 * before + 5


def test_tissue_clusters_find_the_phantoms_tissue(phantom_folder):
    """CSF, grey and white by k-means overlap what the phantom was built from, in that order."""
    for seed in (4, 5):
        images, labels, fractions = phantoms.phantom(seed)
        brain = images[0] > 0
        found = slices.tissue_clusters(images, brain & (labels == 0))
        for value, name in ((1, "CSF"), (2, "grey"), (3, "white")):
            pure = (fractions[name] > 0.75) & (labels == 0) & brain
            right = (found[pure] == value).mean()
            assert right > 0.8, f"{name}: {right:.2f}"
        assert not found[~brain].any() and not found[labels > 0].any()


def test_tissue_clusters_survive_bright_eyes():
    """Outliers left by a coarse skull strip must not become a cluster of their own."""
    images, labels, fractions = phantoms.phantom(4)
    brain = images[0] > 0
    plain = slices.tissue_clusters(images, brain & (labels == 0))
    for image in images:
        image[(np.indices(brain.shape)[1] > 84) & brain] = 2 * image.max()
    eyes = slices.tissue_clusters(images, brain & (labels == 0))
    same = np.indices(brain.shape)[1] <= 84
    assert (plain == eyes)[same & brain].mean() > 0.9


def test_patients_of_all_namings():
    """Time points belong together; case numbers do not."""
    def patient(name):
        return nifti.Case(name, {}, True).patient

    assert patient("BraTS-GLI-00012-000") == patient("BraTS-GLI-00012-001") != patient(
        "BraTS-GLI-00013-000")
    assert patient("Brats18_TCIA01_201_1") == patient("Brats18_TCIA01_201_2")
    assert patient("BraTS2021_00001") != patient("BraTS2021_00002")
    assert patient("BraTS20_Training_001") != patient("BraTS20_Training_002")
    for first, second in (("UPENN-GBM-00001_11", "UPENN-GBM-00001_21"), ("P7_visit1", "P7_visit2"),
                          ("UCSF-PDGM-0429", "UCSF-PDGM-0429_FU003"),
                          ("sub-01_ses-1", "sub-01_ses-2"),
                          ("A12_20190503", "A12_2020-01-31")):
        assert patient(first) == patient(second) != second
    for name in ("BRATS_001", "UCSF-PDGM-0004", "HUP_2019_003", "case_12"):
        assert patient(name) == name


def test_no_patient_in_two_splits(tmp_path):
    """By patient, never by slice or scan: else a test case's twin is trained on."""
    cases = [nifti.Case(f"BraTS-GLI-{n:05d}-{t:03d}", {}, True) for n in range(40)
             for t in range(1 + n % 3)]
    split = slices.split_patients(cases)
    members = {part: {c.patient for c in some} for part, some in split.items()}
    assert not members["train"] & members["test"] and not members["train"] & members["val"]
    assert not members["val"] & members["test"] and sum(map(len, members.values())) == 40
    assert len(members["test"]) == 8 and len(members["val"]) == 4
    bad = tmp_path / "split.json"
    bad.write_text(json.dumps({"train": ["BraTS-GLI-00001-000"], "test": ["BraTS-GLI-00001-001"]}))
    with pytest.raises(bs.BadInput, match="BraTS-GLI-00001"):
        slices.split_patients(cases, bad)


def test_a_split_file_overrides(tmp_path):
    """Patients or cases by name; what it does not name is left out; unknown names are errors."""
    cases = [nifti.Case(f"BraTS-GLI-{n:05d}-000", {}, True) for n in range(6)]
    path = tmp_path / "split.json"
    wanted = {"train": ["BraTS-GLI-00003", "BraTS-GLI-00000-000"], "val": ["BraTS-GLI-00001-000"]}
    path.write_text(json.dumps(wanted))
    split = slices.split_patients(cases, path)
    assert [c.case[10:15] for c in split["train"]] == ["00000", "00003"]
    assert len(split["val"]) == 1 and not split["test"]
    path.write_text(json.dumps({"train": ["NOBODY"]}))
    with pytest.raises(bs.BadInput, match="NOBODY"):
        slices.split_patients(cases, path)
    path.write_text("{")
    with pytest.raises(bs.BadInput, match="split.json"):
        slices.split_patients(cases, path)
    path.write_text(json.dumps(wanted), encoding="utf-16")      # as PowerShell saves it
    assert slices.split_patients(cases, path) == split


@pytest.mark.parametrize("content, words", [
    ({"training": ["BraTS-GLI-00003"], "dev": [], "train": ["BraTS-GLI-00003"]}, "dev, training "),
    ({"train": "BraTS-GLI-00003"}, "train is no list"),
    ({"train": ["BraTS-GLI-00003"], "val": [3]}, "val is no list"),
    ({"train": ["BraTS-GLI-00003"], "test": None}, "test is no list"),
    ([{"train": ["BraTS-GLI-00003"]}], "no split of cases"),
])
def test_a_split_file_of_another_form_is_refused(tmp_path, content, words):
    """A key that means nothing here would leave its cases out in silence."""
    cases = [nifti.Case(f"BraTS-GLI-{n:05d}-000", {}, True) for n in range(6)]
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    with pytest.raises(bs.BadInput, match=f"split.json: .*{words}"):
        slices.split_patients(cases, path)


def test_the_cache_is_reused_until_something_changes(coarse_folder, tmp_path, monkeypatch):
    """A case is read once, whatever the split; a touched file or a new case reads one case; another
    size reads all."""
    folder = shutil.copytree(coarse_folder, tmp_path / "data")
    cases = nifti.find_cases(folder)[:6]
    prepare, reads = slices.prepare_case, []

    def counted(case, *settings):
        reads.append(case.case)
        return prepare(case, *settings)

    def build(count=6, size=16, split=None):
        reads.clear()
        some = nifti.find_cases(folder)[:count]
        built = slices.build_cache(some, tmp_path / "cache", size, 192.0, "tumour", split)
        return built, sorted(reads)

    monkeypatch.setattr(slices, "prepare_case", counted)
    first, read = build()
    assert read == [case.case for case in cases]
    again, read = build(split={"train": cases[:2], "test": cases[2:]})
    assert not read and all(map(np.array_equal, first.cubes, again.cubes))
    assert len(again.part("train")) == sum(case["count"] for case in again.cases[:2])
    assert build(count=7)[1] == [nifti.find_cases(folder)[6].case]
    os.utime(cases[1].files["t1"], (1, 1))
    assert build()[1] == [cases[1].case] and len(build(size=20)[1]) == 6
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_the_cache_gives_back_the_slices(cache, phantom_folder):
    """Row for row what prepare_case made, along three axes, with its neighbours where these are
    asked for; slices without brain are left out; air is exactly -1; a mirrored slice is that of the
    mirrored head, and so are its neighbours."""
    entry, case = cache.cases[3], nifti.find_cases(phantom_folder)[3]
    got = slices.prepare_case(case, 24, 192.0, "tumour")
    rows = np.arange(entry["first"], entry["first"] + entry["count"])
    head = torch.from_numpy(np.concatenate([got["images"], got["classes"][:, None]], 1))
    for flipped, wanted in ((None, head), (torch.ones(len(rows), dtype=torch.bool), head.flip(-1))):
        slabs, classes, place = cache.batch(rows, flipped, 1)
        x0 = cache.batch(rows, flipped)[0]
        for plane in range(3):
            here = place[:, 1] == plane
            at = torch.round((place[here, 0] + 1) * 12 - 0.5).long()
            view = bs.turned(wanted, plane)
            assert torch.equal(classes[here], view[at, -1].long())
            assert torch.equal(x0[here], bs.to_images(view[at, :-1]))
            assert torch.equal(slabs[here], bs.slabs_of(bs.to_images(view[:, :-1]), 1)[at])
            assert 0 < len(at) < 24 and len(set(at.tolist())) == len(at)
    assert entry["axial"] == (place[:, 1] == 0).sum() and tuple(entry["hashes"]) == got["hashes"]
    assert (x0.movedim(1, -1)[classes == 0] == -1).all() and x0.max() <= 1


def test_parts_of_the_cache_do_not_meet(cache):
    """Train, val and test rows are disjoint and cover everything."""
    parts = [cache.part(p) for p in ("train", "val", "test")]
    assert sorted(np.concatenate(parts)) == list(range(len(cache.rows)))
    assert all(len(part) for part in parts)
