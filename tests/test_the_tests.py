"""The tests that mark assignments, tested: wrong answers that students write must turn one red,
another right answer none. Each is grafted as a hand-in is, see blank.py.
"""
import ast
import csv
import subprocess
import sys
from pathlib import Path

import pytest

import brainsyn as bs
from blank import ASSIGNMENTS, LIBRARY, VARIANT, blank, find, variant_angle
from grade import grade, pytest_words
from nursery import run_script

SOURCE = LIBRARY.read_text()
# Per exercise: (what stands in the library, what a student writes instead).
WRONG = {"cosine_alpha_bar": [("signal ** 2 / (signal ** 2 + sigma ** 2)",
                               "signal / (signal + sigma)"),
                              ("alpha_bar[0], alpha_bar[-1] = 1.0, " "0.0",
                               "alpha_bar = alpha_bar.clamp(1e-4)"), ("(math.pi / 2)", "math.pi"),
                              ("shift * torch.cos(angle)", "shift ** 2 * torch.cos(angle)"),
                              ("torch.float64", "torch.float32")],
         "signal_sigma": [("level.sqrt()", "level"), ("(1 - level).sqrt()", "1 - level.sqrt()"),
                          ("view(-1, 1, 1, 1)", "view(-1, 1)"),
                          ("alpha_bar[t]", "alpha_bar[t - 1]")],
         "add_noise": [("signal * x0 + sigma * eps", "sigma * x0 + signal * eps"),
                       ("signal * x0 + sigma * eps", "signal * x0 - sigma * eps"),
                       ("signal * x0 +", "x0 +")], "v_target": [
    ("signal * eps - sigma * x0", "signal * eps + sigma * x0"),
    ("signal * eps - sigma * x0", "sigma * x0 - signal * eps"),
    ("signal * eps - sigma * x0", "sigma * eps - signal * x0")],
         "split_v": [("signal * x_t - sigma * v", "(x_t - sigma * v) / signal"),
                     ("signal * x_t - sigma * v", "signal * x_t + sigma * v"),
                     ("sigma * x_t + signal * v", "sigma * x_t - signal * v"),
                     ("signal * x_t - sigma * v, sigma * x_t + signal * v",
                      "sigma * x_t + signal * v, signal * x_t - sigma * v")],
         "min_snr_weight": [("gamma * (1 - level)", "gamma * level"), (".clamp(min=floor)", ""),
                            ("torch.minimum(level, gamma * (1 - level))", "torch.maximum(level, "
                             "gamma * (1 - level))"), (" if gamma else torch.ones_like(level)",
                                                       "")],
         "prior_error": [(".sqrt()", ""), ("(std * signal) ** 2", "signal ** 2"),
                         ("std / (", "1 / (")], "precondition": [
    ("(1 - std ** 2)", "(1 + std ** 2)"), ("* x_t - mean)", "* x_t + mean)"),
    ("guess = sigma *", "guess = signal *"), ("prior_error(signal, sigma, std) * out", "out")],
         "one_hot": [(".movedim(-1, 1)", ".movedim(-1, 2)"),
                     ("F.one_hot(classes, n_classes)", "F.one_hot(classes, n_classes)[..., [1, 0, "
                      "*range(2, n_classes)]]"), (".float()", ".float() * 0")],
         "sinusoid": [("phase.sin(), phase.cos()", "phase.sin(), phase.sin()"),
                      ("-math.log(top)", "math.log(top)"),
                      ("value.float()", "(value.float() * 0)")],
         "ResBlock.forward": [("self.skip(x) +", ""), ("* (1 + scale)", "* scale"), ("+ shift", ""),
                              ("self.norm2(h)", "h"), ("self.conv2(F.silu(h))", "self.conv2(h)")],
         "Attention.forward": [("return x +", "return"), ("unbind(1)", "unbind(2)"),
                               ("(q, k, v)", "(q, q, v)"), ("self.norm(x)", "x"),
                               (".transpose(-1, -2).reshape(b, c, h, w)", ".reshape(b, c, h, w)")],
         "orthogonal": [("matrices.norm(dim=(1, 2), keepdim=True)", "matrices.norm()"),
                        ("orthogonal(matrices.mT, steps).mT", "orthogonal(matrices.mT, steps)"),
                        ("beta=3.4445", "beta=1.0"), ("range(steps)", "range(1)")],
         "EMA.advanced": [("** count", ""), ("min(self.decay, (1 + step) / (10 + step))",
                                             "self.decay"),
                          ("torch.lerp(p.float(), " "self.weights[name], keep)",
                           "torch.lerp(self.weights[name], p.float(), keep)")],
         "timesteps": [("steps + 1", "steps"), ("T, 0", "0, T"),
                       ("T, 0, steps + 1", "T - T // steps, 0, steps + 1")],
         "ddpm_step": [("math.sqrt(ratio) * (1 - after)", "ratio * (1 - after)"),
                       ("math.sqrt(after) * (1 - ratio)", "math.sqrt(after) * ratio"),
                       ("math.sqrt((1 - ratio) * (1 - after) / (1 - before))",
                        "(1 - ratio) * (1 - after) / (1 - before)"),
                       ("math.sqrt((1 - ratio) * (1 " "- after) / (1 - before))",
                        "math.sqrt(1 - ratio)")], "ddim_step": [("1 - after - d * d", "1 - after"),
                                                                ("math.sqrt(after) - along_eps * "
                                                                 "math.sqrt(before)",
                                                                 "math.sqrt(after)"),
                                                                ("d = eta *", "d = 0 *"),
                                                                ("/ math.sqrt(1 - before)", "")],
         "dpmpp_step": [("1 + 0.5 / r", "1 - 0.5 / r"), ("-k * 0.5 / r", "k * 0.5 / r"),
                        ("earlier is None or ", ""), ("/ (half_log_snr[2] - half_log_snr[1])",
                                                      "* (half_log_snr[2] - half_log_snr[1])"),
                        ("k * (1 + 0.5 / r), -k * 0.5 / r", "k, 0.0")],
         "sample": [("clamp(-1, 1)", "clamp(0, 1)"), ("visited[i]", "visited[i + 1]"),
                    ("x0_earlier = x0_hat", "x0_earlier = x"), ("if clip:", "if False:"),
                    ("x + d * noise(i)", "x")], "guided_v": [
    ("v + scale * (v_cond - v)", "v_cond + scale * (v_cond - v)"),
    ("torch.zeros_like(onehot)", "onehot"), ("if scale == 1.0:", "if False:"),
    ("rescale * spread", "rescale / spread")], "volume_noise": [
    ("mix / mix.norm(dim=1, " "keepdim=True)", "mix"),
    ("mix / mix.norm(dim=1, keepdim=True)", "mix / mix.sum(1, keepdim=True)"), ("* thickness", ""),
    ("if coherence <= 0:", "if False:")], "regions_of": [("labels == k", "labels >= k"),
                                                         ("REGIONS.values()", "((1,), (2,), (3,))"),
                                                         ("REGIONS.values()",
                                                          "((1, 2, 3), (1, 2), (3,))")],
         "labels_of": [("(2, 1, 3)", "(1, 2, 3)"), ("argmax(0)", "argmax(-1)"),
                       ("zip(probability, (2, 1, 3))", "zip(probability.flip(0), (3, 1, 2))")],
         "dice_loss": [("(2 * shared", "(shared"), ("1 - (", "("),
                       ("/ (total + smooth)", "/ total"), ("(0, 2, 3)", "(2, 3)")],
         "dice": [("2 * int(", "int("), ("if total else 1.0", "if total else 0.0"),
                  ("predicted & truth", "predicted | truth"),
                  (" / total if total else 1.0", " / (total + 1)")],
         "sensitivity": [("/ int(truth.sum())", "/ int(predicted.sum())"), ("math.nan", "1.0"),
                         ("predicted & truth", "predicted")],
         "surface": [("return mask & ~core", "return core"),
                     ("for start in (0, 2)", "for start in (0,)"), ("range(3)", "range(2)")],
         "hd95": [("0.95", "0.5"), ("max(torch.quantile", "min(torch.quantile"), ("* mm", ""),
                  ("HD95_MISSED", "0.0"), ("0.0 if predicted.any() == truth.any() else HD95_MISSED",
                                           "HD95_MISSED")],
         "components": [("range(14, 27)", "(14, 16, 22)"),
                        ("while not torch.equal(root[a], " "root[b])", "for _ in range(1)"),
                        ("range(14, 27)", "range(14, 26)")],
         "lesion_dice": [("components(dilate(truth, reach)) * truth", "components(truth)"),
                         ("> smallest", "> 0"), ("scores += [0.0] * (int(found.max()) - "
                                                 "len(touched))", "pass"),
                         ("* math.prod(spacing)", "")],
         "mean_head": [("total + total.flip(-1)", "2 * total"),
                       ("count.flip(-1) + 1", "count.flip(-1)"),
                       ("(view * mask).sum(0)", "view.amax(0)")],
         "robust": [("values.median()", "values.mean()"), ("1.4826 *", ""), (".abs()", "")],
         "membership": [("- n * (n + 1) / 2", ""), ("(scores == value).sum() / 2", "0"),
                        ("its >= seen", "its <= seen")],
         "nearer_share": [("first > second", "first < second"),
                          ("min(map(len, groups))", "10 ** 9"), ("its >= seen", "its > 2")],}
