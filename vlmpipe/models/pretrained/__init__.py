"""Hugging Face in and out: `from_huggingface`, `to_huggingface` and the families that they know.

A family is one entry of FAMILIES (families.py), keyed by Hugging Face's `model_type`, and one file here. It says (all
fields are described at `family.Family`):

    architecture     transformers' class that holds exactly these weights; it reads and writes the files, so that every
                     layout on disk that transformers knows is known here, and names below are those of its state_dict
    config           the class of our config: VLMConfig, VisionConfig or TextConfig
    read(theirs, names)   our config from theirs (a mapping with all defaults; `names`: the weights that are there);
                     refuse settings that we don't have: `require(theirs, add_cross_attention=False)`
    write(config)    the content of config.json that our config decides
    keys(config)     the key map, a dict {our name: Rows}, which runs both ways:
                       one("wte.weight"), one("cls_token", Reshape(ours, theirs))         a tensor
                       pair("norm", "ln_f"), pair(ours, theirs, Transpose())              weight and bias
                       pair(ours, (q, k, v), sizes=(32, 8, 8)), qkv(transformer, ours, (q, k, v))   stacked by rows
                       Rows((theirs,), part=(0, 32))                                      some rows of theirs
                       repeat(keys, depth)                                                `{i}` for each layer
                       prefixed(part_keys(config.text), "text.", "language_model.")       a part inside a whole
                     What a config doesn't have is left out of its map by plain Python.
    inputs, found, expected   for `python -m vlmpipe parity`: what to feed, and the outputs of either side by name
    tiny             their config of a small model of odd sizes, for tests and docs/parity.md
    ignored          patterns of names in their state that repeat others (a tied lm_head) or are constants
    heads            patterns of weights that larger checkpoints have beyond this part
    optional         modules of theirs that may be absent (poolers)

So a new family writes `X = Family("TheirClass", VLMConfig, read, write, keys, inputs, found, expected, tiny)` in its
file and adds a line to FAMILIES: the tests of round trip and parity and the table of docs/parity.md then cover it. A
key that maps nowhere, on either side, is an error that names it. `pytest tests/models/pretrained -k NAME` is quick.
"""

from vlmpipe.models.pretrained.families import FAMILIES
from vlmpipe.models.pretrained.family import Family
from vlmpipe.models.pretrained.join import join_huggingface
from vlmpipe.models.pretrained.load import convert, from_huggingface
from vlmpipe.models.pretrained.processor import HuggingFaceProcessor
from vlmpipe.models.pretrained.save import to_huggingface

__all__ = [
    "FAMILIES", "Family", "HuggingFaceProcessor", "convert", "from_huggingface", "join_huggingface", "to_huggingface",
]
