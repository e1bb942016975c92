"""Every command of the README, shortened by its own flags, as a user would type it."""
import hashlib
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import desk, nifti, options, phantoms, recipes, runs, slices, writing
import sample
import train_ddpm
import train_seg
from nursery import run_script

ROOT = Path(bs.__file__).parent
SHORT = ["--phantoms", "8", "--resolution", "24", "--width", "16", "--mults", "1", "2", "--batch",
         "4", "--sample-every", "6", "--seed", "3"]


def run(folder, script, *arguments, status=0):
    """Run a script in `folder` as its own process; returns what it printed."""
    left, text = run_script(folder, script, *arguments)
    assert left == status, text
    return text


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lay_phantoms):
    """A folder in which `python train_ddpm.py` was run for twelve steps, and what it printed. One
    of the phantoms is made by the run."""
    folder = lay_phantoms(tmp_path_factory.mktemp("work"), 7)
    return folder, run(folder, "train_ddpm.py", *SHORT, "--steps", "12")


def test_training_makes_everything_it_promises(trained):
    """Phantoms, checkpoint, log, curves, pictures and closing figures, directly in the output
    folder."""
    folder, text = trained
    names = {p.name for p in (folder / "runs/ddpm").iterdir()}
    assert names == {"checkpoint.pt", "checkpoint.previous.pt", "log.csv", "curves.png",
                     "samples.png", "closing.json", "sample_000006.png", "sample_000012.png"}
    assert len(list((folder / "runs/phantoms/A").iterdir())) == 8
    assert re.search(r"step 00012/12 \| loss \d\.\d{4} \| lr \d\.\de-\d\d \| \d+ img/s \| 0s left",
                     text), text
    assert "\r" not in text and "device " in text
    closing = json.loads((folder / "runs/ddpm/closing.json").read_text())
    for name in ("sampled_t1ce_ET_above_brain", "sampled_flair_ED_above_brain", "sampled_air_black",
                 "fine_power_ratio", "grey_white_ratio", "slices_with_ET", "texture_axial",
                 "real_texture_coronal", "prior_texture_sagittal", "banding_z", "prior_air_black"):
        assert name in closing
    assert len(closing["skill"]) == 4 and closing["steps"] == 12
    table = text[text.index("figure "):].splitlines()
    assert table[0].split() == ["figure", "samples", "prior", "alone", "real"]
    assert table[1].startswith("skill at t = 125") and table[18].startswith("air at or below")
    assert table[5].split() == ["texture", "distance,", "axial", *(
        f"{closing[f'{source}texture_axial']:.3f}" for source in ("", "prior_", "real_"))]


def test_bad_cases_stop_every_command_unless_left_out(lay_phantoms, tmp_path):
    """A folder with one truncated scan: neither training begins, and with --skip-bad all three
    scripts name the case and do without it."""
    data = lay_phantoms(tmp_path, 6) / "runs/phantoms/A"
    bad = sorted(data.glob("*/*t1n*"))[0]
    bad.write_bytes(bad.read_bytes()[:999])
    train = ["--data", data.relative_to(tmp_path), "--steps", "2", "--device", "cpu",
             "--resolution", "32", "--batch", "4"]
    for script in ("train_ddpm.py", "train_seg.py"):
        text = run(tmp_path, script, *train, status=2)
        assert str(bad.relative_to(tmp_path)) in text and "--skip-bad" in text, text
        assert "Traceback" not in text
    assert not list((tmp_path / "runs").glob("*/*.pt"))
    text = run(tmp_path, "train_ddpm.py", *train, "--skip-bad", "--width", "16", "--mults", "1",
               "2", "--sample-every", "0")
    assert "left out: 1 rejected, 5 cases are used" in text, text
    assert "left out: 1 rejected, 5 cases are used" in run(tmp_path, "train_seg.py", *train,
                                                           "--skip-bad")
    make = ["--labels", data, "--count", "1", "--steps", "1", "--device", "cpu"]
    text = run(tmp_path, "sample.py", *make, "--skip-bad")
    assert "left out: 1 rejected, 5 cases are used" in text, text
    assert len(list((tmp_path / "synthetic").glob("*/*-seg.nii.gz"))) == 1


def test_the_checkpoint_holds_all_that_sampling_needs(trained):
    """Network, weights, EMA, schedule, names and grid; loaded without running any code."""
    state = runs.load_checkpoint(trained[0] / "runs/ddpm")
    assert state["step"] == 12 and state["classes"] == list(bs.CONDITIONS["tumour"])
    assert state["modalities"] == list(bs.MODALITIES) and state["args"]["width"] == 16
    cases = nifti.find_cases(trained[0] / "runs/phantoms/A")
    split = slices.split_patients(cases)
    hashes = {part: {digest for c in split[part] for digest in slices.hashes_of(c)}
              for part in split}
    assert set(state["trained_on"]) == hashes["train"] and not hashes["test"] & set(
        state["trained_on"])


