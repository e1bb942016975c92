"""Folders as people have them, other modalities and other labels: read rightly, or refused in one
sentence."""
import contextlib
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

import brainsyn as bs
import layouts
import sample
import train_ddpm
import train_seg
from kit import checks, nifti, options, recipes, runs, slices

SAID = {"ucsf": "UCSF-PDGM", "upenn": "UPENN-GBM", "bids": "BIDS", "nnunet": "nnU-Net",
        "decathlon": "Decathlon"}
SHORT = ["--phantoms", "8", "--resolution", "32", "--batch", "4", "--steps", "2"]


@pytest.fixture(scope="module")
def heads(coarse_folder):
    """Four phantoms as Cases."""
    return nifti.find_cases(coarse_folder)[:4]


@pytest.fixture
def names():
    """Puts names back to BraTS's."""
    yield options.use_names
    options.use_names()


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_layout_is_read_in_place(heads, tmp_path, name):
    """The same voxels and labels as from BraTS folders; said in one line where it is another
    layout; visits of a patient are of one patient."""
    layouts.LAYOUTS[name](heads, tmp_path / "data")
    findings = []
    cases = nifti.find_cases(tmp_path / "data", True, findings)
    assert len(cases) == len(heads)
    for case, head in zip(cases, heads):
        for a, b in zip(nifti.read_case(case), nifti.read_case(head)):
            assert np.array_equal(a, b)
    said = [finding.text for finding in findings if "laid out" in finding.text]
    assert len(said) == (name in SAID) and all(SAID[name] in text for text in said)
    assert len({case.patient for case in cases}) == (2 if name == "upenn" else 4)
    assert all(list(case.files) == [*bs.MODALITIES, "seg"] for case in cases)
    scans = nifti.find_cases(tmp_path / "data", labelled=False)
    assert [list(case.files) for case in scans] == [list(bs.MODALITIES)] * 4


def test_what_cannot_be_read_is_named(tmp_path):
    """DICOM, MetaImage, pictures: what it looks like and what to do."""
    for name, words in (("1.dcm", "dcm2niix"), ("a.mha", "MetaImage"), ("a.png", "volumes"),
                        ("x_unstripped.nii.gz", "skull")):
        folder = tmp_path / name.split(".")[-1]
        folder.mkdir()
        (folder / name).write_bytes(b"")
        with pytest.raises(bs.BadInput, match=f"look like .*{words}"):
            nifti.find_cases(folder)


def test_labels_of_a_data_set_that_are_not_understood_are_named(heads, tmp_path, names):
    """A label that is none of ours stops reading; --label-map says what it is."""
    layouts.nnunet(heads, tmp_path / "data")
    expected, path = nifti.read_labels(heads[0])[0], tmp_path / "data/dataset.json"
    facts = json.loads(path.read_text()) | {"labels": {"background": 0, "bleeding": 1}}
    path.write_text(json.dumps(facts))
    with pytest.raises(bs.BadInput, match="'bleeding' is none of NCR, ED, ET"):
        nifti.find_cases(tmp_path / "data")
    names(None, "1=ED,2=NCR,3=ET")
    labels, _ = nifti.read_labels(nifti.find_cases(tmp_path / "data")[0])
    assert np.array_equal(labels, expected)


def test_a_case_in_two_raw_folders_is_there_twice(heads, tmp_path):
    """The same name in two data sets: refused, as in two folders of BraTS."""
    for name in ("one", "other"):
        layouts.nnunet(heads[:1], tmp_path / name)
    with pytest.raises(bs.BadInput, match="glioma_000 is there twice"):
        nifti.find_cases(tmp_path)


def test_the_folder_may_be_here(heads, tmp_path, monkeypatch):
    """--data . and --labels . with files right in it."""
    (tmp_path / "data").mkdir()
    layouts.bids(heads[:1], tmp_path / "far")
    for path in (tmp_path / "far").rglob("*.nii.gz"):
        path.rename(tmp_path / "data" / path.name)
    monkeypatch.chdir(tmp_path / "data")
    findings = []
    assert len(nifti.find_cases(".", True, findings)) == 1 and findings[-1].where == "."
    assert not recipes.only_label_maps(".")
    for path in (tmp_path / "data").glob("*[!g].nii.gz"):
        path.unlink()
    assert recipes.only_label_maps(".")


