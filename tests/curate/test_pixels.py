"""The decoder's process."""

import sys

import pytest

from vlmpipe.curate.pixels import Decoder

CHILD = """
import os, sys, time
from vlmpipe.curate.pixels import Decoded, serve
def convert(data):
    print("noise on standard output")
    if data == b"die": os.abort()
    if data == b"hang": time.sleep(60)
    if data == b"once" and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os.abort()
    return Decoded(data[::-1], 1, 2, 3, 4)
serve(convert)
"""


def test_the_decoder_survives_what_kills_or_hangs_its_child(tmp_path):
    decoder = Decoder([sys.executable, "-c", CHILD, str(tmp_path / "mark")], timeout=2.0)
    large = bytes(range(256)) * 20_000
    assert decoder.decode(large).image == large[::-1]
    assert decoder.decode(b"die").error.startswith("decoder_crash: ")
    assert decoder.decode(b"hang").error.startswith("decoder_timeout: ")
    assert decoder.decode(b"once").image == b"ecno"
    decoder.close()


def test_a_decoder_that_cannot_start_is_an_error_and_not_a_bad_image():
    with pytest.raises(RuntimeError, match="did not start"):
        Decoder([sys.executable, "-c", "raise SystemExit(3)"], timeout=1.0).decode(b"x")
