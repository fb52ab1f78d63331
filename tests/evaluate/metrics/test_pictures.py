"""The Frechet distance against closed forms and scipy's matrix root."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import fid, frechet_distance


def features(count, width, seed, scale=1.0, shift=0.0):
    rows = np.random.default_rng(seed).normal(size=(count, width)) * scale + shift
    return dict(enumerate(rows))


def test_distance_of_two_normal_distributions_along_the_axes():
    # |m - m'|² + sum of (s - s')² where both covariances are diagonal.
    value = frechet_distance(np.array([1.0, 2.0]), np.diag([4.0, 9.0]), np.array([1.0, 0.0]), np.diag([1.0, 25.0]))
    assert value == pytest.approx(4 + 1 + 4)


def test_distance_equals_the_usual_formula():
    made, real = features(300, 6, 0), features(200, 6, 1, scale=1.5, shift=0.3)
    result = fid(made, real)
    (mean, cov), (real_mean, real_cov) = (
        (x.mean(axis=0), np.cov(x, rowvar=False)) for x in (np.stack(list(f.values())) for f in (made, real))
    )
    root = sqrtm(cov @ real_cov).real
    assert result.value == pytest.approx(((mean - real_mean) ** 2).sum() + np.trace(cov + real_cov - 2 * root))
    assert result.details["mean"] == pytest.approx(((mean - real_mean) ** 2).sum())
    assert result.value == pytest.approx(result.details["mean"] + result.details["covariance"])
    assert result.details["made"] == 300 and result.details["real"] == 200 and result.details["full_rank"]


def test_the_same_pictures_are_at_no_distance_even_where_they_are_few():
    few = features(5, 20, 0, scale=100.0)
    result = fid(few, {f"again {sample}": row for sample, row in few.items()})
    assert result.value == pytest.approx(0.0, abs=1e-6)
    assert not result.details["full_rank"]


def test_a_shift_adds_its_square():
    real = features(50, 3, 0)
    assert fid({k: row + 2.0 for k, row in real.items()}, real).value == pytest.approx(3 * 4.0)


def test_a_single_feature():
    assert fid({1: [0.0], 2: [2.0]}, {1: [0.0], 2: [4.0]}).value == pytest.approx(1 + 2)


@pytest.mark.parametrize(
    "made, message",
    [
        ({}, "0 pictures made"),
        ({1: [1.0, 2.0]}, "1 pictures made"),
        ({1: [1.0, 2.0], 2: [np.nan, 1.0]}, "for 2"),
        ({1: [1.0, 2.0], 2: [1.0]}, "for 2"),
        ({1: [1.0], 2: [2.0]}, "one extractor"),
    ],
)
def test_fid_refuses(made, message):
    with pytest.raises(UserError, match=message):
        fid(made, {1: [0.0, 1.0], 2: [1.0, 0.0]})
