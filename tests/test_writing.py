"""Synthetic files say that they are synthetic and nothing about a patient."""
import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import checks, files, nifti, phantoms, pictures, writing


def write(folder, affine=None):
    rng = np.random.default_rng(0)
    labels = np.zeros((6, 8, 5), np.uint8)
    labels[2:4, 3:6, 1:4] = rng.integers(1, 4, (2, 3, 3))
    counts = rng.integers(0, 1000, (4, 6, 8, 5)).astype(np.int16)
    affine = np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine
    written = writing.write_case(folder, "BraTS-SYN-00000-000", counts, labels, affine,
                                 {"SyntheticData": "YES"})
    return written, counts, labels


def test_written_cases_read_back_as_written(tmp_path):
    """Voxels, labels and affine survive, also through our own reader."""
    affine = np.array([[-2.0, 0, 0, 11], [0, 1.5, 0, -7], [0, 0, 3, 5], [0, 0, 0, 1]])
    folder, counts, labels = write(tmp_path, affine)
    for c, name in enumerate(("t1n", "t1c", "t2w", "t2f")):
        image = nib.load(folder / f"BraTS-SYN-00000-000-{name}.nii.gz")
        assert np.array_equal(np.asanyarray(image.dataobj), counts[c])
        assert np.allclose(image.affine, affine)
        assert np.allclose(image.get_qform(), affine), "viewers that read only the qform"
    scans, read, _ = nifti.read_case(nifti.find_cases(tmp_path)[0])
    assert np.array_equal(scans, counts[:, ::-1]) and np.array_equal(read, labels[::-1])


def test_every_file_says_synthetic(tmp_path):
    """Header and sidecar both say it, and nothing half-written is left."""
    folder, *_ = write(tmp_path)
    for path in folder.glob("*.nii.gz"):
        assert b"SYNTHETIC" in bytes(nib.load(path).header["descrip"])
    assert json.loads((folder / "BraTS-SYN-00000-000.json").read_text())["SyntheticData"] == "YES"
    assert [p.name for p in tmp_path.iterdir()] == ["BraTS-SYN-00000-000"]


def test_counts_are_zero_in_air_and_positive_in_the_brain():
    """Readers find the outline by what is not 0, so a black voxel inside the brain is 1."""
    images = torch.tensor([[[[-1.0, -1.0, 0.0, 1.0, 1.2]]]])
    assert writing.image_counts(images, np.array([[[0, 1, 1, 1, 1]]])).tolist() == [
        [[[0, 1, 500, 1000, 1000]]]]


def test_pictures_are_drawn(tmp_path):
    """Label maps, images, colours and gaps in one grid; lines with and without errors. The files
    are PNG and appear at once."""
    grey, labels = np.linspace(-1, 1, 64).reshape(8, 8), np.eye(8, dtype=int) * 3
    row = [labels, None, torch.zeros(8, 8), pictures.overlay(grey, labels)]
    pictures.plot_rows(tmp_path / "a.png", [row], ["labels", "", "t1", "both"], "tissue")
    panels = [("loss", "log", {"a": ([1, 2, 3], [3.0, 2.0, 1.0])}),
              ("Dice", "linear", {"b": ([1, 2], [0.5, 0.6], [0.1, 0.1])})]
    pictures.plot_lines(tmp_path / "b.png", panels)
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("a.png", "b.png"))
    assert len(list(tmp_path.iterdir())) == 2


def test_slices_of_any_plane_stand_upright():
    """In a volume (feet to head, front to back, right to left): the top of the head is up; the face
    is up in axial slices and to the left in sagittal ones."""
    volume = torch.zeros(4, 1, 5, 6)
    volume[3, 0, 0] = 1                         # top and front
    axial, coronal, sagittal = [
        pictures.upright(bs.turned(volume, plane)[at, 0], plane)
        for plane, at in ((0, 3), (1, 0), (2, 2))]
    assert axial.shape == (5, 6) and axial[0].all() and not axial[1:].any()
    assert coronal.shape == (4, 6) and coronal[0].all() and not coronal[1:].any()
    assert sagittal.shape == (4, 5) and sagittal.nonzero().tolist() == [[0, 0]]


def test_overlays_leave_the_rest_of_the_picture_alone():
    """Colours only where labels are; elsewhere the grey value, -1 black and 1 white."""
    picture = pictures.overlay(np.array([[-1.0, 1.0, 0.0, 0.0]]), np.array([[0, 0, 1, 3]]))
    assert picture[0, 0].tolist() == [0, 0, 0] and picture[0, 1].tolist() == [1, 1, 1]
    assert np.ptp(picture[0, 2]) > 0.1 and not np.allclose(picture[0, 2], picture[0, 3])


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_predictions_lie_voxel_for_voxel_on_the_scans_files(phantom_folder, tmp_path, number):
    """Written in the storage order of the case's own files (RAS or LPS): same affine, and every
    label where the case's seg file has it in the array as stored."""
    case = next(case for case in nifti.find_cases(phantom_folder)
                if phantoms.phantom_seed(case.case) == number)
    labels, affine = nifti.read_labels(case)
    nifti.write_labels(tmp_path / "deep" / "x_prediction.nii.gz", labels, case, affine)
    written = nib.load(tmp_path / "deep" / "x_prediction.nii.gz")
    given = nib.load(case.files["seg"])
    stored = np.asarray(given.dataobj)
    assert np.array_equal(np.asarray(written.dataobj), np.where(stored == 4, 3, stored))
    assert np.array_equal(written.affine, given.affine)
    assert written.get_data_dtype() == np.uint8
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x_prediction.nii.gz"]