def test_a_folder_that_must_not_be_read_is_rejected(heads, tmp_path, monkeypatch):
    """No permission: named, not left out."""
    layouts.brats(heads, tmp_path / "data")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("00002"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(bs.BadInput, match="00002: cannot be read .Permission denied"):
        nifti.find_cases(tmp_path / "data")


def test_whole_tumour_masks_are_told_once(heads, tmp_path):
    """All labels 1: one warning for the folder. With other labels in one case: none."""
    for head in heads:
        shutil.copytree(head.folder, tmp_path / head.folder.name)
    cases = nifti.find_cases(tmp_path)
    for case in cases:
        image = nib.load(case.files["seg"])
        mask = (np.asanyarray(image.dataobj) > 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, image.affine), case.files["seg"])
    findings = []
    checks.check_cases(cases, findings)
    said = [finding for finding in findings if "whole tumour" in finding.text]
    assert [finding.where for finding in said] == [str(tmp_path)]
    assert "--label-map 1=lesion" in said[0].text
    shutil.copy(heads[0].files["seg"], cases[0].files["seg"])
    findings.clear()
    checks.check_cases(cases, findings)
    assert not [finding for finding in findings if "whole tumour" in finding.text]


def test_air_that_is_not_quite_one_value(heads):
    """After resampling air is 0 to within a hair: the brain is the same. A skull is not air."""
    scans, _, _ = nifti.read_case(heads[0])
    noise = np.random.default_rng(0).uniform(-1e-5, 1e-5, scans.shape)
    assert np.array_equal(slices.brain_mask(scans + noise), slices.brain_mask(scans))
    with pytest.raises(bs.BadInput, match="skull"):
        slices.not_air(noise[0] * 1e7 + scans[0])


def test_a_lesion_that_the_grid_loses_is_counted(tmp_path, phantom_folder, capsys):
    """A lesion of one voxel: lost at 16 pixels, with its volume; nothing is lost at 96, which the
    note names. A segmenter of which all training tumours are lost is refused."""
    case = nifti.find_cases(phantom_folder)[0]
    shutil.copytree(case.folder, tmp_path / "data" / case.case)
    case = nifti.find_cases(tmp_path / "data")[0]
    labels = np.zeros(nib.load(case.files["seg"]).shape, np.uint8)
    labels[40, 50, 30] = 3
    nib.save(nib.Nifti1Image(labels, nib.load(case.files["seg"]).affine), case.files["seg"])
    got = slices.prepare_case(case, 16, 192.0, "tumour")
    assert got["lost"] == (pytest.approx(0.0096), 1)
    assert slices.prepare_case(case, 96, 192.0, "tumour")["lost"] == (0.0, 0)
    slices.build_cache([case], tmp_path / "cache", 16, 192.0, "tumour", {"train": [case]})
    assert "1 lesions (0.01 mL) in 1 cases" in capsys.readouterr().out
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": [case.case]}))
    with pytest.raises(bs.BadInput, match="no training slice shows tumour"):
        train_seg.main(["--data", str(tmp_path / "data"), "--split", str(split), "--resolution",
                        "16", "--out", str(tmp_path / "seg")])


def test_heads_that_are_alike_become_one_patient(phantom_folder, tmp_path):
    """Ten heads, one of them scanned twice under another name: kept on one side of the split."""
    heads = nifti.find_cases(phantom_folder)[:1] * 2
    cases = [heads[0]._replace(case=f"C{n}") for n in range(11)]
    rng = np.random.default_rng(0)
    signatures = rng.standard_normal((11, 400)).astype(np.float32)
    signatures[7] = signatures[3] + 0.3 * rng.standard_normal(400)
    findings = []
    joined = checks.join_patients(cases, signatures, findings)
    assert [case.patient for case in joined].count("C3") == 2 and len(findings) == 1
    split = slices.split_patients(joined)
    parts = [part for part, members in split.items() for case in members
             if case.case in ("C3", "C7")]
    assert len(set(parts)) == 1


def test_names_on_the_command_line(names):
    """Either way round; BraTS's own keep their numbers, others are numbered by value."""
    for text, labels, values in (
            ("4=ED,1=ET,2=ncr,3=NCR", ("NCR", "ED", "ET"), {4: 2, 1: 3, 2: 1, 3: 1}),
            ("lesion=1", ("lesion",), {1: 1}),
            ("2=core,1=edge,4=background", ("edge", "core"), {1: 1, 2: 2, 4: 0}),
            ("1=lesion,2=lesion", ("lesion",), {1: 1, 2: 1})):
        names(["T1w", "flair"], options.label_map(text))
        assert bs.LABELS == labels and nifti.LABEL_VALUES == values
        assert bs.MODALITIES == ("t1", "flair")
        assert bs.CONDITIONS["tumour"] == ("air", "brain", *labels)
    for text in ("1=brain", "1=a,1=b"):
        with pytest.raises(bs.BadInput, match="--label-map"):
            names(None, text)
    for text in ("1", "a=b", "1=2", ""):
        with pytest.raises(Exception, match="names no label"):
            options.label_map(text)


