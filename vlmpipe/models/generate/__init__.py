"""Answers, captions, and where the model looked; see docs/generation.md."""

from vlmpipe.models.generate.answers import (
    answer,
    answer_probabilities,
    caption,
    choice_scores,
    choose,
    embed_texts,
    generate,
    rank_answers,
)
from vlmpipe.models.generate.beam import Hypothesis, beam_search
from vlmpipe.models.generate.classify import answer_logits
from vlmpipe.models.generate.config import GREEDY, GenerationConfig
from vlmpipe.models.generate.decode import decode
from vlmpipe.models.generate.describe import DescribeConfig, Description, describe
from vlmpipe.models.generate.guided import GuidedConfig, guided, picture_fit
from vlmpipe.models.generate.likelihood import log_likelihoods
from vlmpipe.models.generate.look import attention_map
from vlmpipe.models.generate.rows import Example, ask, interleave, picture_inputs, to_device
from vlmpipe.models.generate.trie import Trie

__all__ = [
    "GREEDY",
    "DescribeConfig",
    "Description",
    "Example",
    "GenerationConfig",
    "GuidedConfig",
    "Hypothesis",
    "Trie",
    "answer",
    "answer_logits",
    "answer_probabilities",
    "ask",
    "attention_map",
    "beam_search",
    "caption",
    "choice_scores",
    "choose",
    "decode",
    "describe",
    "embed_texts",
    "generate",
    "guided",
    "interleave",
    "log_likelihoods",
    "picture_fit",
    "picture_inputs",
    "rank_answers",
    "to_device",
]
