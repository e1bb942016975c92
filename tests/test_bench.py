"""The benchmarks run, at sizes so small that their figures mean nothing."""
import json
import sys

import pytest

from kit import nifti, slices
from nursery import run_script


def run(folder, script, *words):
    """What a benchmark printed; it must have ended well."""
    status, text = run_script(folder, f"tests/{script}", *words)
    assert status == 0, text
    return text


@pytest.mark.programs
def test_speed_is_compared_with_a_plain_network_of_the_same_architecture(tmp_path):
    """The ratio that shows when a change makes our network slower than one written without care."""
    text = run(tmp_path, "bench_peers.py", "--rounds", 1, "--scale", 4, "--steps", 3, "--only",
               "ours", "plain, same architecture", "our segmenter")
    rows = [line.split("|")[1:-1] for line in text.splitlines()
            if line.startswith("| plain U-Net of our arch")]
    assert len(rows) == 2 and all(float(row[3].split()[0]) > 0 for row in rows), text
    assert "share of our training loop outside the network:" in text


def test_both_networks_of_that_ratio_do_the_same_work():
    """As many multiplications, parameters but for the scalars' layers: else the ratio compares two
    designs."""
    import bench_peers
    ours, plain = [bench_peers.Runner(name, 32, 2) for name in ("ours", "plain, same architecture")]
    assert ours.flops == pytest.approx(plain.flops, rel=0.01)
    assert ours.parameters == pytest.approx(plain.parameters, rel=0.05)


@pytest.mark.parametrize("module, words", [("bench_peers", []), ("bench_devices", ["--monai"]),
                                           ("bench_quality", ["monai"])])
def test_a_library_that_cannot_be_used_is_named(tmp_path, monkeypatch, capsys, module, words):
    """Installed, but made for another PyTorch: the benchmark goes on without it."""
    (tmp_path / "monai").mkdir()
    (tmp_path / "monai/__init__.py").write_text("raise AttributeError('torch has no such thing')")
    monkeypatch.syspath_prepend(tmp_path)
    bench, timed = __import__(module), []
    if words:
        for name in {"measure", "prepare"} & set(vars(bench)):
            monkeypatch.setattr(bench, name, lambda *inputs: timed.append(inputs[0]))
        monkeypatch.setattr(sys, "argv", [module, *words])
        bench.main()
    else:
        assert not bench.there("MONAI tuned")
    assert "left out: MONAI" in (text := capsys.readouterr().out) and "no such thing" in text
    assert "MONAI" not in timed


@pytest.mark.programs
def test_quality_is_measured_after_minutes(tmp_path, lay_phantoms):
    """Two runs, the second again, a change of another default, the table and the curve of all."""
    words = ["--phantoms", 8, "--resolution", 16, "--seg-steps", 2, "--held", 4, "--out", "q"]
    run(lay_phantoms(tmp_path, 8, "q"), "bench_quality.py", "ours", *words, "--minutes", 0.01, 0.02)
    assert "resumed" not in run(tmp_path, "bench_quality.py", "ours", *words, "--minutes", 0.02)
    run(tmp_path, "bench_quality.py", "changes", "batch 8", "--words=--width 16", *words,
        "--minutes", 0.01)
    rows = [json.loads(line) for line in (tmp_path / "q/results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["ours", "ours", "ours", "batch 8 --width 16"]
    for row in rows:
        assert row["steps"] >= 1 and 0 < row["x0 at .01"] < 10 and 0 <= row["Dice"] <= 1
    text = run(tmp_path, "bench_quality.py", "show", "--out", "q")
    assert "| ours |" in text and "| batch 8 --width 16 |" in text and (tmp_path
                                                                        / "q/curves.png").exists()


@pytest.mark.programs
def test_costs_of_whole_volumes_are_measured(tmp_path):
    """Volumes, growth and the bill."""
    text = run(tmp_path, "bench_scale.py", "--tiny")
    for words in ("| sampled, 16x16", "| segmented", "| ratio |", "| pixels a side |", "on paper:"):
        assert words in text, text


@pytest.mark.programs
def test_ways_to_draw_volumes_are_compared(tmp_path, lay_phantoms):
    """A row a way, a picture of all."""
    folder = lay_phantoms(tmp_path, 7)
    words = ["--phantoms", 7, "--resolution", 24, "--width", 16, "--mults", 1, "--batch", 4,
             "--steps", 2, "--sample-every", 0]
    status, text = run_script(folder, "train_ddpm.py", *words)
    assert status == 0, text
    text = run(folder, "bench_volumes.py", "runs/ddpm", "--heads", 1, "--calls", 2)
    rows = [line.split(" | ") for line in text.splitlines() if " | dpmpp | noise | " in line]
    assert [row[0] for row in rows] == ["| axial", "| in turn", "| mean"], text
    assert all(len(row[4].split()) == len(row[6].split()) == 3 for row in rows), text
    assert (folder / "runs/ddpm/volumes.png").exists()
    split = slices.split_patients(nifti.find_cases(folder / "runs/phantoms/A"))
    names = {part: [case.patient for case in split[part]] for part in split}
    names["train"], names["test"] = names["test"], names["train"]
    (folder / "other.json").write_text(json.dumps(names))
    status, text = run_script(folder, "tests/bench_volumes.py", "runs/ddpm", "--split",
                              "other.json")
    assert status == 2 and "runs/ddpm was trained on cases held out here" in text, text


@pytest.mark.programs
def test_all_of_a_card_is_tried(tmp_path):
    """Steps, a short training, a volume: whatever device there is."""
    text = run(tmp_path, "bench_gpu.py", "--sizes", 16, "--minutes", 0.01, "--phantoms", 6)
    assert "| ours |" in text and "texture distance, sagittal" in text
    assert "16^3 voxels: a volume in " in text, text
