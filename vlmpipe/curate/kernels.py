"""Compiled loops of `hamming`: numbers into buckets by some of their bits, and buckets compared.

numba compiles them at the first call on a machine, which takes some seconds, and keeps them in `__pycache__` beside
this file, in the user's cache directory where that can't be written, or in NUMBA_CACHE_DIR; from there they load in a
tenth of a second. Where none can be written, each process compiles. They run without the interpreter's lock.

Legend: a hash is one uint64; fields say where the bits of a key are: the `or` over all of `hash >> shift & mask`.
"""

from collections.abc import Callable

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

LANES = 16  # hashes compared together: what the compiler unrolls to
STRETCH = 256  # hashes counted before they are looked at one by one for a hit


def _compiled(function: Callable) -> Callable:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no place for a cache
        return njit(nogil=True)(function)


@intrinsic
def _ones(_context, number):
    """How many bits are set: LLVM's ctpop, which is one instruction, for vectors too, on machines that have it."""
    def generate(_context, builder, _signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@_compiled
def _bucket(number, fields):
    key = np.uint64(0)
    for shift, mask in fields:
        key |= number >> shift & mask
    return key


@_compiled
def _partition(numbers, fields, out, edges):
    """Write the numbers to `out` in the order of their buckets; bucket b is edges[b] to edges[b + 1]."""
    edges[:] = 0
    for number in numbers:
        edges[_bucket(number, fields) + np.uint64(2)] += 1
    for b in range(2, len(edges)):
        edges[b] += edges[b - 1]
    # Now edges[b + 1] is where bucket b begins; each number written moves it, in the end to where b + 1 begins.
    for number in numbers:
        b = _bucket(number, fields) + np.uint64(1)
        out[np.uint64(edges[b])] = number
        edges[b] += 1


@_compiled
def _near(one, others, start, count, limit):
    """How many of `count` others from `start` on are near."""
    near = 0
    for step in range(count):  # unsigned places: one that could be negative would keep this from becoming vector code
        near += _ones(one ^ others[np.uint64(start + step)]) <= limit
    return near


@_compiled
def _holds(difference, tests):
    for t in range(len(tests)):  # noqa: SIM110 - numba compiles no generators
        if (_ones(difference & tests[t, 0]) <= tests[t, 1]) != (tests[t, 2] == 1):
            return False
    return True


@_compiled
def _compare(ones, first, last, others, begin, end, same, tests, found, count):
    """Write pairs of ones[first:last] and others[begin:end] behind the first `count` of `found`; how many there are.

    Those that find no room are counted only.
    """
    radius = tests[0, 1]
    for i in range(first, last):
        one = ones[i]
        start = i + 1 if same else begin
        while start < end:
            stop = min(start + STRETCH, end)
            if _near(one, others, start, (stop - start + LANES - 1) & -LANES, radius):
                for place in range(start, stop):
                    if _holds(one ^ others[place], tests):
                        if count < len(found):
                            found[count, 0], found[count, 1] = one, others[place]
                        count += 1
            start = stop
    return count


@_compiled
def _largest(edges):
    return (edges[1:] - edges[:-1]).max()


@_compiled
def join(left, right, same, coarse, fine, bits, tests):
    """Pairs (one of `left` [n], one of `right` [m]) of a bucket whose difference holds all tests: uint64 [P, 2].

    Two rounds of buckets, by the `coarse` and the `fine` fields: the second one, and comparing, stay in the cache.

    Args:
        coarse, fine: fields, pairs of numpy's uint64.
        same: `left` is `right`; of (a, b) and (b, a) one is found, and no (a, a).
        bits: how many bits the two keys have, int64 [2].
        tests: uint64 [T, 3] of (mask, limit, wanted): whether at most `limit` bits of the mask are set is what is
            wanted (1 or 0). The first one is passed by few: the others are asked only of those.
    """
    right_parts, right_edges = np.empty(len(right), np.uint64), np.empty((1 << bits[0]) + 2, np.int64)
    left_parts, left_edges = right_parts, right_edges
    _partition(right, coarse, right_parts, right_edges)
    # One is compared with LANES others at once: the last ones may lie behind their bucket, and are not collected.
    others = np.zeros(_largest(right_edges) + LANES, np.uint64)
    other_edges = np.empty((1 << bits[1]) + 2, np.int64)
    ones, one_edges = others, other_edges
    if not same:
        left_parts, left_edges = np.empty(len(left), np.uint64), np.empty_like(right_edges)
        _partition(left, coarse, left_parts, left_edges)
        ones, one_edges = np.empty(_largest(left_edges), np.uint64), np.empty_like(other_edges)
    found, count = np.empty((1024, 2), np.uint64), 0
    for b in range(1 << bits[0]):
        if left_edges[b] == left_edges[b + 1] or right_edges[b] == right_edges[b + 1]:
            continue
        _partition(right_parts[right_edges[b] : right_edges[b + 1]], fine, others, other_edges)
        if not same:
            _partition(left_parts[left_edges[b] : left_edges[b + 1]], fine, ones, one_edges)
        for c in range(1 << bits[1]):
            places = one_edges[c], one_edges[c + 1], others, other_edges[c], other_edges[c + 1], same
            after = _compare(ones, *places, tests, found, count)
            if after > len(found):
                grown = np.empty((2 * after, 2), np.uint64)
                grown[:count] = found[:count]
                found = grown
                _compare(ones, *places, tests, found, count)
            count = after
    return found[:count]
