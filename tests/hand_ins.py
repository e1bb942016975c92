"""A student's functions in the place of the library's: pytest --impl=student.py -m a1.

A plugin, which conftest.py loads, so that it serves test files of other folders too. What a hand-in
is: see blank.py.
"""
import inspect
import re

import pytest

import blank

HAND_IN = {}    # {exercise: function or class}, of --impl


def pytest_addoption(parser):
    """Two options."""
    parser.addoption("--impl", help="a hand-in: tests run with its functions in the place of the "
                     "library's, one function at a time; tests of other functions do not run")
    parser.addoption("--student", help="student number, for the exercise that differs by it")


def pytest_configure(config):
    """Read the hand-in."""
    path = config.getoption("--impl")
    if not path:
        return
    try:
        HAND_IN.update(blank.read_hand_in(path))
    except (Exception, SystemExit) as error:
        raise pytest.UsageError(f"{path} does not run: {type(error).__name__}: {error}") from error


def exercises_of(test):
    """The exercises that a test marks: those that its marker names, @pytest.mark.a1("v_target"),
    or, where the marker names none, those that the test calls."""
    found = []
    for mark in test.iter_markers():
        if mark.name not in blank.ASSIGNMENTS:
            continue
        exercises = blank.ASSIGNMENTS[mark.name] + (blank.VARIANTS if mark.name == "a1" else [])
        called = set(re.findall(r"\.(\w+)", inspect.getsource(test.function)))
        names = mark.args or [name for name in exercises if name.split(".")[0] in called]
        unclear = not names or set(names) - set(exercises)
        if unclear and mark.name in test.config.getoption("-m"):
            raise pytest.UsageError(
                f"{test.nodeid} marks {list(names) or 'no exercise'} of {mark.name}; name those "
                f'that it marks, as in @pytest.mark.{mark.name}("{exercises[0]}")')
        found += names
    return found


def pytest_generate_tests(metafunc):
    """With a hand-in, a test runs once for each exercise that it marks."""
    names = exercises_of(metafunc.definition) if metafunc.config.getoption("--impl") else []
    if names:
        metafunc.parametrize("in_place", names, indirect=True)


def exercise_of(item):
    """The exercise that this run of a test marks, or None."""
    return item.callspec.params.get("in_place") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config, items):
    """With a hand-in, only tests of its functions run, those first that need few fixtures: phantoms
    take time."""
    if config.getoption("--impl"):
        others = [item for item in items if exercise_of(item) not in HAND_IN]
        items[:] = [item for item in items if exercise_of(item) in HAND_IN]
        items.sort(key=lambda item: len(item.fixturenames))
        config.hook.pytest_deselected(items=others)
        for item in items:
            item.user_properties.append(("exercise", exercise_of(item)))


@pytest.fixture(autouse=True)
def in_place(request, monkeypatch):
    """The hand-in's version of one function, in the place of the library's."""
    name = getattr(request, "param", None)
    if name:
        monkeypatch.setattr(blank.module_of(name), name.split(".")[0], HAND_IN[name], raising=False)


def pytest_terminal_summary(terminalreporter, config):
    """How many tests of each function passed."""
    if not HAND_IN:
        return
    terminalreporter.section("tests passed")
    results = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            name = dict(getattr(report, "user_properties", ())).get("exercise")
            results.setdefault(name, []).append(outcome == "passed")
    for name in HAND_IN:
        if name in results:
            passed = results[name]
            terminalreporter.write_line(f"{name:<20} {sum(passed):3d} of {len(passed)}")
    wanted = re.findall(r"\ba\d\b", config.getoption("-m"))
    lacking = [name for assignment in wanted for name in blank.ASSIGNMENTS.get(assignment, [])
               if name not in HAND_IN]
    if lacking:
        terminalreporter.write_line(f"not in {config.getoption('--impl')}: {', '.join(lacking)}")
