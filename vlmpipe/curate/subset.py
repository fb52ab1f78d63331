"""DataComp's subset file: the kept uids as sorted pairs of 64-bit numbers, which its reshard tool reads.

Source: mlfoundations/datacomp, baselines/apply_filter.py: `(int(uid[:16], 16), int(uid[16:32], 16))` in an array of
dtype "u8,u8", sorted and written by `np.save`.
"""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlmpipe.errors import UserError
from vlmpipe.shards import write_bytes_atomic

SUBSET = "subset.npy"
PAIR = np.dtype("u8,u8")


def pairs(uids: pa.Array) -> np.ndarray:
    """Uids of 32 hex digits as (high, low) 64 bits, sorted.

    Raises:
        UserError: a uid is not of that form.
    """
    found = np.zeros(len(uids), PAIR)
    for row, uid in enumerate(uids.to_pylist()):
        try:
            number = bytes.fromhex(uid)
        except ValueError:
            number = b""
        if len(number) != 16:
            raise UserError(f"found uid '{uid}'; expected 32 hex digits, as DataComp's subset files hold them; "
                            f"leave `subset` out, or give the list's own uid column")
        found[row] = int.from_bytes(number[:8]), int.from_bytes(number[8:])
    return np.sort(found)


def write_subset(path: Path, uids: pa.Array) -> None:
    """Write the sorted pairs as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, pairs(uids))
    write_bytes_atomic(path, buffer.getvalue())


def read_subset(path: Path) -> list[str]:
    """The uids of a subset file as hex, in its order."""
    return [f"{int(high):016x}{int(low):016x}" for high, low in np.load(path)]
