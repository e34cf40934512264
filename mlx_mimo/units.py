"""Sizes and speeds as people write them, and back to text. GB = 10⁹ bytes."""

import re

from .errors import UsageError

GB = 10**9
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12}
_UNITS |= {"K": 10**3, "M": 10**6, "G": GB, "T": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LEAST_SPEED = 1000  # bytes a second: what is slower is a slip of the pen


def parse_size(text: str | int) -> int:
    """Bytes of "24GB", "1.5 GiB", "800MB" or a plain number. GB = 10⁹ bytes. Raises UsageError."""
    if isinstance(text, int):
        if text > 0:
            return text
        raise UsageError(f"size {text}: a number of bytes above 0 expected")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"size {text!r}: something like 24GB or 800MB expected")
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if nbytes < 1:
        raise UsageError(f"size {text!r}: at least one byte expected, something like 24GB or 800MB")
    return nbytes


def parse_speed(text: str) -> float:
    """Bytes per second of "6GB/s", "800 MBps" or "1.5GiB". Raises UsageError, also for bits and for a bare number."""
    if re.search(r"[kKMGT]i?b(ps|/s)?\s*$|bps\s*$|bits?(ps|/s)?\s*$", text):
        raise UsageError(f"speed {text!r}: bits, it seems; bytes expected, such as 1.25GB/s for 10Gbit/s")
    try:
        speed = float(parse_size(text.strip().removesuffix("/s").removesuffix("ps")))
    except UsageError:
        raise UsageError(f"speed {text!r}: something like 6GB/s or 800MB/s expected") from None
    if speed < LEAST_SPEED or text.strip()[-1].isdigit():
        raise UsageError(f"speed {text!r}: {format_size(int(speed))} a second? a unit expected, such as 6GB/s")
    return speed


def format_size(nbytes: int) -> str:
    """'24.0 GB', '14.2 MB': powers of ten, as in `--expert-memory`."""
    for unit in ("TB", "GB", "MB", "kB"):
        scale = {"TB": 10**12, "GB": GB, "MB": 10**6, "kB": 10**3}[unit]
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} bytes"
