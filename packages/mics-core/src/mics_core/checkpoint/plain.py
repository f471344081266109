"""What is saved beside the model's tensors: plain data and tensors, so that nothing runs where it is read.

torch.save and torch.load with weights_only=True have the last word; the types here are those that both know.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import pickle
import re
import sys
import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mics_core.errors import ConfigError

_DATA = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device)
_COLLECTIONS = (list, tuple, set)
_MAPPINGS = (dict, OrderedDict, Counter)
_LONGEST = 2032  # bits of a number that torch.load reads


def plain(value: Any, where: str) -> Any:
    """The same with Python's numbers for numpy's; a ConfigError that says where it holds anything but plain data."""
    kind = type(value)
    if kind in _COLLECTIONS:
        return kind(plain(item, f"{where}[{number}]") for number, item in enumerate(value))
    if kind in _MAPPINGS:
        keyed = [(plain(key, f"a key of {where}"), item) for key, item in value.items()]
        return kind({key: plain(item, f"{where}[{_quoted(key)}]") for key, item in keyed})
    if kind in (Tensor, torch.nn.Parameter):
        for name, attribute in vars(value).items():  # torch saves them, too
            plain(attribute, f"{where}.{name}")
        return value
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        value = value.item()
    trouble = _trouble(value)
    if not trouble:
        return value
    raise ConfigError(
        f"save: {where} is {trouble}, expected tensors, numbers, texts, bytes, and lists, tuples, sets or "
        "dictionaries of them, so that loading runs no code: save an object's state_dict() or vars(), and a path's or "
        "a date's text"
    )


def packed(value: Any, where: str) -> bytes:
    """Plain data as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(plain(value, where), buffer)
    return buffer.getvalue()


def unpacked(content: io.BytesIO, where: str, also: Sequence[Any] = ()) -> Any:
    """What was packed; nothing but plain data, tensors and `also`, as torch.serialization.add_safe_globals takes it.

    What holds anything else is a RuntimeError: it was not written by us, or before all had to be plain.
    """
    known = torch.serialization.get_safe_globals()  # which the caller may have given, and which must stay
    try:
        with torch.serialization.safe_globals([one for one in also if one not in known]):
            return torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise RuntimeError(
            f"load: {where} holds {named[1] if named else 'what torch.load does not know'}, expected plain data and "
            "tensors, which run no code: if you trust who wrote it, load it inside `with "
            "torch.serialization.safe_globals([...])`, which takes the classes that are allowed, and save it again"
        ) from error


def digest(value: Any) -> str:
    """By which ranks find out whether plain data is alike; the device of a tensor makes no difference."""
    return hashlib.sha256(_told(plain(value, "extra")).encode(errors="surrogatepass")).hexdigest()[:16]


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {_checksum(value)}"
    if isinstance(value, _MAPPINGS):
        return f"{{{', '.join(sorted(f'{_told(key)}: {_told(item)}' for key, item in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_told, value))}]"
    return f"{sorted(map(_told, value))}" if isinstance(value, set) else repr(value)


def _checksum(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or not tensor.numel():
        return 0
    held = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return zlib.crc32((ctypes.c_char * held.nbytes).from_address(held.data_ptr()))


def _quoted(key: Any) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)


def _trouble(value: Any) -> str:
    kind = type(value)
    if kind is int and value.bit_length() > _LONGEST:
        return f"a number of more than {_LONGEST} bits"
    if kind is bytes and not value:
        return "empty bytes"  # which torch.save writes as a call of a class that torch.load does not know
    if kind in _DATA:
        return ""
    return f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"
