"""Files that are whole or not there: atomic writes, locks, CSV and JSON, signals, and how a script
ends.
"""
import csv
import hashlib
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import brainsyn as bs
from kit import devices

try:
    import fcntl                                # file locks; not on Windows
except ImportError:
    fcntl = None


def run_script(main):
    """Call main() and, where XLA was used, print what it did. A BadInput or an OSError is printed
    as one sentence and ends the process with status 2; Ctrl-C with 130."""
    try:
        main()
        devices.xla_report()
    except KeyboardInterrupt:
        sys.exit(130)
    except (bs.BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def replace_file(path, write):
    """Write a file such that, whatever happens, it is either the old one or the whole new one.

    write: function that writes to the path it is given, a temporary one in the same folder.
    A crash leaves at most a file ending in .tmp behind, never half a file under the real name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Write a folder's list of names to disk, so that new names survive a power cut."""
    if hasattr(os, "O_DIRECTORY"):              # not on Windows, which syncs folders by itself
        handle = os.open(folder, os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def file_hash(path):
    """sha256 of a file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextmanager
def sole_writer(folder):
    """Lock a folder, made if need be, for this process while the body runs: BadInput if another
    process holds the lock.

    The lock is the operating system's and ends with the process, however that ends. Temporary
    files of writers that were killed are removed. A folder that was made here and is still empty
    is removed at the end. Of several processes of one run the first one holds the lock.
    """
    folder = Path(folder)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not fcntl or not devices.first_process():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise bs.BadInput(f"{folder}: another process writes there; use another --out") from error
    except OSError:                             # a file system without locks
        pass
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    try:
        yield
    finally:
        os.close(handle)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def attempt(what, write):
    """Call write(); if the disk refuses, print a note and go on. For files that a run can do
    without. what: the file, in words."""
    try:
        write()
    except OSError as error:
        print(f"note: {what} could not be written ({error}); training goes on", flush=True)


def catch_signals():
    """Note SIGINT (Ctrl-C) and SIGTERM in a list instead of ending the process, so that a step can
    be finished and saved; a second signal ends the process at once. Returns the list, which fills
    when signals come."""
    caught = []

    def note(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


def write_csv(path, rows):
    """Write dicts with the same keys as a CSV file; floats with six digits."""
    def write(temporary):
        with open(temporary, "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value
                                 for key, value in row.items()})

    replace_file(path, write)


def write_json(path, facts):
    """Write a dict as a JSON file; NaN and infinity, which JSON lacks, become null."""
    facts = json.loads(json.dumps(facts), parse_constant=lambda name: None)
    text = json.dumps(facts, indent=1) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))