# Per exercise with more than one natural way: another right answer.
RIGHT = {
    "cosine_alpha_bar": """
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        snr = (shift / torch.tan(u * math.pi / 2)) ** 2
        out = 1 / (1 + 1 / snr)
        out[0], out[-1] = 1, 0
        return out""",
    "signal_sigma": """
        level = alpha_bar.gather(0, t)[:, None, None, None]
        return (level ** 0.5).to(torch.float32), ((1 - level) ** 0.5).to(torch.float32)""",
    "v_target": "return -(sigma * x0 - signal * eps)",
    "split_v": """
        x0 = signal * x_t - sigma * v
        return x0, sigma * x_t + signal * v""",
    "min_snr_weight": """
        level = alpha_bar[t]
        if gamma == 0:
            return torch.ones(len(t), 1, 1, 1)
        snr = level / (1 - level).clamp(min=1e-30)
        return (snr.clamp(max=gamma) / (snr + 1)).clamp(min=floor).float().reshape(-1, 1, 1, 1)""",
    "one_hot": """
        out = torch.zeros(len(classes), n_classes, *classes.shape[1:])
        return out.scatter_(1, classes.unsqueeze(1), 1.0)""",
    "timesteps": "return torch.tensor([round(T * (1 - i / steps)) for i in range(steps + 1)])",
    "ddpm_step": "return ddim_step(before, after, 1.0)",
    "guided_v": """
        v_cond = denoiser(x_t, t, onehot, scalars)
        if scale == 1:
            return v_cond
        v_null = denoiser(x_t, t, onehot * 0, scalars)
        v = (1 - scale) * v_null + scale * v_cond
        brought_back = v * v_cond.flatten(1).std(1).view(-1, 1, 1, 1) / v.flatten(1).std(1).view(-1, 1, 1, 1)
        return rescale * brought_back + (1 - rescale) * v""",
    "regions_of": "return torch.stack([labels > 0, (labels == 1) | (labels == 3), labels == 3])",
    "dice": """
        if not predicted.any() and not truth.any():
            return 1.0
        both = (predicted & truth).sum().item()
        return 2 * both / (both + (predicted | truth).sum().item())""",
    "surface": """
        inside = F.avg_pool3d(mask.float()[None, None], 1)
        weight = torch.zeros(1, 1, 3, 3, 3)
        weight[0, 0, 1, 1], weight[0, 0, 1, :, 1], weight[0, 0, :, 1, 1] = 1, 1, 1
        return mask & (F.conv3d(inside, weight, padding=1)[0, 0] < 6.5)""",
    "membership": """
        wins = (members[:, None] > others[None]).mean() + 0.5 * (members[:, None] == others[None]).mean()
        both, rng, n = np.concatenate([members, others]), np.random.default_rng(seed), len(members)
        chance = []
        for _ in range(permutations):
            lot = rng.permutation(both)
            chance.append((lot[:n, None] > lot[None, n:]).mean() + 0.5 * (lot[:n, None] == lot[None, n:]).mean())
        return wins, (1 + sum(its >= wins - 1e-9 for its in chance)) / (1 + permutations)""",
}


