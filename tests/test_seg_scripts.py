"""The segmenter's commands of the README, shortened by their own flags: training, the closed loop,
judging, edited label maps, the study."""
import csv
import gzip
import json
import os
import re
import shutil
import signal
import zipfile
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

import brainsyn as bs
from kit import desk, judging, nifti, phantoms, runs, slices, study, writing
import sample
import train_ddpm
import train_seg
from test_scripts import SHORT, run

SEG = ["--phantoms", "10", "--resolution", "32", "--batch", "4", "--validate-every", "4", "--seed",
       "3"]


@pytest.fixture(scope="module")
def work(tmp_path_factory, lay_phantoms):
    """A folder with a generator and a segmenter trained for a few steps on the same ten phantoms,
    and what training the segmenter printed."""
    folder = lay_phantoms(tmp_path_factory.mktemp("seg"), 10)
    run(folder, "train_ddpm.py", *SHORT[2:], "--phantoms", "10", "--steps", "4")
    return folder, run(folder, "train_seg.py", *SEG, "--steps", "8")


@pytest.fixture(scope="module")
def made(work):
    """Four cases from randomly edited label maps of training cases alone."""
    return work[0], run(work[0], "sample.py", "--labels", "runs/phantoms/A", "--part", "train",
                        "--edit", "random", "--count", "4", "--steps", "2")


def facts_of(folder):
    """Sidecars of all cases in a folder."""
    return [writing.synthetic_facts(case) for case in nifti.find_cases(folder)]


def test_training_ends_with_a_table_and_its_files(work):
    """WT, TC, ET on held-out cases; best weights, CSV of every case, pictures, predictions on the
    scans' grid."""
    folder, text = work
    out = folder / "runs/seg"
    assert {p.name for p in out.iterdir()} == {"best.pt", "checkpoint.pt", "checkpoint.previous.pt",
                                               "log.csv", "curves.png", "cases.csv", "predictions",
                                               "predictions.png", "closing.json"}
    table = text[text.index("region    Dice"):].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["WT", "TC", "ET"]
    for word in ("Dice", "nothing", "HD95 mm", "sensitivity", "volume error mL"):
        assert word in table[0]
    split = slices.split_patients(nifti.find_cases(folder / "runs/phantoms/A"))
    rows = list(csv.DictReader((out / "cases.csv").open()))
    assert {row["case"] for row in rows} == {c.case for c in split["test"]} and len(
        rows) == 3 * len(split["test"])
    assert np.mean([float(r["dice"]) for r in rows if r["region"] == "WT"]) == pytest.approx(
        json.loads((out / "closing.json").read_text())["WT"]["dice"], abs=1e-5)
    for case in split["test"]:
        predicted = nib.load(out / "predictions" / f"{case.case}_prediction.nii.gz")
        scan = nib.load(case.files["t1"])
        assert predicted.shape == scan.shape and np.array_equal(predicted.affine, scan.affine)


def test_one_voxel_in_a_case_without_tumour_does_not_choose_the_weights():
    """It counts less in validation than half of another case's tumour."""
    # two cases of two slices, tumour in the first alone
    classes = torch.ones(4, 8, 8, dtype=torch.long)
    classes[:2, 2:6, 2:6] = 4
    cases = [{"part": "val", "first": first, "axial": 2} for first in (0, 2)]
    cache = SimpleNamespace(cases=cases, batch=lambda rows: (torch.from_numpy(rows), classes[rows],
                                                             None))

    def score(wrong):
        found = bs.tumour_labels(classes).clone()
        found[wrong] = 3 - found[wrong]
        return train_seg.validate(SimpleNamespace(slice_labels=lambda rows: found[rows]), cache)

    stray, half = (2, 0, 0), (slice(0, 2), slice(2, 4), slice(2, 6))
    assert 1 > score(stray) > 0.9 > score(half) > 0
    assert np.isnan(train_seg.validate(None, SimpleNamespace(cases=[])))


