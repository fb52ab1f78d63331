"""Reasons, however they are worded on the way."""

import time

import pytest

from vlmpipe.curate.failures import parse_failure, retry_after


def test_retry_after_may_be_a_date():
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 50))
    assert 47 < retry_after(later) <= 50
    assert retry_after("soon") is None


@pytest.mark.parametrize("message, expected", [
    ("http_404: Not Found", ("http_404", "Not Found")),
    ("disallowed by X-Robots-Tag directive", ("opt_out", "disallowed by X-Robots-Tag directive")),
    ("unknown url type: 'a#1'", ("bad_url", "not the form of a URL")),
    ("Something odd", ("download_error", "Something odd")),
])
def test_reasons_survive_error_strings(message, expected):
    assert parse_failure(message) == expected
