"""The tests that mark assignments, tested: wrong answers that students write must turn one red,
another right answer none. Each is put in place as a hand-in is, see blank.py.
"""
import ast
import csv
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import blank
import grade
import nursery

ROOT = blank.ROOT
EXERCISES = sum(blank.ASSIGNMENTS.values(), [])

# Per exercise: (what stands in the library's answer, or in the other right one below; what a
# student writes instead). Both as ast.unparse writes them: no comments, no line breaks in an
# expression.
WRONG = {
    "cosine_alpha_bar": [
        ("signal ** 2 / (signal ** 2 + sigma ** 2)", "signal / (signal + sigma)"),
        ("alpha_bar[0], alpha_bar[-1] = (1.0, 0.0)", "alpha_bar = alpha_bar.clamp(1e-4)"),
        ("(math.pi / 2)", "math.pi"),
        ("shift * torch.cos(angle)", "shift ** 2 * torch.cos(angle)"),
        ("torch.float64", "torch.float32")],
    "signal_sigma": [
        ("level.sqrt()", "level"),
        ("(1 - level).sqrt()", "1 - level.sqrt()"),
        ("view(-1, 1, 1, 1)", "view(-1, 1)"),
        ("alpha_bar[t]", "alpha_bar[t - 1]")],
    "add_noise": [
        ("signal * x0 + sigma * eps", "sigma * x0 + signal * eps"),
        ("signal * x0 + sigma * eps", "signal * x0 - sigma * eps"),
        ("signal * x0 +", "x0 +")],
    "v_target": [
        ("signal * eps - sigma * x0", "signal * eps + sigma * x0"),
        ("signal * eps - sigma * x0", "sigma * x0 - signal * eps"),
        ("signal * eps - sigma * x0", "sigma * eps - signal * x0")],
    "split_v": [
        ("signal * x_t - sigma * v", "(x_t - sigma * v) / signal"),
        ("signal * x_t - sigma * v", "signal * x_t + sigma * v"),
        ("sigma * x_t + signal * v", "sigma * x_t - signal * v"),
        ("(signal * x_t - sigma * v, sigma * x_t + signal * v)",
         "(sigma * x_t + signal * v, signal * x_t - sigma * v)")],
    "prior_error": [
        (".sqrt()", ""),
        ("(std * signal) ** 2", "signal ** 2"),
        ("std / (", "1 / (")],
    "precondition": [
        ("(1 - std ** 2)", "(1 + std ** 2)"),
        ("* x_t - mean)", "* x_t + mean)"),
        ("guess = sigma *", "guess = signal *"),
        ("prior_error(signal, sigma, std) * out", "out")],
    "one_hot": [
        (".movedim(-1, 1)", ".movedim(-1, 2)"),
        ("F.one_hot(classes, n_classes)",
         "F.one_hot(classes, n_classes)[..., [1, 0, *range(2, n_classes)]]"),
        (".float()", ".float() * 0")],
    "sinusoid": [
        ("phase.sin(), phase.cos()", "phase.sin(), phase.sin()"),
        ("-math.log(top)", "math.log(top)"),
        ("value.float()", "(value.float() * 0)")],
    "ResBlock.forward": [
        ("self.skip(x) +", ""),
        ("* (1 + scale)", "* scale"),
        ("+ shift", ""),
        ("self.norm2(h)", "h"),
        ("self.conv2(F.silu(h))", "self.conv2(h)")],
    "Attention.forward": [
        ("return x +", "return"),
        ("unbind(1)", "unbind(2)"),
        ("(q, k, v)", "(q, q, v)"),
        ("self.norm(x)", "x"),
        (".transpose(-1, -2).reshape(b, c, h, w)", ".reshape(b, c, h, w)")],
    "orthogonal": [
        ("matrices.norm(dim=(1, 2), keepdim=True)", "matrices.norm()"),
        ("orthogonal(matrices.mT, steps).mT", "orthogonal(matrices.mT, steps)"),
        ("3.4445 *", "1.0 *"),
        ("range(steps)", "range(1)")],
    "EMA.advanced": [
        ("** count", ""),
        ("min(self.decay, (1 + step) / (10 + step))", "self.decay"),
        ("torch.lerp(p.float(), self.weights[name], keep)",
         "torch.lerp(self.weights[name], p.float(), keep)")],
    "timesteps": [
        (".round().long()", ".long()"),
        ("steps + 1", "steps"),
        ("1, 0, steps", "0, 1, steps"),
        ("atan2(noise, 1 - noise)", "atan2(1 - noise, noise)")],
    "ddpm_step": [
        ("math.sqrt(ratio) * (1 - after)", "ratio * (1 - after)"),
        ("math.sqrt(after) * (1 - ratio)", "math.sqrt(after) * ratio"),
        ("math.sqrt((1 - ratio) * (1 - after) / (1 - before))",
         "(1 - ratio) * (1 - after) / (1 - before)"),
        ("math.sqrt((1 - ratio) * (1 - after) / (1 - before))", "math.sqrt(1 - ratio)")],
    "ddim_step": [
        ("1 - after - d * d", "1 - after"),
        ("math.sqrt(after) - along_eps * math.sqrt(before)", "math.sqrt(after)"),
        ("d = eta *", "d = 0 *"),
        ("/ math.sqrt(1 - before)", "")],
    "dpmpp_step": [
        ("1 + 0.5 / r", "1 - 0.5 / r"),
        ("-k * 0.5 / r", "k * 0.5 / r"),
        ("earlier is None or ", ""),
        ("/ (half_log_snr[2] - half_log_snr[1])", "* (half_log_snr[2] - half_log_snr[1])"),
        ("k * (1 + 0.5 / r), -k * 0.5 / r", "k, 0.0")],
    "sample": [
        ("clamp(-1, 1)", "clamp(0, 1)"),
        ("visited[i]", "visited[i + 1]"),
        ("x0_earlier = x0_hat", "x0_earlier = x"),
        ("if clip:", "if False:"),
        ("x + d * noise(i)", "x"),
        ("noise(i)", "noise(i + 1)")],
    "guided_v": [
        ("null[:, 2:] = math.nan", "null[:, 1:] = 0"),
        ("null[:, 2:] = math.nan", "pass"),
        ("null[:, 2:] = math.nan", "null[:] = math.nan"),
        ("v_cond.flatten(1).std(1).view(-1, 1, 1, 1) / v.flatten(1).std(1).view(-1, 1, 1, 1)",
         "v_cond.std() / v.std()"),
        ("(1 - scale) * v_null + scale * v_cond", "v_cond + scale * (v_cond - v_null)"),
        ("onehot * 0", "onehot"),
        ("if scale == 1:", "if False:"),
        ("rescale * spread", "rescale / spread")],
    "regions_of": [
        ("labels == k", "labels >= k"),
        ("REGIONS.values()", "((1,), (2,), (3,))"),
        ("REGIONS.values()", "((1, 2, 3), (1, 2), (3,))")],
    "labels_of": [
        ("members[0]", "members[-1]"),
        ("argmax(0)", "argmax(-1)"),
        ("zip(probability, REGIONS.values())",
         "zip(probability.flip(0), list(REGIONS.values())[::-1])")],
    "dice_loss": [
        ("(2 * shared", "(shared"),
        ("1 - (", "("),
        ("/ (total + smooth)", "/ total"),
        ("(0, 2, 3)", "(2, 3)")],
    "dice": [
        ("2 * int(", "int("),
        ("if total else 1.0", "if total else 0.0"),
        ("predicted & truth", "predicted | truth"),
        ("/ total if total else 1.0", "/ (total + 1)")],
    "sensitivity": [
        ("/ int(truth.sum())", "/ int(predicted.sum())"),
        ("math.nan", "1.0"),
        ("predicted & truth", "predicted")],
    "surface": [
        ("mask & ~core", "core"),
        ("inside < 6.5", "inside < 5.5"),
        ("range(3)", "range(2)")],
    "hd95": [
        ("0.95", "0.5"),
        ("return max(", "return min("),
        ("* mm", ""),
        ("HD95_MISSED", "0.0"),
        ("0.0 if predicted.any() == truth.any() else HD95_MISSED", "HD95_MISSED")],
    "components": [
        ("range(14, 27)", "(14, 16, 22)"),
        ("while not torch.equal(root[a], root[b])", "for _ in range(1)"),
        ("range(14, 27)", "range(14, 26)")],
    "lesion_dice": [
        ("dilate(truth, reach)", "truth"),
        ("> smallest", "> 0"),
        ("scores += [0.0] * (int(found.max()) - len(touched))", "pass"),
        ("* math.prod(spacing)", "")],
    "mean_head": [
        ("total + total.flip(-1)", "2 * total"),
        ("count.flip(-1) + 1", "count.flip(-1)"),
        ("(view * mask).sum(0)", "view.amax(0)")],
    "robust": [
        ("values.median()", "values.mean()"),
        ("1.4826 *", ""),
        (".abs()", "")],
    "membership": [
        ("- n * (n + 1) / 2", ""),
        ("(scores == value).sum() / 2", "0"),
        (">= seen", "<= seen")],
    "nearer_share": [
        ("first > second", "first < second"),
        ("min(map(len, groups))", "10 ** 9"),
        (">= seen", "> 2")],
}
# Per exercise with more than one natural way: the body of another right answer.
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
    "v_target": """
        return -(sigma * x0 - signal * eps)""",
    "split_v": """
        x0 = signal * x_t - sigma * v
        return x0, sigma * x_t + signal * v""",
    "one_hot": """
        out = torch.zeros(len(classes), n_classes, *classes.shape[1:])
        return out.scatter_(1, classes.unsqueeze(1), 1.0)""",
    "timesteps": """
        share = [1 - i / steps for i in range(steps + 1)]
        share = [math.atan2(x, 1 - x) / math.pi * 2 for x in share]
        return torch.tensor([round(T * x) for x in share])""",
    "ddpm_step": """
        return ddim_step(before, after, 1.0)""",
    "guided_v": """
        v_cond = denoiser(x_t, t, onehot, scalars)
        if scale == 1:
            return v_cond
        null = scalars.clone()
        null[:, 2:] = math.nan
        v_null = denoiser(x_t, t, onehot * 0, null)
        v = (1 - scale) * v_null + scale * v_cond
        spread = v_cond.flatten(1).std(1).view(-1, 1, 1, 1) / v.flatten(1).std(1).view(-1, 1, 1, 1)
        return rescale * spread * v + (1 - rescale) * v""",
    "regions_of": """
        return torch.stack([labels > 0, (labels == 1) | (labels == 3), labels == 3])""",
    "dice": """
        if not predicted.any() and not truth.any():
            return 1.0
        shared = (predicted & truth).sum().item()
        return 2 * shared / (shared + (predicted | truth).sum().item())""",
    "surface": """
        weight = torch.zeros(1, 1, 3, 3, 3)
        weight[0, 0, 1, 1], weight[0, 0, 1, :, 1], weight[0, 0, :, 1, 1] = 1, 1, 1
        inside = F.conv3d(mask.float()[None, None], weight, padding=1)[0, 0]
        return mask & (inside < 6.5)""",
    "membership": """
        scores, n = np.concatenate([members, others]), len(members)
        ranks = np.array([(scores < value).sum() + (scores == value).sum() / 2 + 0.5
                          for value in scores])

        def auc(ranks):
            return (ranks[:n].sum() - n * (n + 1) / 2) / (n * len(others))

        rng, seen = np.random.default_rng(seed), auc(ranks)
        by_lot = [auc(rng.permutation(ranks)) for _ in range(permutations)]
        return seen, (1 + sum(value >= seen - 1e-9 for value in by_lot)) / (1 + permutations)""",
}
# What runs by default, one of each assignment; all others are slow.
DEFAULT = {"guided_v", "v_target", "one_hot", "dice", "membership"}