def test_the_best_weights_are_those_of_the_best_validation(work):
    """best.pt carries the highest validation Dice of the log, and loads as a segmenter that knows
    by which cases it was trained and chosen; checkpoint.pt, which holds other weights, is not taken
    for it."""
    folder, _ = work
    log = [row for row in runs.read_log(folder / "runs/seg/log.csv") if row["val_dice"]
           == row["val_dice"]]
    best = runs.load_checkpoint(folder / "runs/seg", "segmenter", names=("best.pt",))
    assert [row["step"] for row in log] == [4, 8] and best["dice"] == pytest.approx(
        max(r["val_dice"] for r in log), abs=1e-5)
    segmenter = runs.load_segmenter(folder / "runs/seg", torch.device("cpu"))
    split = slices.split_patients(nifti.find_cases(folder / "runs/phantoms/A"))
    assert segmenter.seen == set(study.hashes_of_all([*split["train"], *split["val"]]))


class PowerCut(Exception):
    pass


@pytest.mark.slow
def test_resume_equals_the_straight_run_bit_for_bit(work, tmp_path, monkeypatch):
    """A crash in step 6 falls back to the checkpoint of step 1; the same command then ends with the
    weights, batch norm statistics, EMA and best validation of the straight run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    os.symlink(work[0] / "runs/phantoms", tmp_path / "runs/phantoms")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    real = train_seg.draw_batch

    def cut(sources, args, step):
        if step == 5:
            raise PowerCut
        return real(sources, args, step)

    try:
        monkeypatch.setattr(train_seg, "draw_batch", cut)
        with pytest.raises(PowerCut):
            train_seg.main([*SEG, "--steps", "8"])
        assert runs.load_checkpoint("runs/seg", "seg")["step"] == 1
        monkeypatch.setattr(train_seg, "draw_batch", real)
        train_seg.main([*SEG, "--steps", "8"])
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)
    straight, resumed = [runs.load_checkpoint(at, "seg")
                         for at in (work[0] / "runs/seg", "runs/seg")]
    for part in ("weights", "ema"):
        assert all(torch.equal(straight[part][k], resumed[part][k]) for k in straight[part]), part
    straight, resumed = [runs.load_checkpoint(folder, "segmenter", names=("best.pt",))
                         for folder in (work[0] / "runs/seg", "runs/seg")]
    assert straight["step"] == resumed["step"] and straight["dice"] == resumed["dice"]
    assert all(torch.equal(straight["weights"][k], resumed["weights"][k])
               for k in straight["weights"])


def test_synthetic_cases_join_the_training(made):
    """At the stated share; the run says how many there are and notes their label maps among what it
    saw."""
    folder, _ = made
    text = run(folder, "train_seg.py", *SEG, "--steps", "2", "--synthetic", "synthetic", "--out",
               "runs/seg_mix")
    assert "synthetic: 4 cases, 50% of every batch" in text
    assert len(re.search(r"training slices (.*)", text)[1].split(" + ")) == 2


def test_batches_hold_the_stated_share(cache):
    """A quarter of every batch from the second source, the rest from the first, fixed by (seed,
    step)."""
    rows = cache.part("train")
    a, b = train_seg.source(cache, rows[:40], 0.25), train_seg.source(cache, rows[-40:])
    args = train_seg.parse_arguments(["--batch", "8", "--augment", "none"])
    seen = set()
    for step in range(3):
        images, labels = train_seg.draw_batch([a, b], args, step)
        known = cache.batch(rows[:40])[0]
        assert [bool((known == picture).flatten(1).all(1).any()) for picture in images] == [
            True] * 2 + [False] * 6
        assert labels.max() <= 3 and torch.equal(images,
                                                 train_seg.draw_batch([a, b], args, step)[0])
        seen.add(float(images.sum()))
    assert len(seen) == 3


@pytest.mark.parametrize("how", ["labels", pytest.param("generator", marks=pytest.mark.slow)])
def test_synthetic_cases_that_owe_to_held_out_patients_are_refused(work, tmp_path, how):
    """Label maps of test cases, or a generator that has seen one: refused by the hashes, names
    changed or not."""
    folder, _ = work
    source = nifti.find_cases(folder / "runs/phantoms/A")
    test = slices.split_patients(source)["test"][0]
    if how == "labels":
        run(folder, "sample.py", "--labels", "runs/phantoms/A", "--part", "test", "--count", "1",
            "--steps", "2", "--edit", "mirror", "--out", tmp_path / "syn")
    else:
        split = tmp_path / "split.json"
        split.write_text(json.dumps({"train": [c.case for c in source if c.case != source[1].case],
                                     "val": [source[1].case]}))
        run(folder, "train_ddpm.py", *SHORT[2:], "--phantoms", "10", "--steps", "1", "--split",
            split, "--out", f"runs/{tmp_path.name}")
        run(folder, "sample.py", "--checkpoint", f"runs/{tmp_path.name}", "--count", "1", "--steps",
            "2", "--out", tmp_path / "syn")
    os.rename(tmp_path / "syn/BraTS-SYN-00000-000", tmp_path / "syn/another")
    assert test.case not in str(list((tmp_path / "syn").rglob("*")))
    text = run(folder, "train_seg.py", *SEG, "--steps", "2", "--synthetic", tmp_path / "syn",
               "--out", "runs/refused", status=2)
    assert "come from validation or test patients" in text and "Traceback" not in text
    assert not (folder / "runs/refused/checkpoint.pt").exists()


def test_real_cases_are_no_synthetic_ones_and_the_other_way_round(made):
    """--synthetic wants sidecars; --data and --labels refuse what sample.py made, so that debts to
    held-out patients cannot be washed off by going through a second generator."""
    folder, _ = made
    text = run(folder, "train_seg.py", *SEG, "--steps", "2", "--synthetic", "runs/phantoms/A",
               "--out", "runs/x", status=2)
    assert "no sidecar of a synthetic case" in text and "Traceback" not in text
    for case in nifti.find_cases(folder / "synthetic")[:1]:
        shutil.copytree(case.folder, folder / "stray/a")
        (folder / "stray/a" / f"{case.case}.json").unlink()
    for data in ("synthetic", "stray"):                     # with sidecars, and by the header alone
        for script in ("train_seg.py", "train_ddpm.py"):
            text = run(folder, script, "--data", data, "--out", "runs/x", status=2)
            assert "is synthetic; use real cases" in text and "Traceback" not in text
    text = run(folder, "sample.py", "--labels", "synthetic", "--out", "x", status=2)
    assert "is synthetic; use real cases" in text and "Traceback" not in text


def test_the_closed_loop_needs_no_labels(work, tmp_path):
    """Scan -> predicted labels on its own grid -> a synthetic case with those labels -> a picture.
    The labels that lie beside the scan are not looked at: without them the result is the same, byte
    for byte. The same command again makes nothing; with another segmenter it is refused."""
    folder, _ = work
    case = slices.split_patients(nifti.find_cases(folder / "runs/phantoms/A"))["test"][0]
    bare = tmp_path / "bare"
    shutil.copytree(case.folder, bare / case.case)
    (bare / case.case / case.files["seg"].name).unlink()
    voxels = []
    command = ["--segmenter", "runs/seg", "--checkpoint", "runs/ddpm", "--steps", "2"]
    for scan, out in ((case.folder, tmp_path / "with"), (bare, tmp_path / "without")):
        text = run(folder, "sample.py", "--scan", scan, *command, "--out", out)
        assert (out / "loop.png").exists() and "Traceback" not in text
        made, = nifti.find_cases(out)
        predicted = nib.load(out / "predictions/scan_00000.nii.gz")
        assert np.array_equal(predicted.affine, nib.load(case.files["t1"]).affine)
        facts = writing.synthetic_facts(made)
        assert facts["LabelMaps"] == "segmented" and case.case not in json.dumps(facts)
        voxels.append((np.asarray(predicted.dataobj), nifti.read_case(made)[0]))
    assert all(np.array_equal(a, b) for a, b in zip(*voxels))
    again = ["sample.py", "--scan", bare, *command, "--out", tmp_path / "without"]
    assert "made 0 cases, 1 were there already" in run(folder, *again)
    state = runs.load_checkpoint(folder / "runs/seg", "segmenter", names=("best.pt",))
    runs.save_state(tmp_path / "best.pt", {**state, "dice": 0.0})
    before = (tmp_path / "without/predictions/scan_00000.nii.gz").stat().st_mtime_ns
    text = run(folder, *again, "--segmenter", tmp_path, status=2)
    assert "was made with SegmenterSHA256" in text and "Traceback" not in text
    assert (tmp_path / "without/predictions/scan_00000.nii.gz").stat().st_mtime_ns == before


NAME = (b"DOE^JOHN", b"DOE_JOHN")              # as a header has it, as a file name has it


def everything_in(folder):
    """Names and unpacked bytes of all files below a folder."""
    for path in folder.rglob("*"):
        yield bytes(path.relative_to(folder)), b""
        if path.name.endswith(".gz"):
            yield bytes(path.name, "utf8"), gzip.decompress(path.read_bytes())
        elif path.suffix in (".pt", ".npz"):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield bytes(name, "utf8"), archive.read(name)
        elif path.is_file():
            yield bytes(path.name, "utf8"), path.read_bytes()


def test_a_name_in_the_inputs_is_in_no_output(work, tmp_path, monkeypatch):
    """A person's name in every text field, an extension and the file names of what goes in: it is
    found there, and nowhere in the checkpoint, the published weights, synthetic cases from labels
    or scans, and what lies beside."""
    monkeypatch.chdir(tmp_path)
    for number, case in enumerate(nifti.find_cases(work[0] / "runs/phantoms/A")[:3]):
        for what, path in case.files.items():
            image = nib.load(path)
            new = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
            for field in ("descrip", "aux_file", "db_name", "intent_name"):
                new.header[field] = NAME[0]
            comment = nib.nifti1.Nifti1Extension("comment", b"patient " + NAME[0])
            new.header.extensions.append(comment)
            name = path.name.replace(case.case, f"DOE_JOHN_{number}")
            (tmp_path / f"in/DOE_JOHN_{number}").mkdir(parents=True, exist_ok=True)
            nib.save(new, tmp_path / f"in/DOE_JOHN_{number}" / name)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_ddpm.main([*SHORT[2:], "--data", "in", "--steps", "1", "--out", "out/ddpm"])
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    shutil.rmtree("out/cache")                  # a working copy of the inputs, not a product
    desk.main(["--publish", "out/ddpm", "out/weights.npz"])
    common = ["--checkpoint", "out/ddpm", "--steps", "1", "--count", "1"]
    sample.main([*common, "--labels", "in", "--edit", "random", "--out", "out/model"])
    sample.main([*common, "--scan", "in/DOE_JOHN_1", "--segmenter", str(work[0] / "runs/seg"),
                 "--out", "out/loop"])
    found = {"in": [], "out": []}
    for folder, names in found.items():
        for name, data in everything_in(tmp_path / folder):
            names += [name for person in NAME if person in name + data]
    assert len(found["in"]) >= 3 * 5 * 2 and not found["out"], found["out"]
    assert len(list(everything_in(tmp_path / "out"))) > 50


@pytest.mark.slow
def test_judging_writes_one_table_and_one_json(made):
    """Texture in three planes first, then features, re-segmentation and banding; beside the prior
    alone, the floor or ceiling, and the number of images. As many phantoms as the segmenter was
    trained with. Without the generator a line says why the prior alone is missing."""
    folder, _ = made
    command = ["sample.py", "--judge", "synthetic", "--segmenter", "runs/seg"]
    text = run(folder, *command)
    report = json.loads((folder / "synthetic/judge.json").read_text())
    assert report["synthetic_cases_that_owe_to_held_out"] == 0
    names = [*judging.DISTANCES, "Dice WT", "Dice TC", "Dice ET",
             *(f"banding along {axis}" for axis in "zyx")]
    for source in ("synthetic", "prior", "real"):
        assert list(report[source]) == names
    places = [text.index(f"\n{name} ") for name in names]
    assert places == sorted(places) and "prior alone" in text
    other = run(folder, *command, "--checkpoint", "runs/nowhere")
    assert "no column prior alone: runs/nowhere: no checkpoint there" in other
    assert "prior" not in json.loads((folder / "synthetic/judge.json").read_text())
    assert f"ten draws of {report['cases_a_draw']} cases, {report['slices_a_draw']} slices" in text
    assert report["cases_a_draw"] == 2 and report["slices_a_draw"] == 80


def case_files(folder):
    """{name: voxels} of all volumes of the cases in a folder."""
    return {path.name: nib.load(path).get_fdata() for path in folder.glob("*/*.nii.gz")}


@pytest.mark.parametrize("condition", ["tumour", pytest.param("tissue", marks=pytest.mark.slow)])
def test_the_prior_alone_draws_the_same_cases_again(made, tmp_path, monkeypatch, condition):
    """From a set's own files: with the network in place every scan comes back as it is, so label
    map, outline, noise and settings are those of the set; with the prior alone scans differ and
    labels do not."""
    folder, out = made[0], "runs/ddpm" if condition == "tumour" else "runs/tissue"
    run(folder, "train_ddpm.py", *SHORT[2:], "--phantoms", "10", "--steps", "4", "--condition",
        condition, "--out", out)
    state, checkpoint = runs.load_checkpoint(folder / out), tmp_path / "loud"
    del state["file"]
    torch.nn.init.normal_(state["ema"]["conv_out.weight"], std=0.1)     # a network that shows
    checkpoint.mkdir()
    runs.save_checkpoint(checkpoint, state)
    run(folder, "sample.py", "--checkpoint", checkpoint, "--labels", "runs/phantoms/A", "--edit",
        "random", "--count", "2", "--steps", "3", "--guidance", "1.5", "--seed", "7", "--out",
        tmp_path / "set")
    cases = nifti.find_cases(tmp_path / "set")
    arguments = cases, checkpoint, torch.device("cpu")
    assert len(judging.draw_prior_alone(*arguments, tmp_path / "alone")) == 2
    monkeypatch.setattr(judging, "prior_alone", lambda denoiser: denoiser)
    judging.draw_prior_alone(*arguments, tmp_path / "again")
    want, again, alone = [case_files(tmp_path / name) for name in ("set", "again", "alone")]
    want = {name: voxels for name, voxels in want.items() if name in again}
    assert len(want) == 10 and set(again) == set(alone) == set(want)
    for name, voxels in want.items():
        assert np.abs(again[name] - voxels).max() <= 1
        assert np.array_equal(alone[name], voxels) == ("-seg." in name)


def test_the_prior_alone_of_another_generator_is_not_drawn(made, tmp_path, capsys):
    """The checkpoint must be that of all sidecars: else nothing is drawn, and why is said."""
    folder = shutil.copytree(made[0] / "synthetic", tmp_path / "set")
    cases = nifti.find_cases(folder)
    path = cases[1].folder / f"{cases[1].case}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"CheckpointSHA256": "0"}))
    arguments = made[0] / "runs/ddpm", torch.device("cpu"), tmp_path / "alone"
    assert judging.draw_prior_alone(cases, *arguments) == []
    assert "is not the generator of all cases" in capsys.readouterr().out
    assert len(judging.draw_prior_alone(cases[:1], *arguments)) == 1


def test_a_segmenter_that_knows_the_held_out_cases_may_not_judge(made, tmp_path):
    """The ceiling would be no ceiling: refused by the hashes in its checkpoint."""
    folder, _ = made
    split = slices.split_patients(nifti.find_cases(folder / "runs/phantoms/A"))
    held_out = [case.case for case in split["test"]]
    for part in ("train", "val"):
        other = {"train": held_out, "test": [split[part][0].case]}
        (tmp_path / "other.json").write_text(json.dumps(other))
        text = run(folder, "sample.py", "--judge", "synthetic", "--data", "runs/phantoms/A",
                   "--split", tmp_path / "other.json", status=2)
        assert "no case is held out from runs/seg" in text and "Traceback" not in text


@pytest.mark.slow
def test_a_segmenter_may_not_judge_what_it_was_trained_on(made):
    """Dice on its own training cases says nothing about them: refused by the sidecars it has
    seen."""
    folder, _ = made
    run(folder, "train_seg.py", *SEG, "--steps", "1", "--synthetic", "synthetic", "--out",
        "runs/knows")
    text = run(folder, "sample.py", "--judge", "synthetic", "--phantoms", "10", "--segmenter",
               "runs/knows", status=2)
    assert "was trained on synthetic" in text and "Traceback" not in text


def test_an_audit_names_a_planted_copy_and_marks_the_set(made, tmp_path, monkeypatch, capsys):
    """A training case put among the synthetic ones, under a sidecar that says otherwise: named with
    its score, a picture of the pair, exit 1. Figures, and no name, go into sidecars and datasheet,
    and a segmenter still knows the set it was trained on. (The other cases may be named
    too: a generator of four steps draws the mean of its seven training brains, which is near to
    each of them.)"""
    folder, syn = made[0], tmp_path / "syn"
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "synthetic", syn)
    few = ["--audit", str(syn), "--steps", "2", "--checkpoint", "runs/ddpm"]
    state = runs.load_checkpoint("runs/ddpm")
    victim = next(case for case in nifti.find_cases("runs/phantoms/A")
                  if slices.hashes_of(case)[0] in state["trained_on"])
    scans, labels, affine = nifti.read_case(victim)
    facts = {**facts_of(syn)[0], "LabelMapSHA256": "0" * 64, "BrainSHA256": "0" * 64}
    counts = (scans / scans.max((1, 2, 3), keepdims=True) * 999).astype(np.int16)
    writing.write_case(syn, "BraTS-SYN-00009-000", counts, labels, affine, facts)
    digests = [writing.sidecar_hash(case) for case in nifti.find_cases(syn)]
    with pytest.raises(SystemExit) as left:
        sample.main([*few, "--out", str(tmp_path / "after")])
    text = capsys.readouterr().out
    assert left.value.code == 1 and "verdict: leak" in text
    assert re.search(f"copy: BraTS-SYN-00009-000 at .* is too near to {victim.case}", text), text
    report = json.loads((tmp_path / "after/audit.json").read_text())
    first = report["pairs"][0]
    assert report["copies"] >= 1 and first["named"]
    assert first["training"] == victim.case and "00009" in first["synthetic"]
    assert report["training_cases"] == 7 and report["decoys"] == 3
    assert report["condition"] == "tumour"
    assert {path.name for path in (tmp_path / "after").iterdir()} == {"audit.json", "pairs.png"}
    marked = facts_of(syn)
    assert {facts["Audit"]["verdict"] for facts in marked} == {"leak"}
    assert victim.case not in json.dumps(marked)
    sheet = (syn / "DATASHEET.md").read_text()
    assert "**leak**" in sheet and victim.case not in sheet
    assert "network calls: 2; sampler: dpmpp;\nguidance: 1.0." in sheet, sheet
    assert [writing.sidecar_hash(case) for case in nifti.find_cases(syn)] == digests


def test_an_audit_needs_cases_seen_and_unseen(made, tmp_path, monkeypatch):
    """Real cases the generator knows nothing of, or knows all of: one sentence."""
    monkeypatch.chdir(made[0])
    phantoms.make_phantoms(tmp_path / "other", 2, "B")
    with pytest.raises(bs.BadInput, match="0 cases that runs/ddpm was trained on and 2 others"):
        sample.main(["--audit", "synthetic", "--data", str(tmp_path / "other"), "--out",
                     str(tmp_path / "a")])
    with pytest.raises(bs.BadInput, match="no such folder"):
        sample.main(["--audit", "nowhere"])


def test_sampling_from_one_part_of_the_split(made):
    """--part train uses label maps of training patients alone, in edited form; the edit is in the
    sidecar."""
    folder, _ = made
    split = slices.split_patients(nifti.find_cases(folder / "runs/phantoms/A"))
    allowed = {slices.hashes_of(case)[0] for case in split["train"]}
    sidecars = facts_of(folder / "synthetic")
    for facts in sidecars:
        assert facts["LabelMapSHA256"] in allowed and facts["UsedInTraining"]
        assert set(facts["Edits"]) == {"scale", "rotate", "shift", "mirror", "elastic"}
        assert facts["EditsApplied"] == facts["Edits"]
    assert len({json.dumps(facts["Edits"]) for facts in sidecars}) == len(sidecars) == 4


def test_a_balanced_set_measures_what_it_was_asked_for(made):
    """ET volumes evenly spread over the range; asked and measured are both in the sidecar and
    agree."""
    folder, _ = made
    text = run(folder, "sample.py", "--labels", "runs/phantoms/A", "--part", "train", "--balance",
               "ET", "--range", "4", "20", "--count", "4", "--steps", "2", "--out", "balanced")
    sidecars = facts_of(folder / "balanced")
    asked, measured = [[facts[name]["ET"] for facts in sidecars]
                       for name in ("RequestedML", "VolumesML")]
    assert sorted(asked) == [6, 10, 14, 18]
    assert np.abs(np.subtract(asked, measured)).max() < 7, measured     # in cubes of 8 mm
    assert all(set(facts["EditsApplied"]) == {"scale"} for facts in sidecars)
    assert re.search(r"ET: asked 6.0 to 18.0 mL, mean error \d\.\d\d mL", text)


@pytest.mark.slow
def test_the_study_compares_and_goes_on_where_it_was_stopped(work):
    """Table, JSON and plot for every arm; generators are trained on those patients alone; a second
    call trains nothing again; other settings are refused."""
    folder, _ = work
    command = ["--study", "--phantoms", "10", "--resolution", "32", "--batch", "2", "--steps", "2",
               "--patients", "1", "--seeds", "1", "--generator-steps", "2", "--made", "2",
               "--calls", "2"]
    text = run(folder, "train_seg.py", *command)
    out = folder / "runs/study"
    summary = json.loads((out / "study.json").read_text())
    split = slices.split_patients(nifti.find_cases(folder / "runs/phantoms/A"))
    assert {row["patients"] for row in summary["rows"]} == {1}
    cases = [case.case for case in split["test"]]
    for path in out.glob("patients_*/*-*.json"):                # regions, cases
        rows = json.loads(path.read_text())["rows"]
        assert [row["case"] for row in rows] == np.repeat(cases, 3).tolist()
    assert (out / "study.png").stat().st_size > 1000
    state = runs.load_checkpoint(out / "patients_001/ddpm")
    assert len(state["trained_on"]) == 2                        # of a label map and of its outline
    trained_on = [digest[:16] for digest in state["trained_on"]]
    for name in ("synthetic", "balanced"):
        for facts in facts_of(out / "patients_001" / name):
            assert facts["GeneratorTrainedOn"] == trained_on
    assert [row["arm"] for row in summary["rows"]] == list(study.ARMS)
    pairs = {(row["arm"], row["against"]) for row in summary["differences"]}
    assert pairs == {(arm, base) for arm in study.ARMS for base in study.ARMS[arm][3]}
    assert "too few to tell" in text

    def results():
        return {path: path.stat().st_mtime_ns for path in out.glob("patients_*/*-*.json")}

    before = results()
    again = run(folder, "train_seg.py", *command)
    assert before == results() and len(before) == len(study.ARMS)
    assert again[again.index("--- Dice"):] == text[text.index("--- Dice"):]
    text = run(folder, "train_seg.py", *command, "--lr", "0.5", status=2)
    assert "other settings" in text and "Traceback" not in text


def test_a_study_goes_on_with_its_own_settings_alone(tmp_path):
    """The same settings, flags that may change aside; others, and a damaged file, are one
    sentence."""
    args = SimpleNamespace(out=str(tmp_path), lr=0.1, seeds=2)
    study.require_settings(args, {"trained_on": ["a"]})
    args.seeds = 3
    study.require_settings(args, {"trained_on": ["a"]})
    with pytest.raises(bs.BadInput, match="other settings"):
        study.require_settings(args, {"trained_on": ["b"]})
    path = tmp_path / "settings.json"
    for damaged in (path.read_bytes()[:-9], b"", b"\xff\xfe{}"):
        path.write_bytes(damaged)
        with pytest.raises(bs.BadInput, match="settings.json: damaged .*choose another --out"):
            study.require_settings(args, {"trained_on": ["a"]})


@pytest.mark.slow
def test_generators_saw_all_is_said(made):
    """A given synthetic set is used in every row; rows of fewer patients are marked."""
    folder, _ = made
    text = run(folder, "train_seg.py", "--study", "--synthetic", "synthetic", "--phantoms", "10",
               "--resolution", "24", "--batch", "2", "--steps", "1", "--patients", "1", "all",
               "--seeds", "1", "--out", "runs/given")
    marked = [line for line in text.splitlines() if "generator saw all" in line]
    assert len(marked) == 2
    assert all(" 1 patients" in line and "synthetic" in line for line in marked)


@pytest.mark.parametrize("command, words", [
    ("train_seg.py --data nowhere", "no such folder"),
    ("train_seg.py --synthetic-share 2", "--synthetic-share: '2' is not a number"),
    ("train_seg.py --batch 1", "--batch 1"),
    ("train_seg.py --study --minutes 1", "--minutes does not go with --study"),
    ("sample.py --seed -1", "--seed"),
    pytest.param("train_seg.py --study --phantoms 4 --patients 77", "--patients 77",
                 marks=pytest.mark.slow),
    ("sample.py --edit scale=big", "--edit scale=big"),
    ("sample.py --part train", "--part needs --labels"),
    ("sample.py --judge nowhere", "nowhere: no such folder"),
    ("sample.py --audit nowhere", "nowhere: no such folder"),
    ("sample.py --scan nowhere", "no checkpoint there"),
])
def test_bad_input_is_one_sentence(tmp_path, command, words):
    """Which file, what is wrong, what to do; status 2, no traceback."""
    text = run(tmp_path, *command.split(), status=2)
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last and "Traceback" not in text
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".tmp", ".csv")]
