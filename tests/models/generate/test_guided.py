"""MaGiC against equation 5 of arXiv 2205.02655, computed with no cache, no batch and one candidate at a time."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.generate.lm import gpt2
from tests.models.tiny import make, pictures
from vlmpipe.errors import UserError
from vlmpipe.models.generate import GuidedConfig, guided, picture_fit
from vlmpipe.models.processor import stack


def hidden(text, ids):
    tokens = torch.tensor([ids])
    return text(text.token_embedding(tokens), torch.ones_like(tokens), torch.arange(len(ids))[None])[0]


@torch.no_grad()
def by_the_paper(text, prompt, score, limit, eos, config):
    """`score`: ids of a candidate without the prompt -> CLIP's scaled cosine with the picture."""
    ids = list(prompt)
    for _ in range(limit):
        states = hidden(text, ids)
        p = F.linear(states[-1], text.token_embedding.weight).softmax(dim=-1)
        top = p.topk(config.candidates).indices.tolist()
        f = torch.stack([score([*ids[len(prompt) :], v]) for v in top]).softmax(dim=0)
        totals = []
        for place, v in enumerate(top):
            h_v = hidden(text, [*ids, v])[-1]
            s = max(F.cosine_similarity(h_v, h_j, dim=0) for h_j in states)
            alpha, beta = config.degeneration, config.picture
            totals.append((1 - alpha) * p[v] - alpha * s + beta * f[place])
        ids.append(top[int(torch.stack(totals).argmax())])
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("config", [GuidedConfig(5, 0.1, 2.0), GuidedConfig(4, 0.6, 0.0), GuidedConfig(3, 0.0, 0.5)])
def test_equals_the_equation(config):
    text = gpt2()[0].text
    scorer, processor = make("dual")
    vocabulary = ["red", "blue", "circle", "square", "two", "a", "above", "how"]

    def decode(ids):
        return " ".join(vocabulary[token % len(vocabulary)] for token in ids)

    seen, prompts = pictures(3), ([3, 4, 5], [6], [7, 8, 9, 10])
    model = gpt2()[0].language_model
    found = guided(text, model, prompts, picture_fit(scorer, processor, seen, decode), 6, 11, config)
    for image, prompt, new in zip(seen, prompts, found, strict=True):

        def score(ids, image=image):
            words = stack([[processor.encode(decode(ids))]])
            embedded = scorer.encode_text(words["tokens"], words["segments"], words["positions"])[0]
            return scorer.projection.scale() * (embedded @ scorer.encode_image(processor.images([image]))[0])

        assert new == by_the_paper(text, prompt, score, 6, 11, config)
    assert len({tuple(new) for new in found}) > 1


def test_without_guidance_it_is_greedy_decoding():
    ours, theirs = gpt2()
    nothing = GuidedConfig(candidates=4, degeneration=0.0, picture=0.0)
    found = guided(ours.text, ours.language_model, [[3, 4, 5]], lambda texts: torch.zeros(1, 4), 8, -1, nothing)
    expected = theirs.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found[0] == expected[0, 3:].tolist()


@pytest.mark.parametrize("settings", [(0, 0.1, 2.0), (5, 1.1, 2.0), (5, 0.1, -1.0)])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match="expected"):
        GuidedConfig(*settings)