def test_the_same_command_again_changes_nothing(trained):
    """A finished run is resumed at its end: the same file, no second set of log lines."""
    folder, _ = trained
    checkpoint, log = folder / "runs/ddpm/checkpoint.pt", folder / "runs/ddpm/log.csv"
    before = checkpoint.read_bytes(), log.read_bytes()
    text = run(folder, "train_ddpm.py", *SHORT, "--steps", "12")
    assert "resumed" in text and "step 00012/12 |" not in text
    assert (checkpoint.read_bytes(), log.read_bytes()) == before
    assert runs.read_log(log)[-1]["step"] == 12


def test_another_run_is_never_mixed_in(trained):
    """Other settings in the same folder: one sentence that names them, status 2, nothing
    touched."""
    folder, _ = trained
    before = (folder / "runs/ddpm/checkpoint.pt").read_bytes()
    text = run(folder, "train_ddpm.py", *SHORT, "--steps", "12", "--width", "32", status=2)
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ") and "width 16 where you ask for 32" in last
    assert (folder / "runs/ddpm/checkpoint.pt").read_bytes() == before and "Traceback" not in text


def test_minutes_bound_a_run(trained):
    """--minutes takes decimals, ends the loop by itself and leaves a complete run."""
    text = run(trained[0], "train_ddpm.py", *SHORT, "--minutes", "0.02", "--out", "runs/short")
    closing = json.loads((trained[0] / "runs/short/closing.json").read_text())
    assert 0.02 <= closing["minutes"] < 0.2 and closing["steps"] >= 1, text