def assignment_of(name):
    """a1 for an exercise of a1."""
    return next(assignment for assignment, names in blank.ASSIGNMENTS.items() if name in names)


def library_answer(name):
    """The library's source of an exercise, of a method that of its class, as ast.unparse writes it,
    without docstrings."""
    outer = name.split(".")[0]
    node = blank.find(ast.parse(blank.home(name).read_text()), outer)
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part):
            del part.body[0]
    return ast.unparse(node)


def other_right_answer(name):
    """The same signature with the body that stands in RIGHT."""
    signature = re.search(r"^def .*:$", library_answer(name), re.M).group()
    body = textwrap.indent(inspect.cleandoc(RIGHT[name]), "    ")
    return ast.unparse(ast.parse(f"{signature}\n{body}"))


def wrong_answer(name, change):
    """An answer with one change."""
    answers = [library_answer(name)] + ([other_right_answer(name)] if name in RIGHT else [])
    fitting = [answer for answer in answers if change[0] in answer]
    assert fitting, f"{name}: no right answer has {change[0]!r}; this wrong one must change too"
    return fitting[0].replace(*change, 1)


def passes(folder, assignment, text, *words):
    """Whether all tests of the functions that `text` defines pass with it as the hand-in. What
    pytest does to explain a failure, which takes longer than the tests, is left out."""
    (folder / "hand_in.py").write_text(text)
    program = folder / "program.py"
    program.write_text("import sys, pytest\nsys.exit(int(pytest.main(sys.argv[1:])))\n")
    words = grade.pytest_words(folder / "hand_in.py", assignment, "-m",
                               f"{assignment} and not slow", "--assert=plain",
                               "-p", "no:unraisableexception", *words)
    status, said = nursery.run_script(folder, program, *words,
                                      environments=[{"OMP_NUM_THREADS": "1"}])
    assert status in (0, 1), said
    return status == 0


