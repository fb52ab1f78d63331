"""DataComp's subset file, against the expression in its own tools."""

import numpy as np
import pyarrow as pa
import pytest

from vlmpipe.curate.subset import pairs, read_subset, write_subset
from vlmpipe.errors import UserError


def test_the_file_is_what_datacomp_writes(tmp_path):
    rng = np.random.default_rng(0)
    uids = ["f" * 32, "0" * 32, *(rng.bytes(16).hex() for _ in range(50))]
    expected = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))
    expected.sort()
    write_subset(tmp_path / "subset.npy", pa.array(uids))
    found = np.load(tmp_path / "subset.npy")
    assert found.dtype == np.dtype("u8,u8") and (found == expected).all()
    assert read_subset(tmp_path / "subset.npy") == sorted(uids)
    assert len(pairs(pa.array([], pa.string()))) == 0


@pytest.mark.parametrize("uid", ["a1", "g" * 32, "f" * 31, "f" * 34])
def test_another_uid_is_refused(uid):
    with pytest.raises(UserError, match=f"found uid '{uid}'; expected 32 hex digits"):
        pairs(pa.array([uid]))
