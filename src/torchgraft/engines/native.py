"""C++ of the engines, compiled when it is first needed, and absent where there is no compiler.

A source lies beside the module that uses it. The library made of it is kept in the user's cache folder
(``TORCHGRAFT_CACHE``, else ``XDG_CACHE_HOME/torchgraft``, else ``~/.cache/torchgraft``) under a name that holds the
source, the flags, the compiler and the processor, is written whole or not at all, and is opened only where it belongs
to the user and nobody else may write to it. ``TORCHGRAFT_NO_COMPILER=1`` forbids all this.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["cache_folder", "library", "traced"]

_logger = logging.getLogger("torchgraft")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_X86, _ARM = ("-march=native", "-mprefer-vector-width=512"), ("-mcpu=native",)  # the width where there are such vectors
_NATIVE = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}


def traced() -> bool:
    """Say whether what runs is being recorded; a function called through ctypes would leave no trace of itself."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def cache_folder() -> Path:
    """Return where compiled kernels are kept; nothing is made."""
    own = os.environ.get("TORCHGRAFT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchgraft"


def _processor() -> str:
    """Return what distinguishes processors, since the code is made for the one at hand."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines() if told.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "").strip() or "g++") or shutil.which("c++")


def _trusted(path: Path) -> bool:
    """Say whether ``path`` is this user's own and nobody else may write to it."""
    about = path.lstat()
    return about.st_uid == os.getuid() and not stat.S_ISLNK(about.st_mode) and not about.st_mode & 0o022


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, *_NATIVE.get(platform.machine(), ()))


def _build(compiler: str, source: bytes, target: Path) -> None:
    """Compile ``source`` to ``target``, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "kernel.so"
        done = subprocess.run(
            [compiler, *_flags(), "-x", "c++", "-", "-o", str(made)],
            input=source,
            capture_output=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise OSError((done.stderr.decode(errors="replace").strip().splitlines() or ["it failed"])[0])
        made.chmod(0o700)
        os.replace(made, target)


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """Return the library of the C++ file ``source``, compiled or found; ``None``, with a line in the log, without one.

    Args:
        source: the file; its functions have C linkage.
    """
    compiler = _compiler()
    if os.name != "posix" or os.environ.get("TORCHGRAFT_NO_COMPILER") or compiler is None:
        _logger.info("no C++ compiler is used; torch's own operators stand in for %s", source.name)
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30, check=False).stdout
        text = source.read_bytes()
        said = "\0".join((compiler, *_flags(), _processor())).encode()
        digest = hashlib.sha256(b"\0".join((text, version, said))).hexdigest()[:24]
        target = cache_folder() / f"{source.parent.name}-{digest}.so"
        if not target.exists():
            _build(compiler, text, target)
        if not _trusted(target) or not _trusted(target.parent):
            raise OSError(f"{target} may be written to by others")
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        _logger.warning("%s cannot be compiled, torch's own operators stand in for it: %s", source.name, error)
        return None