def slow_unless(is_default):
    """The marks of a parameter."""
    return [] if is_default else [pytest.mark.slow]


MUTANTS = [pytest.param(name, change, id=f"{name}-{i}",
                        marks=slow_unless(name in DEFAULT and i == 0))
           for name, changes in WRONG.items() for i, change in enumerate(changes)]


@pytest.mark.parametrize("name, change", MUTANTS)
def test_wrong_answers_are_caught(tmp_path, name, change):
    """A test of the assignment goes red."""
    assert not passes(tmp_path, assignment_of(name), wrong_answer(name, change), "-x"), (
        f"no test minds {change[1]!r} in {name}")


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_unless(name == "v_target"))
                                  for name in RIGHT])
def test_other_right_answers_pass(tmp_path, name):
    """Tests ask for what the docstring promises, not for the library's way of doing it."""
    assert passes(tmp_path, assignment_of(name), other_right_answer(name))


@pytest.mark.parametrize("name", EXERCISES)
def test_every_exercise_has_wrong_answers(name):
    """Three at least, each of which is Python and another function than the right one."""
    wrong = {ast.unparse(ast.parse(wrong_answer(name, change))) for change in WRONG[name]}
    assert len(wrong) == len(WRONG[name]) >= 3
    assert library_answer(name) not in wrong
    assert name not in RIGHT or other_right_answer(name) not in wrong


