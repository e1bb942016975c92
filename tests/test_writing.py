"""Section 9: synthetic files say that they are synthetic and nothing about a patient."""
import json

import nibabel as nib
import numpy as np
import torch

import brainsyn as bs


def write(folder, affine=None):
    rng = np.random.default_rng(0)
    labels = np.zeros((6, 8, 5), np.uint8)
    labels[2:4, 3:6, 1:4] = rng.integers(1, 4, (2, 3, 3))
    counts = rng.integers(0, 1000, (4, 6, 8, 5)).astype(np.int16)
    affine = np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine
    home = bs.write_case(folder, "BraTS-SYN-00000-000", counts, labels, affine, {"SyntheticData": "YES"})
    return home, counts, labels


def test_written_cases_read_back_as_written(tmp_path):
    """Voxels, labels and affine survive, also through our own reader."""
    affine = np.array([[-2.0, 0, 0, 11], [0, 1.5, 0, -7], [0, 0, 3, 5], [0, 0, 0, 1]])
    folder, counts, labels = write(tmp_path, affine)
    for c, name in enumerate(("t1n", "t1c", "t2w", "t2f")):
        image = nib.load(folder / f"BraTS-SYN-00000-000-{name}.nii.gz")
        assert np.array_equal(np.asanyarray(image.dataobj), counts[c]) and np.allclose(image.affine, affine)
        assert np.allclose(image.get_qform(), affine), "viewers that read only the qform see the same place"
    scans, read, _ = bs.read_case(bs.find_cases(tmp_path)[0])
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
    assert bs.image_counts(images, np.array([[[0, 1, 1, 1, 1]]])).tolist() == [[[[0, 1, 500, 1000, 1000]]]]


def test_pictures_are_drawn(tmp_path):
    """Label maps, images and gaps in one grid; the file is a PNG and appears at once."""
    bs.draw_rows(tmp_path / "a.png", [[np.zeros((8, 8), int), None, torch.zeros(8, 8)]], ["labels", "", "t1"], "tissue")
    log = [{"step": s, **{f"loss_q{q}": 1 / (s + q) for q in (1, 2, 3, 4)}} for s in (1, 2, 3)]
    bs.draw_curves(tmp_path / "b.png", log)
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("a.png", "b.png"))
    assert len(list(tmp_path.iterdir())) == 2
