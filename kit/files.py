"""Files that are whole or not there: atomic writes, locks, CSV and JSON, signals, and how a script
ends.
"""
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import brainsyn as bs
from kit import devices

try:
    import fcntl                                # file locks; not on Windows
except ImportError:
    fcntl = None


def run_script(main):
    """Call main() and, where XLA was used, print what it did. A BadInput or an OSError is printed
    as one sentence and ends the process with status 2; Ctrl-C with 130. Of several processes the
    first one that fails says why; the others end with status 2."""
    os.environ["MPLBACKEND"] = "Agg"            # a notebook's draws nowhere else
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")        # "±" on a terminal that has ASCII alone
    try:
        main()
        devices.xla_report()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not devices.first_to_fail():
            sys.exit(2)
        if not isinstance(error, (bs.BadInput, OSError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def replace_file(path, write):
    """Write a file such that, whatever happens, it is either the old one or the whole new one; or a
    new folder, which is there as a whole or not at all. Where another process has made the folder
    meanwhile, that one stays. An OSError names the file.

    write: function that writes to the path it is given, a temporary one in the same folder.
    A crash leaves at most something ending in .tmp behind, never a half under the real name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)                           # of a process that had the same number
    try:
        write(temporary)
        sync(temporary)
        try:
            os.replace(temporary, path)
        except OSError:
            if not (temporary.is_dir() and path.is_dir()):
                raise
        sync(path.parent)
    except OSError as error:
        if error.errno and str(temporary) in str(error.filename or temporary):
            error.filename = str(path)          # a full disk names no file
        raise
    finally:
        remove(temporary)


def remove_litter(folder):
    """Remove what processes that were killed left of replace_file in a folder. Several processes
    may write there: what a living one writes stays, and on Windows all, where nobody can ask."""
    for path in Path(folder).glob(".*.tmp"):
        number = path.name.split(".")[-2]       # of the process
        if os.name == "nt" or not number.isdecimal():
            continue
        with suppress(PermissionError, OverflowError):  # another user's; no number of a process
            try:
                os.kill(int(number), 0)         # no signal, a question
            except ProcessLookupError:
                remove(path)


def sync(path):
    """Write a file, or a folder's list of names, to disk, so that it survives a power cut."""
    if fcntl:                                   # not on Windows, where no folder can be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(path):
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


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
        remove(leftover)
    try:
        yield
    finally:
        os.close(handle)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def attempt(what, write, faults=OSError):
    """Call write(); if the disk refuses, print a note and go on. For files that a run can do
    without. what: the file, in words; faults: the exceptions that cost no more than a note."""
    try:
        write()
    except faults as error:
        print(f"note: {what} could not be written ({error}); the run goes on", flush=True)


def catch_signals():
    """Note SIGINT (Ctrl-C) and SIGTERM in a list instead of ending the process, so that a step can
    be finished and saved; a second signal ends the process at once. Returns the list, which fills
    when signals come; only the main thread can catch any."""
    caught = []
    if threading.current_thread() is not threading.main_thread():
        return caught

    def note(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


def save_tensors(path, tree):
    """torch.save of tensors, numbers, texts, lists and dicts. OSError where the disk is full: of
    a file, torch.save would hide it."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    Path(path).write_bytes(buffer.getbuffer())


def write_csv(path, rows):
    """Write dicts with the same keys as a CSV file; floats with six digits."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(rows[0])                    # the keys
    for row in rows:
        values = [f"{x:.6g}" if isinstance(x, float) else x for x in row.values()]
        writer.writerow(values)
    replace_file(path, lambda temporary: temporary.write_bytes(text.getvalue().encode()))


def write_json(path, facts):
    """Write a dict as a JSON file; NaN and infinity, which JSON lacks, become null."""
    facts = json.loads(json.dumps(facts), parse_constant=lambda name: None)
    text = json.dumps(facts, indent=1) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