def test_no_exercise_is_made_up():
    """Tables name exercises, and one of each assignment is tried by default."""
    assert set(WRONG) == set(EXERCISES) and set(RIGHT) <= set(EXERCISES)
    assert DEFAULT <= set(RIGHT)
    assert sorted(map(assignment_of, DEFAULT)) == sorted(blank.ASSIGNMENTS)


@pytest.mark.parametrize("assignment", blank.ASSIGNMENTS)
def test_a_blank_is_signatures_docstrings_and_what_is_needed(tmp_path, assignment):
    """The file runs as it is; each exercise is the library's but for its body, a raise; and every
    name that the library's version uses is there."""
    text = blank.blank(assignment)
    tree = ast.parse(text)
    for name in blank.ASSIGNMENTS[assignment]:
        library = ast.parse(blank.home(name).read_text())
        for exercise in blank.ASSIGNMENTS[assignment]:
            if exercise.split(".")[0] == name.split(".")[0]:
                body = blank.find(library, exercise).body
                body[isinstance(body[0], ast.Expr):] = blank.find(tree, exercise).body[-1:]
                assert isinstance(body[-1], ast.Raise) and len(body) <= 2, exercise
        outer = name.split(".")[0]
        assert ast.dump(blank.find(library, outer)) == ast.dump(blank.find(tree, outer))
        assert ast.get_docstring(blank.find(tree, outer))
    used = {node.id for name in blank.ASSIGNMENTS[assignment]
            for node in ast.walk(ast.parse(library_answer(name))) if isinstance(node, ast.Name)}
    modules = {blank.module_of(name) for name in blank.ASSIGNMENTS[assignment]}
    used &= {name for module in modules for name in vars(module)}
    check = f"\nmissing = set({sorted(used)!r}) - set(vars())\nassert not missing, missing\n"
    (tmp_path / "student.py").write_text(text + check)
    status, said = nursery.run_script(tmp_path, tmp_path / "student.py")
    assert status == 0, said