@pytest.fixture(scope="module")
def two(tmp_path_factory, lay_phantoms):
    """A run of each script on T1 and FLAIR with one label, and a set made with them."""
    folder = lay_phantoms(tmp_path_factory.mktemp("two"), 8)
    here = os.getcwd()
    os.chdir(folder)
    try:
        words = [*SHORT, "--modalities", "t1", "flair", "--labels-are", "lesion=1"]
        train_ddpm.main([*words, "--width", "16", "--mults", "1", "--sample-every", "0"])
        train_seg.main([*words, "--validate-every", "2"])
        options.use_names()                     # another command
        sample.main(["--labels", "runs/phantoms/A", "--part", "train", "--balance", "lesion",
                     "--count", "2", "--steps", "2"])
        sample.main(["--judge", "synthetic", "--phantoms", "8"])
        with contextlib.suppress(SystemExit):   # where the verdict is a leak
            sample.main(["--audit", "synthetic", "--phantoms", "8", "--steps", "2"])
        yield folder
    finally:
        os.chdir(here)
        options.use_names()


@pytest.mark.slow
def test_two_modalities_and_one_label(two, names):
    """Trained, sampled, judged and audited: every command obeys what the checkpoint says."""
    state = runs.load_checkpoint(two / "runs/ddpm")
    assert state["modalities"] == ["t1", "flair"] and state["classes"] == ["air", "brain", "lesion"]
    case = two / "synthetic/BraTS-SYN-00000-000"
    ends = {path.name.removeprefix(case.name) for path in case.iterdir()}
    assert ends == {"-t1n.nii.gz", "-t2f.nii.gz", "-seg.nii.gz", ".json"}
    facts = json.loads(next(case.glob("*.json")).read_text())
    assert facts["VolumesML"]["lesion"] == pytest.approx(facts["RequestedML"]["lesion"], rel=0.3)
    judged = json.loads((two / "synthetic/judge.json").read_text())
    assert "Dice lesion" in judged["real"] and "Dice ET" not in judged["real"]
    assert (two / "audit/audit.json").exists()
    names(["t1", "flair"], "lesion=1")
    scans, labels, _ = nifti.read_case(nifti.find_cases(two / "synthetic")[0])
    assert len(scans) == 2 and set(np.unique(labels)) == {0, 1}


@pytest.mark.slow
def test_a_checkpoint_of_other_names_is_refused(two, names):
    """Loaded beside others, it says what it was trained on."""
    names()
    with pytest.raises(bs.BadInput, match="is of t1, flair, lesion, not of t1, t1ce"):
        runs.load_generator(two / "runs/ddpm", bs.torch.device("cpu"))


@pytest.mark.slow
def test_label_maps_without_scans_are_drawn_into_outlines(heads, tmp_path, lay_phantoms,
                                                          monkeypatch, capsys):
    """sample.py --labels takes them, says whose outlines they got, and that they are patients'."""
    folder = lay_phantoms(tmp_path, 8)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(recipes, "OUTLINES", 2)
    train_ddpm.main([*SHORT, "--width", "16", "--mults", "1", "--sample-every", "0"])
    (tmp_path / "maps").mkdir()
    for head in heads:
        shutil.copy(head.files["seg"], tmp_path / "maps" / f"{head.case}.nii.gz")
    sample.main(["--labels", "maps", "--count", "2", "--steps", "2"])
    assert "drawn into outlines of phantoms" in capsys.readouterr().out
    facts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("synthetic/*/*.json"))]
    assert [row["LabelMaps"] for row in facts] == ["label maps alone"] * 2
    assert facts[0]["LabelMapSHA256"] == slices.hashes_of(heads[0])[0]
    assert facts[0]["VolumesML"] != facts[1]["VolumesML"]
    with pytest.raises(bs.BadInput, match="label maps without scans"):
        sample.main(["--labels", "maps", "--edit", "random", "--out", "edited"])