def assignment_of(name):
    """a1 for an exercise of a1."""
    return next(assignment for assignment, names in ASSIGNMENTS.items() if name in names)


def marked(folder, name, text, *words):
    """Whether all tests of the exercise's assignment pass with `text` as the hand-in; it ends at
    the first that does not."""
    hand_in, assignment = Path(folder) / "hand_in.py", assignment_of(name)
    hand_in.write_text(text)
    (Path(folder) / "program.py").write_text("import sys, "
                                             "pytest\nsys.exit(int(pytest.main(sys.argv[1:])))\n")
    words = pytest_words(hand_in, assignment, "-x", "-m", f"{assignment} and not slow", *words)
    status, said = run_script(folder, Path(folder) / "program.py", *words,
                              environments=[{"OMP_NUM_THREADS": "1"}])
    assert status in (0, 1), said
    return status == 0


def text_of(name):
    """The library's source of an exercise, of a method that of its class, without docstrings."""
    node, lines = find(ast.parse(SOURCE), name.split(".")[0]), SOURCE.splitlines()
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part):
            said = part.body[0]
            lines[said.lineno - 1:said.end_lineno] = [""] * (said.end_lineno - said.lineno + 1)
    return "\n".join(lines[node.lineno - 1:node.end_lineno]) + "\n"


