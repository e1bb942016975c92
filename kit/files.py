"""Files that are whole or not there: atomic writes, locks, CSV and JSON, signals, and how a script
ends.
"""
from __future__ import annotations

import csv
import hashlib
import json
import math
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
    """Call main(), then say what XLA did, if it was used; print a BadInput, or what the disk
    refused, as one sentence and leave with status 2."""
    try:
        main()
        report = devices.xla_report()
        if report:
            print(report)
    except KeyboardInterrupt:
        sys.exit(130)
    except (bs.BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def require_positive(args, *names):
    """BadInput unless each of these arguments is above 0 (or None, where it was left out), the seed
    at least 0, and shares lie in 0..1."""
    if args.seed < 0:
        raise bs.BadInput(f"--seed {args.seed}: must not be negative")
    for name in ("tumour_share", "synthetic_share", "drop"):
        if not 0 <= getattr(args, name, 0) <= 1:
            raise bs.BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: goes from 0 to 1")
    for name in names:
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise bs.BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")


def replace_file(path, write):
    """Write a file so that it is either the old one or the whole new one, whatever happens.

    path: where it shall be; write: function of a temporary path in the same folder.
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
    """Make sure that names given in a folder survive a power cut."""
    if hasattr(os, "O_DIRECTORY"):              # not on Windows, which syncs folders by itself
        handle = os.open(folder, os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def file_hash(path):
    """sha256 (hex) of a file; of the word itself where it is "imagenet"."""
    return hashlib.sha256(b"imagenet" if path == "imagenet"
                          else Path(path).read_bytes()).hexdigest()


@contextmanager
def sole_writer(folder):
    """While the body runs no other process may write into the folder: BadInput if one does. It is
    the operating system's lock, which ends with the process however that ends. What writers that
    were killed left behind is removed. Of several processes of one run the first one holds it."""
    folder, there = Path(folder), Path(folder).exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl and devices.first_process() else None
    try:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise bs.BadInput(f"{folder}: another process writes there; wait for it, or choose "
                                  "another --out") from error
            except OSError:                     # a file system without locks
                pass
            for litter in folder.glob(".*.tmp"):
                shutil.rmtree(litter) if litter.is_dir() else litter.unlink()
        yield
    finally:
        if handle is not None:
            os.close(handle)
            if not there and not any(folder.iterdir()):
                folder.rmdir()                  # nothing came of it


def attempt(what, write):
    """write(); where the disk refuses, say so and go on. For what a run can do without."""
    try:
        write()
    except OSError as error:
        print(f"note: {what} could not be written ({error.strerror or error}); training goes on",
              flush=True)


def catch_signals():
    """From now on SIGINT (Ctrl-C) and SIGTERM are noted in the returned list instead of ending the
    process, so that a step can be finished and saved; a second one ends it at once."""
    caught = []

    def note(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


def write_csv(path, rows):
    """Rows, dicts with the same keys, as a CSV file; floats with six digits."""
    def write(temporary):
        with open(temporary, "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                             for row in rows)

    replace_file(path, write)


def write_json(path, facts):
    """A dict as a JSON file; NaN and infinity, which JSON has not, become null."""
    plain = lambda x: ({k: plain(v) for k, v in x.items()} if isinstance(x, dict) else
                       [plain(v) for v in x] if isinstance(x, (list, tuple)) else
                       None if isinstance(x, float) and not math.isfinite(x) else x)
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(plain(facts), indent=1)
                                                              + "\n"))
