"""ViLT on real picture sizes: from files to answers as transformers does it."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vlmpipe.errors import UserError
from vlmpipe.models import from_huggingface
from vlmpipe.models.fill import fill_up
from vlmpipe.models.generate.rows import picture_inputs
from vlmpipe.models.parity import TOLERANCE, random_module

SIZES = [(61, 40), (40, 64), (50, 50)]


def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (y, x, 3), np.uint8)) for x, y in SIZES]


def test_pictures_of_any_size_get_the_same_answers(tmp_path):
    torch.set_num_threads(1)
    _, theirs = random_module("vilt.answers")
    prepare = transformers.ViltImageProcessorPil(size={"shortest_edge": 20}, size_divisor=5)
    theirs.save_pretrained(tmp_path)
    prepare.save_pretrained(tmp_path)
    words = torch.tensor([[4, 5, 6, 0], [7, 8, 9, 10], [11, 12, 0, 0]])
    real = (words != 0).long()
    with torch.no_grad():
        given = prepare(images=pictures(), return_tensors="pt")
        expected = theirs(input_ids=words, attention_mask=real, **given).logits
        model, processor = from_huggingface(tmp_path)
        filled = picture_inputs(model, processor, pictures())
        assert filled["images"].dtype == torch.uint8 and len(set(map(tuple, filled["grids"].tolist()))) == 3
        found = model(**filled, tokens=words, segments=real, positions=torch.arange(4).expand(3, -1)).answers
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= TOLERANCE


def test_equal_sizes_need_no_grids_and_odd_ones_are_refused():
    whole = np.ones((3, 10, 15), np.uint8)
    assert fill_up([whole, whole], 5).keys() == {"images"}
    filled = fill_up([whole, whole[:, :5]], 5)
    assert filled["grids"].tolist() == [[1, 2, 3], [1, 1, 3]]
    assert filled["images"][1, :, :5].eq(1).all() and filled["images"][1, :, 5:].eq(0).all()
    with pytest.raises(UserError, match="found a picture of 15 x 7 pixels; expected multiples of 5"):
        fill_up([whole, whole[:, :7]], 5)
