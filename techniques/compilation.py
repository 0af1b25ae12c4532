"""Compilation: PyTorch writes a program for each kind of block, in C++ for a CPU or in Triton for a GPU, and compiles it.

Ansel et al., "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation"
(ASPLOS 2024). Norms, activations and sums between two matrix products become one loop: each number is read and written
once instead of once an operation.

    speed    SmolLM2-135M on two CPU cores: 444 tokens/s instead of 314, but gpt2-nano gains nothing: 3,060 and 3,150.
    start    gpt2-nano's first step is done 5 s after the start, with --compile after 43 s. The compiled code waits in the
             user's cache folder. The next run is there after 21 s: it only translates the Python code again (LOG.md).
    memory   The compiler stays in the process: 180 MB with SmolLM2. The files in the cache take 4 MB for gpt2-nano.
"""
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import torch

from errors import UserError


def check_compiler(device: str):
    """Raises UserError if PyTorch would find no compiler for `device` ("cpu", "cuda:1"). It asks where PyTorch would ask.

    PyTorch itself asks after the model is loaded, and imports its own compiler for it (72 MB, 2 seconds). Its question
    for a CPU is in torch/_inductor/cpp_builder.py (cpp_compiler_search), that for a GPU in triton/runtime/build.py.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
        missing = None if answers(compiler) else f"a C++ compiler ({compiler} does not run): install g++, or set CXX to one"
    elif kind == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "Triton: pip install triton"
    elif kind == "cuda":  # Triton translates its programs itself, and needs C for what starts them
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        missing = None if any(map(answers, compilers)) else (
            f"a C compiler ({' or '.join(compilers)} does not run): install gcc, or set CC to one")
    else:
        return  # Apple's GPU: Metal, a part of the system, compiles
    if missing is None and sys.platform == "linux" and not python_header():
        missing = "Python.h, which Linux distributions package apart: install python3-dev or python3-devel"
    if missing:
        raise UserError(f"--compile on {device} needs {missing}; or leave --compile out")


def answers(compiler: str) -> bool:
    """Whether the compiler tells its version. A Mac without Xcode's tools has a clang++ that only says what to install."""
    if shutil.which(compiler) is None:
        return False
    return sys.platform == "win32" or subprocess.run([compiler, "--version"], capture_output=True).returncode == 0


def python_header() -> bool:
    """Whether Python's own header is installed: compiled code is a module of Python."""
    folders = {sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")}  # Debian has both
    return any((Path(folder) / "Python.h").exists() for folder in folders)


def user_cache() -> Path:
    """Where this program keeps what another run can use: bytewise in $XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bytewise"


def cache_folder() -> Path:
    """Where compiled code waits for the next run: inductor-CPU in the user's cache.

    PyTorch's own choice is a folder in /tmp. Many systems empty it at a restart, and on a shared machine another user
    could make the folder first and put code there. CPU is a hash of what this CPU can do. C++ is compiled for exactly
    this CPU (-march=native), but PyTorch's key does not name it, and machines may share a home folder.
    """
    cpu = {platform.machine()}
    with suppress(OSError):  # only Linux has this file, with these lines once a core (flags: x86, Features: ARM)
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu |= {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    cpu = hashlib.sha256("\n".join(sorted(cpu)).encode()).hexdigest()[:8]
    return user_cache() / f"inductor-{cpu}"


def compile_blocks(model):
    """Every block is compiled when it first runs, or its code is read from the cache.

    dynamic: one program serves every length. Otherwise each new T would be compiled, and batches have many. Equal blocks
    share their programs. Raises nothing where the cache folder cannot be written: PyTorch's own choice remains.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # the user's own choice counts
        with suppress(OSError, RuntimeError):  # a home that is read-only, or none
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                # In the environment, not in a setting: the processes that compile read it too.
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    for block in model.blocks:
        block.compile(dynamic=True)