def test_work_is_not_overwritten(tmp_path):
    """A student who asks for the assignment again keeps what is written; what is printed and what
    is written to a file are the same text, in UTF-8."""
    words = [sys.executable, ROOT / "tests/blank.py", "a2"]
    printed = subprocess.run(words, capture_output=True, check=True).stdout.decode()
    words += ["--out", "student.py"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "student.py").read_text(encoding="utf-8") == printed.replace("\r\n", "\n")
    (tmp_path / "student.py").write_text("my work")
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "there already" in again.stderr
    assert (tmp_path / "student.py").read_text() == "my work"


@pytest.mark.parametrize("assignment", [pytest.param(name, marks=slow_unless(name == "a1"))
                                        for name in blank.ASSIGNMENTS])
def test_nothing_done_is_no_mark(tmp_path, assignment):
    """The blank itself passes no test of any of its functions; so no test is a present, and every
    test uses each function that it marks."""
    report = tmp_path / "report.xml"
    assert not passes(tmp_path, assignment, blank.blank(assignment), f"--junitxml={report}")
    results = grade.read_report(report)
    assert [result for result in results if result[2] is None] == [], "passed"
    assert {exercise for exercise, _, _ in results} == set(blank.ASSIGNMENTS[assignment])
    assert grade.first_reasons(results).count("not written yet") >= 4


HIDDEN = inspect.cleandoc("""
    import pytest, brainsyn as bs

    @pytest.mark.a1
    def test_hidden():
        assert bs.v_target(1.0, 0.0, 0.6, 0.8) == -0.8, "hidden words"
    """)