def test_the_loss_has_the_same_say_at_every_noise_level(cache):
    """Before anything is learned, errors in units of the prior's own are about as large in every
    quarter of t; plain errors of v are many times smaller where noise is strong and all of the
    anatomy is decided."""
    task = train_ddpm.Images(train_ddpm.parse_arguments(["--batch", "64"]), cache)
    t, x0, eps, _, _, signal, sigma, mean, std = task.batch(0)
    x_t, v = bs.add_noise(x0, eps, signal, sigma), bs.v_target(x0, eps, signal, sigma)
    guess = bs.precondition(torch.zeros_like(mean), x_t, signal, sigma, mean, std)
    error = guess - v[:, :4]
    spread = []
    for losses in (error / bs.prior_error(signal, sigma, std), error):
        quarters = [(losses[(t - 1) * 4 // bs.T == q] ** 2).mean().item() for q in range(4)]
        spread.append(max(quarters) / min(quarters))
    assert spread[0] < 3 and spread[1] > 5, spread


@pytest.fixture(scope="module")
def synthetic(trained):
    """Two cases sampled from the label maps of the phantoms the run was made from."""
    folder, _ = trained
    return folder, run(folder, "sample.py", "--checkpoint", "runs/ddpm", "--labels",
                       "runs/phantoms/A", "--count", "2", "--steps", "3", "--out", "synthetic")


def sources_of(folder, cases="runs/phantoms/A"):
    """The cases in folder/`cases` whose label maps the synthetic cases there carry, by hash."""
    known = {slices.hashes_of(case)[0]: case for case in nifti.find_cases(folder / cases)}
    return [known[writing.synthetic_facts(case)["LabelMapSHA256"]]
            for case in nifti.find_cases(folder / "synthetic")]


def test_sampling_writes_whole_labelled_volumes(synthetic):
    """BraTS-2023 layout, the conditioning labels as seg at the right place in mm, a contact
    sheet."""
    folder, text = synthetic
    cases = nifti.find_cases(folder / "synthetic")
    assert [case.case for case in cases] == ["BraTS-SYN-00000-000", "BraTS-SYN-00001-000"]
    assert all(case.modern for case in cases)
    assert (folder / "synthetic/contact_sheet.png").exists()

    def place(volume, affine):
        return affine[:3, :3] @ np.argwhere(volume).mean(0) + affine[:3, 3]

    for case, source in zip(cases, sources_of(folder)):
        scans, labels, affine = nifti.read_case(case)
        truth, truth_affine = nifti.read_nifti(source.files["seg"])
        assert scans.shape == (4, 24, 24, 24)
        assert np.allclose(affine[:3, :3], np.diag([8.0, 8.0, 8.0]))
        head = nifti.read_nifti(source.files["t1"])[0] > 0
        assert np.linalg.norm(place(scans[0] > 0, affine) - place(head, truth_affine)) < 2
        if (labels > 0).sum() > 20:
            assert np.linalg.norm(place(labels > 0, affine) - place(truth > 0, truth_affine)) < 5
        assert nib.load(case.files["t1"]).header.get_data_dtype() == np.int16


def test_sidecars_say_how_and_not_from_whom(synthetic):
    """Synthetic, hashes of the unedited label map and of the checkpoint, all settings; no path, no
    source name in any file."""
    folder, _ = synthetic
    trained_on = set(runs.load_checkpoint(folder / "runs/ddpm")["trained_on"])
    for case, source in zip(nifti.find_cases(folder / "synthetic"), sources_of(folder)):
        text = (case.folder / f"{case.case}.json").read_text()
        facts = json.loads(text)
        of_labels, of_brain = slices.hashes_of(source)
        assert facts["SyntheticData"] == "YES" and facts["LabelMapSHA256"] == of_labels
        assert facts["UsedInTraining"] == (of_labels in trained_on)
        assert facts["BrainSHA256"] == of_brain
        weights = (folder / "runs/ddpm/checkpoint.pt").read_bytes()
        assert facts["CheckpointSHA256"] == hashlib.sha256(weights).hexdigest()
        settings = [facts[k] for k in ("Seed", "Steps", "Sampler", "Condition", "Edits")]
        assert settings == [0, 3, "dpmpp", "tumour", {}]
        assert source.case not in text and "/" not in text
        assert "phantom" not in text.replace('"GeneratorData": "phantoms"', "").lower()


def test_sampling_again_makes_only_what_is_missing(synthetic):
    """Finished cases are not touched; a deleted one comes back voxel for voxel."""
    folder, _ = synthetic
    first, second = [case.files["t2"] for case in nifti.find_cases(folder / "synthetic")]
    kept = first.stat().st_mtime_ns
    voxels = nifti.read_nifti(second)[0]
    for path in second.parent.iterdir():
        path.unlink()
    second.parent.rmdir()
    text = run(folder, "sample.py", "--labels", "runs/phantoms/A", "--count", "2", "--steps", "3")
    assert "made 1 cases, 1 were there already" in text
    assert first.stat().st_mtime_ns == kept and np.array_equal(nifti.read_nifti(second)[0], voxels)
    text = run(folder, "sample.py", "--labels", "runs/phantoms/A", "--count", "2", "--steps", "4",
               status=2)
    assert "was made with Steps 3" in text and "Traceback" not in text
    text = run(folder, "sample.py", "--count", "2", "--steps", "3", status=2)
    assert "was made with LabelMaps cases" in text and "Traceback" not in text


def test_a_foreign_file_is_no_checkpoint(tmp_path):
    """Any other torch file is refused in one sentence."""
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    text = run(tmp_path, "sample.py", "--checkpoint", tmp_path, status=2)
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ") and "no checkpoint of kind ddpm" in last
    assert "Traceback" not in text


def test_fresh_phantoms_were_never_trained_on(trained):
    """Without --labels, label maps come from phantoms no run has seen."""
    folder, _ = trained
    run(folder, "sample.py", "--count", "1", "--steps", "2", "--out", "fresh")
    case = nifti.find_cases(folder / "fresh")[0]
    facts = writing.synthetic_facts(case)
    scan, truth, _ = phantoms.phantom(recipes.FRESH)
    assert not facts["UsedInTraining"]
    assert facts["LabelMapSHA256"] == slices.case_hashes(truth, scan[0])[0]


@pytest.mark.parametrize("script, arguments, words", [
    ("train_ddpm.py", ["--data", "nowhere"], "no such folder"),
    ("train_ddpm.py", ["--device", "cuda"], "--device cuda"),
    ("train_ddpm.py", ["--steps", "0"], "--steps"),
    ("train_ddpm.py", ["--split", "nowhere.json", "--phantoms", "1"], "nowhere.json"),
    ("sample.py", ["--checkpoint", "nowhere"], "no checkpoint there"),
    ("sample.py", ["--count", "0"], "--count"),
    ("sample.py", ["--steps", "1001"], "--steps"),
    ("sample.py", ["--scan", "a", "--edit", "mirror"], "only one of --request, --scan"),
    ("train_ddpm.py", ["--minutes", "nan"], "--minutes"),
])
def test_bad_input_is_one_sentence(tmp_path, script, arguments, words):
    """Which file, what is wrong, what to do; status 2, no traceback, nothing written."""
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    text = run(tmp_path, script, *arguments, status=2)
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last and "Traceback" not in text
    written = {path.suffix for path in tmp_path.rglob("*")}
    assert written.isdisjoint([".pt", ".npy", ".json", ".tmp", ".csv"])


@pytest.mark.parametrize("command", [train_ddpm, train_seg, sample, desk])
def test_an_empty_text_is_said(command):
    """--data "$DATA" where DATA was never set: else phantoms would be made in place of cases."""
    texts = [(row[0], row[4] if len(row) > 4 else {}) for row in command.FLAGS if row[1] is str]
    for flag, settings in texts:
        words = [flag] * flag.startswith("--") + [""] * (2 if settings.get("nargs") == 2 else 1)
        with pytest.raises(bs.BadInput, match=f"^{flag}: is empty; "):
            options.Parser("", command.FLAGS).parse_args(words)
    assert options.Parser("", sample.FLAGS).parse_args(["--request", ""]).request == ""


def test_first_look(tmp_path):
    """`python brainsyn.py`: a picture and the layer-shape table."""
    text = run(tmp_path, "brainsyn.py")
    assert (tmp_path / "runs/first_look.png").exists() and "conv_in" in text and "total" in text