# One wrong answer of each exercise in the ordinary run; those of a5, which make 44 phantoms, only
# among the slow ones.
MUTANTS = [pytest.param(name, change, id=f"{name}-{i}",
                        marks=[pytest.mark.slow] if i or assignment_of(name) == "a5" else [])
           for name, changes in WRONG.items() for i, change in enumerate(changes)]


@pytest.mark.parametrize("name, change", MUTANTS)
def test_wrong_answers_are_caught(tmp_path, name, change):
    """A test of the assignment goes red."""
    source = text_of(name)
    assert change[0] in source, "the library has changed: this wrong answer must too"
    compile(source.replace(*change, 1), name, "exec")
    assert not marked(tmp_path, name, source.replace(*change,
                                                     1)), f"no test minds {change[1]!r} in {name}"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if assignment_of(name)
                                               == "a5" else []) for name in RIGHT])
def test_other_right_answers_pass(tmp_path, name):
    """Tests ask for what the docstring promises, not for the library's way of doing it."""
    head = text_of(name).split(":\n")[0]
    body = RIGHT[name] if "\n" in RIGHT[name] else "\n        " + RIGHT[name]
    assert marked(tmp_path, name, f"{head}:{body}\n".replace("\n        ", "\n    "))


def test_every_exercise_has_wrong_answers():
    """Three at least for each that is blanked."""
    everything = [name for names in ASSIGNMENTS.values() for name in names]
    assert sorted(WRONG) == sorted(everything) and set(RIGHT) <= set(everything)
    assert all(len(set(changes)) >= 3 for changes in WRONG.values())


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_blank_is_the_library_without_answers(tmp_path, assignment):
    """It compiles, every other function is as it was, and each blanked one is its docstring and a
    raise."""
    text = blank(SOURCE, assignment)
    tree, original = ast.parse(text), ast.parse(SOURCE)
    for name in ASSIGNMENTS[assignment]:
        *doc, last = find(tree, name).body
        assert isinstance(last, ast.Raise) and len(doc) <= 1, name
        find(original, name).body[len(doc):] = [last]
    assert ast.dump(tree) == ast.dump(original)


