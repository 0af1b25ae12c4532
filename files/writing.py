"""Files appear whole or not at all, even if the program is killed or the disk is full.

A file is written under another name beside its own, and then renamed: the system replaces a name in one step. What a killed
process has left under such a name is removed later. Its name has the process's number, so a live one is left alone.
"""
import contextlib
import glob
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from errors import UserError


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`. At the end, rename that file to `path`.

    So `path` is always a whole file, even if the run is killed or the disk is full. Raises UserError if writing fails.
    """
    path = Path(path)
    tmp = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp.unlink(missing_ok=True)  # left by a killed process that had our number
        tmp.touch()
        mode = tmp.stat().st_mode  # as the umask says. safetensors would replace this file by one that only its owner reads
        yield tmp
        tmp.chmod(mode)
        os.replace(tmp, path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: could not be written ({e}); what was there before is untouched") from None
    finally:
        with contextlib.suppress(OSError):  # there is nothing to remove if the folder could not be made
            tmp.unlink()


def temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp{os.getpid()}")


def remove_leftovers(folder, name: str | None = None):
    """Remove the temporary files and folders that killed processes have left anywhere below `folder`, where no other process
    writes now.

    name: only those of this file or folder, directly in `folder`, where others may write. A process that runs on another
    machine, over a shared disk, is not seen: what it is writing would be removed, and it would stop with an error.
    """
    folder = Path(folder)
    for path in list(folder.rglob(".*tmp*") if name is None else folder.glob(f".{glob.escape(name)}.tmp*")):
        pid = re.fullmatch(r"\..+\.tmp(\d{1,9})", path.name)
        of_safetensors = name is None and re.fullmatch(r"\.tmp\w{6}", path.name)  # save_file writes to such a file first
        if of_safetensors or pid and (int(pid[1]) == os.getpid() or not is_running(int(pid[1]))):  # (a number comes again)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def is_running(pid: int) -> bool:
    if os.name != "posix":  # on Windows, os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # it belongs to someone else; it is no process id
        pass
    return True


def write_text(path, text: str):
    with atomic(path) as tmp:
        tmp.write_text(text, encoding="utf-8", errors="surrogateescape")  # a path in it may be no UTF-8


def write_tensors(path, tensors: dict, metadata: dict[str, str] | None = None):
    """metadata: what `read_metadata` returns. Without it, the file says {"format": "pt"}, which transformers asks for.

    safetensors writes the keys of its metadata in a random order. With one key, equal tensors make equal files.
    """
    about = {"bytewise": json.dumps(metadata, sort_keys=True)} if metadata else {"format": "pt"}
    with atomic(path) as tmp:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp, about)


@contextlib.contextmanager
def new_folder(path):
    """Yield a temporary folder. At the end, rename it to `path`, which may exist only as an empty folder; after an error,
    remove it. Raises UserError."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        tmp = temporary(path)
        tmp.mkdir()  # with the mode that the umask says
    except OSError as e:
        raise UserError(f"{path}: cannot be created ({e.strerror})") from None
    try:
        yield tmp
        if path.is_dir():
            path.rmdir()
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"{path}: could not be written ({e})") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
