"""Checkpoints: named tensors and text metadata in one safetensors file, written whole or not at all."""
from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping

import numpy as np

from graphflow.compiler.plan.dtypes import DTYPES, DType
from graphflow.compiler.plan.errors import CheckpointError

_DTYPES: dict[str, DType] = {dtype.name.upper(): dtype for dtype in DTYPES.values()}
_DTYPE_NAMES = ", ".join(dtype.full_name for dtype in _DTYPES.values())


def save_checkpoint(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray],
                    metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` to `path`, replacing what is there in one step.

    The content goes to a temporary file in the same folder, is flushed to the disk and then renamed, so at
    any moment `path` is the old checkpoint or the new one. A link is followed; an old file's permissions
    are kept. Raises `CheckpointError` for a dtype or name that the format lacks, and when the file cannot
    be written (a full disk, a missing folder): then the old file is as it was and nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    target = os.path.realpath(path)
    arrays = _checked_arrays(target, tensors, metadata)
    # Never a fixed name: two writers must not share a temporary file.
    temporary = os.path.join(os.path.dirname(target), f".checkpoint-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # Created here for the permissions that the umask gives.
            mode = os.fstat(file.fileno()).st_mode
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(target).st_mode
        # Not {}: the library writes a header with empty metadata that it cannot read back.
        save_file(arrays, temporary, dict(metadata) or None)
        with open(temporary, "rb") as file:
            os.chmod(temporary, mode & 0o777)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kept = "; the checkpoint that was there is unchanged" if os.path.isfile(target) else ""
        raise CheckpointError(f"{target}: cannot be written: {reason}{kept}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    _flush_folder(os.path.dirname(target))


def _checked_arrays(target: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str],
                    ) -> dict[str, np.ndarray]:
    """`tensors` as the format stores them: C order, little endian, dtypes that it shares with graphflow."""
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise CheckpointError(f"{target}: metadata is text by text; {key!r} has {text!r}")
    arrays = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise CheckpointError(f"{target}: {name!r} cannot name a tensor of a checkpoint")
        array = np.asarray(tensor)
        if array.dtype.name not in [dtype.full_name for dtype in _DTYPES.values()]:
            raise CheckpointError(f"{target}: tensor '{name}' is {array.dtype.name}: no checkpoint holds it",
                                  hint=f"dtypes of a checkpoint: {_DTYPE_NAMES}")
        little = array if array.dtype.kind == "V" else array.astype(array.dtype.newbyteorder("<"), copy=False)
        arrays[name] = np.ascontiguousarray(little).reshape(array.shape)
    return arrays


def _flush_folder(folder: str) -> None:
    """Make the rename itself last; on a file system that cannot flush a folder this has no effect."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a checkpoint: `(tensors, metadata)`.

    The tensors are writable arrays of their own. The file is untrusted: nothing in it is executed, and
    its header is checked against its length first. Raises `CheckpointError` naming the file and what is
    wrong: it cannot be opened, is cut short, has a bad header, or holds a dtype that graphflow lacks.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    if not os.path.isfile(name):
        raise CheckpointError(f"{name}: no such checkpoint file")
    tensors: dict[str, np.ndarray] = {}
    try:
        with safe_open(name, framework="np") as file:
            for key in file.keys():
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(f"{name}: tensor '{key}' has dtype {dtype}, which graphflow lacks",
                                          hint=f"dtypes of a checkpoint: {_DTYPE_NAMES}")
                wanted = _DTYPES[dtype].numpy          # before the reader asks for it: it may load a package
                # A copy: the reader may hand out views of the mapped file.
                tensors[key] = np.array(file.get_tensor(key), wanted)
            return tensors, dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{name}: not a whole checkpoint: {error}",
                              hint="the file is cut short, damaged, or no safetensors file") from error