@pytest.mark.parametrize("assignment", ["a1", "a2", "a3", "a4"])
def test_nothing_done_is_no_mark(tmp_path, assignment):
    """The blank itself passes no test of its assignment; so no test is a present."""
    (tmp_path / "nothing.py").write_text(blank(SOURCE, assignment))
    row = grade(tmp_path / "nothing.py", assignment)
    assert row["passed"] == 0 < row["of"] and f"NotImplementedError: {assignment}" in row[
        "why"], row


HIDDEN = """
import pytest, brainsyn as bs

@pytest.mark.a1
def test_hidden():
    assert bs.v_target(1.0, 0.0, 0.6, 0.8) == -0.8
"""


def test_a_folder_is_graded_whatever_is_in_it(tmp_path):
    """A right answer, one that raises, one that never ends, one that ends the process, one that is
    not Python, one of eight functions: a row for each, and why. Hidden tests count."""
    rows = {}
    (tmp_path / "hidden.py").write_text(HIDDEN)
    for folder, seconds, texts in (("ends", 300, {"right": SOURCE, "raises": "1 / 0",
                                                  "gone": "import os; os._exit(0)",
                                                  "words": "I have not done it",
                                                  "one": text_of("v_target")}),
                                   ("never", 5, {"endless": "while True: pass"})):
        (tmp_path / folder).mkdir()
        for name, text in texts.items():
            (tmp_path / folder / f"{name}.py").write_text(text)
        done = subprocess.run([sys.executable, LIBRARY.parent / "tests/grade.py", "a1", tmp_path
                               / folder, "--seconds", str(seconds), "--hidden", tmp_path
                               / "hidden.py", "--out", tmp_path / "marks.csv"], text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        rows |= {row["file"]: row for row in csv.DictReader(open(tmp_path / "marks.csv"))}
    assert len(rows) == 6 and rows["right.py"]["mark"] == "100" and int(
        rows["one.py"]["mark"]) < 50, rows
    assert int(rows["right.py"]["of"]) > 10 and {rows[f"{name}.py"]["mark"]
                                                 for name in ("raises", "endless", "gone",
                                                              "words")} == {"0"}
    for name, words in (("raises", "does not run: ZeroDivisionError"),
                        ("endless", "did not end within 5"), ("gone", "ended the process"),
                        ("words", "does not run: SyntaxError")):
        assert words in rows[f"{name}.py"]["why"], rows[f"{name}.py"]


def test_the_exercise_that_differs_by_student(tmp_path):
    """The right phi passes, another student's does not; without a number the exercise is not asked
    for."""
    right = """
def your_target(x0, eps, signal, sigma):
    v = signal * eps - sigma * x0
    return math.cos(PHI) * v - math.sin(PHI) * (signal * x0 + sigma * eps)


def split_your_target(x_t, y, signal, sigma):
    v = (y + math.sin(PHI) * x_t) / math.cos(PHI)
    return signal * x_t - sigma * v, sigma * x_t + signal * v
"""
    assert marked(tmp_path, "v_target", right.replace("PHI", repr(variant_angle("1234567"))),
                  "--student", "1234567")
    assert not marked(tmp_path, "v_target", right.replace("PHI", repr(variant_angle("7654321"))),
                      "--student", "1234567")
    assert not marked(tmp_path, "v_target", right.replace("PHI", "0.0"), "--student", "1234567")
    assert f"phi = {variant_angle('1234567'):.6f}" in VARIANT.format(phi=variant_angle("1234567"))
