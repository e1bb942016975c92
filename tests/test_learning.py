"""The default runs, shortened to what a slow test may take: they must pass their own closing
figures."""
import json

import pytest

from kit import audit
from nursery import run_script
from test_scripts import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both runs find the same phantoms and the same cache."""
    return tmp_path_factory.mktemp("default")


@pytest.mark.slow
def test_default_training_obeys_masks_and_looks_like_scans(folder):
    """On held-out phantoms: ET lights up on T1ce and ED on FLAIR in 95% of slices, air is black in
    99% of voxels, fine detail and grey-white contrast lie within half of the phantoms' own."""
    run(folder, "train_ddpm.py", "--phantoms", "30", "--steps", "130", "--sample-every", "0")
    closing = json.loads((folder / "runs/ddpm/closing.json").read_text())
    assert closing["slices_with_ET"] >= 5 and closing["slices_with_ED"] >= 10
    assert closing["sampled_t1ce_ET_above_brain"] >= 0.95 and closing[
        "sampled_flair_ED_above_brain"] >= 0.95
    assert closing["sampled_air_black"] >= 0.99
    for name in ("fine_power_ratio", "grey_white_ratio"):       # fine detail of the prior alone: 5
        assert 0.5 <= closing[name] <= 1.5, closing


@pytest.mark.slow
def test_default_segmenter_finds_tumours_in_held_out_cases(folder):
    """A tenth of the default run on half the phantoms: mean Dice over six held-out ones of at least
    0.75 for WT, 0.6 for TC and 0.45 for ET (a segmenter that finds nothing has 0.08 or less)."""
    run(folder, "train_seg.py", "--phantoms", "30", "--steps", "120")
    closing = json.loads((folder / "runs/seg/closing.json").read_text())
    assert closing["cases"] == "6 test cases"
    dice = [closing[region]["dice"] for region in ("WT", "TC", "ET")]
    assert all(found >= least for found, least in zip(dice, (0.75, 0.6, 0.45))), closing
    assert closing["WT"]["sensitivity"] >= 0.8, closing


@pytest.mark.slow
def test_default_generator_copies_no_training_case(folder):
    """The audit of three cases it makes, after the run above: all planted copies are found, and
    nothing else. (With 21 training heads the verdict may still be a leak: they come back from their
    label maps better than others.)"""
    run(folder, "sample.py", "--count", "3", "--steps", "4")
    _, text = run_script(folder, "sample.py", "--audit", "synthetic", "--phantoms", "30", "--steps",
                         "4")
    assert "against 21 training cases and 9 real cases never trained on: 0 too near" in text, text
    found = ", ".join(f"{kind} 100%" for kind in audit.CANARIES)
    assert f"Planted copies found: {found}." in text, text
