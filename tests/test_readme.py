"""Every command of the README as it stands there, shortened by its own flags, in the order of the
README."""
import re
import shlex
from pathlib import Path

import pytest

import brainsyn as bs
from kit import phantoms
from nursery import run_script

ROOT = Path(bs.__file__).parent
README = (ROOT / "README.md").read_text()
CASE = "runs/phantoms/A/BraTS-PHA-00000-000"
# What makes a command take seconds: flags for all commands of a script.
SHORT = {
    "brainsyn.py": "",
    "train_ddpm.py": "--phantoms 10 --resolution 16 --width 16 --mults 1 --batch 4 --steps 2 "
                     "--relatives 8 --sample-every 0",
    "train_seg.py": "--phantoms 10 --resolution 32 --batch 4 --steps 2",
    "sample.py": "--count 2 --steps 2 --phantoms 10",
}
# Commands that other tests run: several processes and XLA in test_devices.py, the study in
# test_seg_scripts.py, the tests themselves.
ELSEWHERE = ("pip ", "pytest", "torchrun ", "PJRT_DEVICE=CPU ", "python train_ddpm.py --device xla",
             "python train_seg.py --study")


def readme_commands():
    """[(command, files that the README promises)]: of the table of commands, then those that stand
    elsewhere in the README."""
    rows = re.findall(r"^\| `(python [^`]+)` \|[^|]*\| (.*) \|$", README, re.M)
    commands = {command: re.findall(r"`([\w/]+\.(?:png|json))`", text) for command, text in rows}
    for block in re.findall(r"^```\n(.*?)^```", README, re.M | re.S):
        for line in block.splitlines():
            if re.match(r"python|pip|pytest|torchrun", line):
                commands.setdefault(line, [])
    for line in re.findall(r"`((?:\w+=\w+ )?(?:python|pip|pytest|torchrun) [^`]+)`", README):
        commands.setdefault(line, [])
    return [pytest.param(command, promised, id=command[:60])
            for command, promised in commands.items() if not command.startswith(ELSEWHERE)]


def shortened(command):
    """The command with DIR named and flags added that make it short -> script, words."""
    _, script, *words = shlex.split(command)
    words = [{"DIR": "runs/phantoms/A"}.get(word, word) for word in words]
    if "--scan" in words:
        words[words.index("--scan") + 1] = CASE
    return script, words + SHORT[script].split()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with ten small phantoms where the commands look for them."""
    folder = tmp_path_factory.mktemp("readme")
    phantoms.make_phantoms(folder / "runs/phantoms/A", 10, scale=2)
    return folder


@pytest.mark.parametrize("command, promised", readme_commands())
def test_a_readme_command_does_what_it_says(work, command, promised):
    """It ends well (an audit that finds a leak: status 1) and writes the files the table names."""
    for path in promised:
        (work / path).unlink(missing_ok=True)
    script, words = shortened(command)
    status, text = run_script(work, script, *words)
    assert status == 0 or "--audit" in command and status == 1 and "verdict: leak" in text, text
    assert all((work / path).exists() for path in promised), text


def test_the_readme_is_one_page():
    """A reader finishes it: 200 lines, 12 kB, no line over 400 characters."""
    lines = README.splitlines()
    assert len(lines) <= 200 and len(README.encode()) <= 12_000 and max(map(len, lines)) <= 400


def test_links_of_the_pages_lead_somewhere():
    """Pictures and other pages, from the folder of the page."""
    for page in (ROOT / "README.md", *(ROOT / "notebooks").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link} is not there"


def test_all_flags_of_the_pages_exist():
    """Every `python ...` line of the README and of the pages beside the notebooks names a script
    and flags that it has."""
    pages = [README, *(path.read_text() for path in (ROOT / "notebooks").glob("*.md"))]
    lines = [line for page in pages for line in re.findall(r"python [\w/]+\.py[^`\n]*", page)]
    assert len(lines) >= 40
    options = (ROOT / "kit/options.py").read_text()
    for line in lines:
        script, *words = shlex.split(line.removeprefix("python "))
        text = (ROOT / script).read_text()
        text += (ROOT / "kit/desk.py").read_text() if script == "brainsyn.py" else options
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert f'"{flag}"' in text, f"{line}: {script} has no {flag}"