def synthetic_case(folder, **facts):
    """A case that is nothing but a folder and a sidecar."""
    (folder / "c").mkdir(parents=True)
    (folder / "c" / "c.json").write_text(json.dumps(facts))
    return nifti.Case("c", {"t1": folder / "c" / "c-t1n.nii.gz"}, True)


def test_debts_of_synthetic_cases_are_found(tmp_path):
    """Its own label map, its outline, or any map its generator was trained on: each alone is
    enough."""
    held, other = "a" * 64, "b" * 64
    sidecars = [(held, other, [], True), (other, held, [], True),
                (other, other, [other[:16], held[:16]], True), (other, other, [other[:16]], False)]
    for i, (label, brain, trained, owes) in enumerate(sidecars):
        case = synthetic_case(tmp_path / str(i), SyntheticData="YES", LabelMapSHA256=label,
                              BrainSHA256=brain, GeneratorTrainedOn=trained)
        assert writing.contaminated(case, [held]) == owes


def test_a_case_without_sidecar_is_not_taken_for_synthetic(tmp_path):
    """No sidecar, another file, or one that does not say so: one sentence."""
    incomplete = {"SyntheticData": "YES", "LabelMapSHA256": "a" * 64}
    for i, facts in enumerate(({"SyntheticData": "NO"}, {"Name": 1}, incomplete)):
        with pytest.raises(bs.BadInput, match="no sidecar of a synthetic case"):
            writing.synthetic_facts(synthetic_case(tmp_path / str(i), **facts))
    with pytest.raises(bs.BadInput, match="no sidecar of a synthetic case"):
        writing.synthetic_facts(nifti.Case("c", {"t1": tmp_path / "nowhere" / "c.nii.gz"}, True))


def test_tables_are_plain_csv_and_json(tmp_path):
    """Six digits in CSV; NaN, which JSON does not know, becomes null at any depth."""
    files.write_csv(tmp_path / "a.csv", [{"case": "x", "dice": 1 / 3},
                                         {"case": "y", "dice": float("nan")}])
    assert (tmp_path / "a.csv").read_text().split() == ["case,dice", "x,0.333333", "y,nan"]
    files.write_json(tmp_path / "a.json", {"a": [1, float("nan")],
                                           "b": {"c": float("inf"), "d": (2,)}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None],
                                                             "b": {"c": None, "d": [2]}}


def small_set(folder, count=3):
    """Synthetic cases as sample.py writes them, of random voxels, with all that stands beside
    them."""
    rng = np.random.default_rng(1)
    for number in range(count):
        labels = np.zeros((6, 8, 5), np.uint8)
        labels[1:5, 2:7, 1:4] = rng.integers(0, 4, (4, 5, 3))
        labels[2, 3, 2], labels[2, 4, 2], labels[3, 3, 2] = 1, 2, 3
        facts = {"SyntheticData": "YES", "LabelMapSHA256": "a" * 64, "BrainSHA256": "b" * 64,
                 "GeneratorTrainedOn": [], "GeneratorPatients": 24, "GeneratorData": "phantoms",
                 "GeneratorVersion": "0.1.0", "UsedInTraining": False,
                 "VolumesML": {name: 1.5 for name in (*bs.LABELS, "TC", "WT")},
                 "Condition": "tumour", "Steps": 20}
        writing.write_case(folder, f"BraTS-SYN-{number:05d}-000",
                           rng.integers(1, 1000, (4, 6, 8, 5)).astype(np.int16), labels,
                           np.diag([2.0, 2, 3, 1]), facts)
    writing.write_description(folder)
    writing.write_dataset_json(folder)
    writing.write_datasheet(folder)
    return folder


def test_a_file_that_reads_back_otherwise_is_an_error(tmp_path, monkeypatch):
    """A disk that loses bytes must not leave a case behind: nothing under its name, no litter."""
    real = gzip.GzipFile.write
    for damage in (lambda content: content[:-30], lambda content: content[:-1] + b"\7"):
        def lossy(packed, content):
            whole = "t2w" not in str(packed.fileobj.name)
            return real(packed, content if whole else damage(content))

        monkeypatch.setattr(gzip.GzipFile, "write", lossy)
        with pytest.raises(OSError, match="t2w.* cannot be read back"):
            write(tmp_path)
        assert not list(tmp_path.iterdir())


