"""Only given texts may be written: their tokens as a tree of prefixes.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.processor import Processor

NOWHERE = -1


class Trie:
    """Texts of token ids. Node 0 is the start; NOWHERE is where no text goes on."""

    def __init__(self, texts: Sequence[Sequence[int]]):
        self.children: list[dict[int, int]] = [{}]
        for text in texts:
            node = 0
            for token in text:
                if token not in self.children[node]:
                    self.children[node][token] = len(self.children)
                    self.children.append({})
                node = self.children[node][token]

    def allowed(self, node: int) -> list[int]:
        """Tokens with which a text goes on."""
        return [] if node == NOWHERE else list(self.children[node])

    def step(self, node: int, token: int) -> int:
        """The node after `token`."""
        return NOWHERE if node == NOWHERE else self.children[node].get(token, NOWHERE)


def endings(processor: Processor, texts: Sequence[str], question: str = "?") -> list[tuple[int, ...]]:
    """Token ids of each text as the answer to a question, its end included; an empty question asks for a caption.

    Raises:
        UserError: there are none, or two have the same tokens, so that no model could tell them apart.
    """
    if not texts:
        raise UserError("choices: found none; expected at least one text to choose")
    encoded = [processor.encode_answer(question, text) for text in texts]
    ids = [text.ids[text.start :] for text in encoded]
    twins: dict[tuple[int, ...], str] = {}
    for text, tokens in zip(texts, ids, strict=True):
        if twins.setdefault(tokens, text) != text:
            raise UserError(f"choices: found {twins[tokens]!r} and {text!r} with the same tokens; expected one of them")
    return ids


def restrict(logits_BV: Tensor, tries: Sequence[Trie], nodes: Sequence[int]) -> Tensor:
    """The logits of what the tries allow, the rest -inf. A row whose text is over keeps all."""
    rows, tokens = [], []
    for row, (trie, node) in enumerate(zip(tries, nodes, strict=True)):
        allowed = trie.allowed(node)
        rows += [row] * len(allowed)
        tokens += allowed
    over = [row for row, (trie, node) in enumerate(zip(tries, nodes, strict=True)) if not trie.allowed(node)]
    left_BV = torch.full_like(logits_BV, -torch.inf)
    left_BV[rows, tokens] = logits_BV[rows, tokens]
    left_BV[over] = logits_BV[over]
    return left_BV
