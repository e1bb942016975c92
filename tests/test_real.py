"""Real cases through reader, a short training and sampling. The folder is named by the environment
variable BRAINSYN_DATA; without it these tests are skipped."""
import json
import shutil

import numpy as np
import pytest

import brainsyn as bs
from kit import edits, nifti, slices
from test_scripts import run, sources_of


def test_real_cases_read_and_tell_tissue_apart(real_folder):
    """Every thirtieth case: outline, labels and tissue clusters are sane, also where eyes or dura
    remain."""
    for case in nifti.find_cases(real_folder)[::30]:
        got = slices.prepare_case(case, 64, 192.0, "tissue")
        counts = np.bincount(got["classes"].ravel(), minlength=7)
        tissue = counts[1:4] / counts[1:].sum()
        assert (tissue > 0.05).all() and tissue.max() < 0.75, f"{case.case}: CSF to white {tissue}"
        litres = got["brain"].sum() * abs(np.linalg.det(got["grid"].affine[:3, :3])) / 1e6
        assert 0.8 < litres < 2.0 and got["cut"] < 0.01, case.case
        t1 = got["images"][:, bs.MODALITIES.index("t1")]
        means = [t1[got["classes"] == k].mean() for k in (1, 2, 3)]
        assert means[0] < means[1] < means[2], case.case


def test_real_patients_stay_on_one_side(real_folder):
    """No patient in two parts of the split."""
    split = slices.split_patients(nifti.find_cases(real_folder))
    patients = [{c.patient for c in part} for part in split.values()]
    assert len(set.union(*patients)) == sum(map(len, patients))


@pytest.fixture(scope="module")
def few(real_folder, tmp_path_factory):
    """A folder with copies of two real cases of different years."""
    folder = tmp_path_factory.mktemp("few")
    cases = nifti.find_cases(real_folder)
    for case in cases[:: len(cases) // 2][:2]:
        shutil.copytree(case.files["seg"].parent, folder / case.case)
    return folder


@pytest.mark.slow
def test_a_short_training_and_sampling_on_real_cases(few, tmp_path):
    """The researcher's two lines, shortened: a run completes, and a case is written whose tumour
    has about the volume of the label map it comes from."""
    text = run(tmp_path, "train_ddpm.py", "--data", few, "--resolution", "32", "--steps", "4",
               "--width", "16", "--batch", "4", "--condition", "tissue", "--out", "runs/real")
    assert "step 00004/4" in text
    run(tmp_path, "sample.py", "--checkpoint", "runs/real", "--labels", few, "--count", "1",
        "--steps", "2")
    case = nifti.find_cases(tmp_path / "synthetic")[0]
    source = sources_of(tmp_path, few)[0]
    ml = [edits.volume_ml(*nifti.read_labels(labelled), "WT") for labelled in (case, source)]
    assert 0.7 < ml[0] / ml[1] < 1.3, ml
    facts = json.loads((case.folder / f"{case.case}.json").read_text())
    assert facts["LabelMapSHA256"] == slices.hashes_of(source)[0]
    assert facts["Condition"] == "tissue"
