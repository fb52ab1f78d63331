"""Which picture a phrase is about, and phrases gathered by picture."""

import pytest
import torch

from vlmpipe.errors import UserError
from vlmpipe.models.heads.grounding import by_picture, pictures_of_rows


def test_rows_from_one_picture_to_the_next_are_about_it():
    condition = torch.zeros(6, 2)
    assert pictures_of_rows(torch.tensor([0, 1, 4]), 3, condition).tolist() == [0, 1, 1, 1, 2, 2]
    assert pictures_of_rows(None, 6, condition).tolist() == [0, 1, 2, 3, 4, 5]


def test_without_rows_phrases_and_pictures_are_equally_many():
    with pytest.raises(UserError, match="found 3 texts for 2 pictures"):
        pictures_of_rows(None, 2, torch.zeros(3, 2))


def test_phrases_are_gathered_and_filled_up():
    condition = torch.arange(1.0, 5.0)[:, None]
    grouped, asked = by_picture(condition, torch.tensor([0, 2, 2, 2]), 3)
    assert grouped[..., 0].tolist() == [[1, 0, 0], [0, 0, 0], [2, 3, 4]]
    assert asked.tolist() == [[True, False, False], [False] * 3, [True] * 3]