def test_any_one_mark_may_be_lost(tmp_path):
    """Five marks: header, name, sidecar, description of the set, the word on the contact sheet.
    Without any one of the four a program can read, a file is still known for what it is."""
    folder = small_set(tmp_path / "set", 1)
    case = folder / "BraTS-SYN-00000-000"
    for lost in ("header", "name", "sidecar", "description"):
        copy = tmp_path / lost
        shutil.copytree(folder, copy)
        here = copy / case.name
        if lost == "header":
            for scan in here.glob("*.nii.gz"):
                image = nib.load(scan)
                nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine), scan)
        elif lost == "name":
            here = here.rename(copy / "x")
        elif lost == "sidecar":
            (here / f"{case.name}.json").unlink()
        else:
            (copy / "dataset_description.json").unlink()
        assert checks.is_synthetic(here), lost
    alone = tmp_path / "alone" / "x"
    alone.mkdir(parents=True)
    shutil.copy(case / "BraTS-SYN-00000-000-t2w.nii.gz", alone / "x-t2w.nii.gz")
    assert checks.is_synthetic(alone), "moved and renamed, its header still says it"


def test_the_datasheet_says_what_must_not_be_done(tmp_path):
    """Made from sidecars alone; figures appear when there are some, and are called missing when
    not."""
    folder = small_set(tmp_path)
    text = (folder / "DATASHEET.md").read_text()
    for words in ("SYNTHETIC", "3 cases", "24 cases (phantoms)", "Nothing clinical",
                  "No validation of a clinical claim", "their number: missing",
                  "the verdict: **missing**", "Known limits", "| ET | 1.5 | 1.5 | 1.5 |"):
        assert words in text, words
    files.write_json(folder / "judge.json", {"held_out_cases": 12, "synthetic": {"Dice WT": 0.81},
                                             "real": {"Dice WT": 0.9}})
    writing.write_datasheet(folder)
    text = (folder / "DATASHEET.md").read_text()
    assert "their number: 12\n" in text and "| Dice WT | 0.81 | missing | 0.9 |" in text
    judged = json.loads((folder / "judge.json").read_text()) | {"prior": {"Dice WT": 0.2}}
    files.write_json(folder / "judge.json", judged)
    writing.write_datasheet(folder)
    assert "| Dice WT | 0.81 | 0.2 | 0.9 |" in (folder / "DATASHEET.md").read_text()
    sidecar = folder / "BraTS-SYN-00001-000/BraTS-SYN-00001-000.json"
    facts = json.loads(sidecar.read_text()) | {"Audit": {"verdict": "none found", "words": "So."}}
    files.write_json(sidecar, facts)
    writing.write_datasheet(folder)
    text = (folder / "DATASHEET.md").read_text()
    assert "**missing, none found**" in text, "one of three is audited"


def test_labels_survive_the_way_through_regions(tmp_path):
    """What nnU-Net does with dataset.json: labels -> regions to train on -> labels by
    regions_class_order, later ones over earlier ones. NCR, ED and ET must come out as they went
    in."""
    description = json.loads((small_set(tmp_path) / "dataset.json").read_text())
    assert list(description["labels"])[1:] == ["whole_tumor", "tumor_core", "enhancing_tumor"]
    counts = [len(description[name]) for name in ("dataset", "training")]
    assert counts == [3, 3] and description["numTraining"] == 3
    for case in nifti.find_cases(tmp_path):
        labels = nifti.read_labels(case)[0]
        out = np.zeros_like(labels)
        regions = list(description["labels"].values())[1:]
        for members, value in zip(regions, description["regions_class_order"]):
            out[np.isin(labels, members)] = value
        assert np.array_equal(out, labels) and set(np.unique(labels)) == {0, 1, 2, 3}


def test_nnunet_accepts_a_set(tmp_path):
    """Its own integrity check, with its default reader."""
    check = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity")
    check.verify_dataset_integrity(str(small_set(tmp_path / "Dataset901_Synthetic")), 2)
    (tmp_path / "Dataset901_Synthetic/BraTS-SYN-00001-000/BraTS-SYN-00001-000-t2w.nii.gz").unlink()
    with pytest.raises(FileNotFoundError):
        check.verify_dataset_integrity(str(tmp_path / "Dataset901_Synthetic"), 2)


def test_monai_loads_a_set(tmp_path):
    """Its data list and its loader give four channels and the labels as we read them."""
    data, transforms = pytest.importorskip("monai.data"), pytest.importorskip("monai.transforms")
    folder = small_set(tmp_path)
    items = data.load_decathlon_datalist(folder / "dataset.json", True, "training", base_dir=folder)
    load = transforms.LoadImaged(["image", "label"], ensure_channel_first=True)
    assert len(items) == 3
    for item, case in zip(items, nifti.find_cases(folder)):
        loaded = load(item)
        scans, labels, _ = nifti.read_case(case)
        assert np.array_equal(loaded["image"].numpy(), scans)
        assert np.array_equal(loaded["label"][0].numpy(), labels)