@pytest.mark.slow
def test_a_folder_is_graded_whatever_is_in_it(tmp_path):
    """A right answer, one without one of its functions, one function alone, which is wrong, one
    that raises, one that never ends, one that ends the process, one that is not Python: a row for
    each, and why. A function that lacks or is wrong costs its own share alone. Hidden tests
    count."""
    names = blank.ASSIGNMENTS["a1"]
    answers = {name: library_answer(name) for name in names}
    most = "\n\n".join(answers[name] for name in names if name != "signal_sigma")
    texts = {"ends": {"right": (ROOT / "brainsyn.py").read_text(), "most": most,
                      "wrong": wrong_answer("v_target", WRONG["v_target"][0]),
                      "raises": "1 / 0", "gone": "import os; os._exit(0)",
                      "words": "I have not done it"},
             "never": {"endless": "while True: pass"}}
    rows = {}
    (tmp_path / "hidden.py").write_text(HIDDEN)
    for folder, seconds in (("ends", 300), ("never", 5)):
        (tmp_path / folder).mkdir()
        for name, text in texts[folder].items():
            (tmp_path / folder / f"{name}.py").write_text(text)
        done = subprocess.run([sys.executable, ROOT / "tests/grade.py", "a1", tmp_path / folder,
                               "--seconds", str(seconds), "--hidden", tmp_path / "hidden.py",
                               "--out", tmp_path / "marks.csv"], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        for row in csv.DictReader(open(tmp_path / "marks.csv")):
            rows[row["file"][:-3]] = row
    marks = {name: int(row["mark"]) for name, row in rows.items()}
    assert marks["right"] == 100 and rows["right"]["why"] == "", rows["right"]
    assert marks["most"] == round(100 * (1 - 1 / len(names))), rows["most"]
    assert rows["most"]["why"] == "signal_sigma: not in the file"
    assert [name for name in names if rows["most"][name] != "100"] == ["signal_sigma"]
    assert int(rows["wrong"]["v_target"]) < 40 and marks["wrong"] < 40 / 7, rows["wrong"]
    assert "hidden words" in rows["wrong"]["why"] and "look at the signs" in rows["wrong"]["why"]
    assert {marks[name] for name in ("raises", "endless", "gone", "words")} == {0}
    for name, words in (("raises", "does not run: ZeroDivisionError"),
                        ("endless", "did not end within 5 s"), ("gone", "ended the process"),
                        ("words", "does not run: SyntaxError")):
        assert words in rows[name]["why"], rows[name]


@pytest.mark.slow
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
    angle, another = blank.variant_angle("1234567"), blank.variant_angle("7654321")
    for phi, is_right in ((angle, True), (another, False), (0.0, False)):
        text = right.replace("PHI", repr(phi))
        assert passes(tmp_path, "a1", text, "--student", "1234567") == is_right, phi
    assert f"phi = {angle:.6f}" in blank.blank("a1", "1234567")


def course_commands():
    """The lines of the code blocks of TEACHING.md."""
    text = (ROOT / "notebooks/TEACHING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.programs
def test_the_commands_of_the_course_do_what_they_say(tmp_path):
    """Every line of TEACHING.md as it stands there, in a copy of the repository: the assignment is
    written, tests run with it, also where the file lies there, and marks are given."""
    ignore = shutil.ignore_patterns("__pycache__", "*.ipynb", "pictures", "quality")
    for name in ("tests", "kit", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for path in ROOT.glob("[!.]*.*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "HANDINS").mkdir()
    (tmp_path / "HANDINS/1234567.py").write_text(library_answer("v_target"))
    (tmp_path / "my_tests.py").write_text(HIDDEN)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    said = {}
    for line in course_commands():
        done = subprocess.run(line, shell=True, cwd=tmp_path, text=True, capture_output=True,
                              env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"})
        said[line] = done.stdout + done.stderr
        # nothing is done yet: pytest fails with 1, not with 2 or 4, which stand for wrong words
        assert done.returncode == (1 if line.startswith("pytest") else 0), f"{line}\n{said[line]}"
    tested = [text for line, text in said.items() if line.startswith("pytest")]
    assert len(tested) >= 2 and all("NotImplementedError: a1: v_target" in text for text in tested)
    assert any("your_target" in text for text in tested)
    assert len(list(csv.DictReader(open(tmp_path / "marks.csv")))) == 1
