"""``nearest.cpp``, the C++ twin of ``nearest_code`` on CPUs: compiled on first use, silently absent where that fails.

The compiler is $CXX, or else c++, g++ or clang++. The library lies in $TOKENIZERS_VIS_CACHE, or else in
~/.cache/tokenizers_vis, under a name that says for which source, compiler and CPU it was built.
TOKENIZERS_VIS_NATIVE=0 turns it off. ``why_not()`` says why it is absent.

It is called through ctypes with plain pointers, so it depends on neither torch's nor Python's version.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from tokenizers_vis.cuda.reference import METRICS

SOURCE = Path(__file__).with_name("nearest.cpp")
HEADER = Path(__file__).with_name("nearest_amx.h")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
MAX_CODES = 2**31 - 2**16  # ids are int32 inside

_lock = threading.Lock()
_state: tuple[ctypes.CDLL | None, str] | None = None  # the library, or None and why


def nearest_code(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor | None:
    """As the reference's, for float32 on the CPU; None where it cannot be done here."""
    if z.dtype != torch.float32 or codebook.dtype != torch.float32 or codebook.shape[-2] > MAX_CODES:
        return None
    library = _library()
    if library is None:
        return None
    ids = torch.empty(z.shape[:-1], dtype=torch.int64)
    grouped = (z, codebook) if z.ndim == 3 else (z[None], codebook[None])
    (g, n, d), k = grouped[0].shape, codebook.shape[-2]
    (z_data, z_strides), (code_data, code_strides) = (
        (x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride())) for x in grouped
    )
    threads = torch.get_num_threads()
    sizes = (g, n, k, d, METRICS.index(metric), threads)
    if library.nearest_code(z_data, z_strides, code_data, code_strides, *sizes, ids.data_ptr()):
        raise MemoryError(f"no memory for the lookup of {n} rows among {k} codes")
    return ids


def available() -> bool:
    """Whether the library is there; builds it where it must. Takes a second or two the first time on a machine."""
    return _library() is not None


def why_not() -> str:
    """Why the library is absent, or an empty string."""
    _library()
    return _state[1] if _state else ""


def reset() -> None:
    """Forgets what was found, so that the next call looks, and builds, again."""
    global _state
    with _lock:
        _state = None


def _library() -> ctypes.CDLL | None:
    global _state
    if _state is None:
        with _lock:
            if _state is None:
                _state = _load()
    return _state[0]


def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("TOKENIZERS_VIS_NATIVE", "1") == "0":
        return None, "TOKENIZERS_VIS_NATIVE is 0"
    try:
        library = ctypes.CDLL(str(_built(compiler())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, str(error)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    strides = ctypes.POINTER(size)
    arguments = [pointer, strides, pointer, strides, size, size, size, size, ctypes.c_int, size, pointer]
    library.nearest_code.argtypes, library.nearest_code.restype = arguments, ctypes.c_int
    return library, ""


def compiler() -> list[str]:
    """The command. $CXX may hold options, or a wrapper such as ccache before the compiler."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise RuntimeError(f"the compiler that CXX names is not there: {named[0]}")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler: install g++ or clang++, or name one in CXX")


def _built(command: list[str]) -> Path:
    """The library's path; compiles it unless it is there.

    Written aside and renamed, since two processes may build at once.
    """
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    arm = platform.machine().lower() in ("arm64", "aarch64")
    command = [*command, *FLAGS, "-mcpu=native" if arm else "-march=native"]
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, HEADER)]
    key = "\0".join([*command, version, _cpu(), *sources])
    folder = cache_folder()
    path = folder / f"nearest-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as scratch:
            made = Path(scratch) / path.name
            done = subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
            os.replace(made, path)
    return path


def _cpu() -> str:
    """What ``native`` depends on: the machine and, where Linux tells, the CPU's features."""
    lines = [platform.system(), platform.machine(), platform.processor()]
    info = Path("/proc/cpuinfo")
    if info.is_file():
        wanted = ("model name", "flags", "Features")
        lines += sorted({line for line in info.read_text().splitlines() if line.startswith(wanted)})
    return "\n".join(lines)


def cache_folder() -> Path:
    """Where this library keeps what it builds or learns of a machine: $TOKENIZERS_VIS_CACHE, or the user's cache."""
    return Path(os.environ.get("TOKENIZERS_VIS_CACHE") or Path.home() / ".cache" / "tokenizers_vis")
