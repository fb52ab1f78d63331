"""Any number of image tokens, of a picture or of all frames of a clip, to a few (arXiv 2204.14198, section 2.1).

Shapes: n pictures, m media (a picture, or the frames of a clip), F the most frames of a clip, N tokens of a picture,
R latents, D width of the image tokens, C width of the latents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.rows import rows_of
from vlmpipe.models.layers import CrossAttention, FeedForward, TransformerConfig, build_norm


@dataclass(frozen=True)
class ResamplerConfig:
    """`latents` tokens are what a medium becomes. `frames`: learned positions in time for so many frames, which a
    longer clip gets interpolated; 0: time is not told."""

    transformer: TransformerConfig
    latents: int = 64
    frames: int = 0

    def __post_init__(self):
        if self.latents < 1 or self.frames < 0:
            raise UserError(f"found latents {self.latents}, frames {self.frames}; expected at least 1 and 0")


class ResamplerLayer(nn.Module):
    """Latents look at the image tokens and at themselves in one attention, then pass a feed-forward layer."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.media_norm, self.latent_norm = build_norm(config), build_norm(config)
        self.attention = CrossAttention(config, config.width)
        self.feed_forward_norm, self.feed_forward = build_norm(config), FeedForward(config)

    def forward(self, x_mRC: Tensor, media_mMC: Tensor, mask: Tensor | None, looks: list | None) -> Tensor:
        normed = self.latent_norm(x_mRC)
        seen = torch.cat([self.media_norm(media_mMC), normed], dim=1)
        x_mRC = x_mRC + self.attention(normed, seen, mask, looks)
        return x_mRC + self.feed_forward(self.feed_forward_norm(x_mRC))


class Resampler(nn.Module):
    """`width` is that of the image tokens; they are projected where it isn't the latents'."""

    def __init__(self, config: ResamplerConfig, width: int):
        super().__init__()
        self.config = config
        inner = config.transformer.width
        self.project = nn.Linear(width, inner) if width != inner else nn.Identity()
        self.latents = nn.Parameter(torch.randn(config.latents, inner) * 0.02)
        self.frame_embedding = nn.Embedding(config.frames, inner) if config.frames else None
        self.layers = nn.ModuleList(ResamplerLayer(config.transformer) for _ in range(config.transformer.depth))
        self.norm = build_norm(config.transformer)

    def forward(self, tokens_nND: Tensor, frames: Tensor | None = None, looks: list | None = None) -> Tensor:
        """[m, R, C]. `frames` [n]: the number of each picture in its clip, from 0; None: each is a medium of its own.

        `looks`: a list to which each layer appends its weights [m, H, R, F * N + R].
        """
        media_mMC, mask = self.project(tokens_nND), None
        if frames is not None:
            media_mMC, mask = self.clips(media_mMC, frames)
        elif self.frame_embedding is not None:
            media_mMC = media_mMC + self.frame_embedding.weight[0]
        x_mRC = self.latents.to(media_mMC.dtype).expand(len(media_mMC), -1, -1)
        for layer in self.layers:
            x_mRC = layer(x_mRC, media_mMC, mask, looks)
        return self.norm(x_mRC)

    def clips(self, tokens_nNC: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of a clip in one row [m, F * N, C], and [m, 1, 1, F * N + R] true where there are any."""
        longest = int(frames.max()) + 1
        if self.frame_embedding is not None:
            tokens_nNC = tokens_nNC + self.times(longest)[frames][:, None]
        clip_n = (frames == 0).cumsum(0) - 1
        rows = rows_of(len(frames), clip_n, int(clip_n[-1]) + 1, frames.device)
        media = rows.gather(tokens_nNC)
        real = rows.gather(torch.ones_like(tokens_nNC[..., 0], dtype=torch.bool)).flatten(1)
        latents = real.new_ones(len(real), self.config.latents)
        return media.flatten(1, 2), torch.cat([real, latents], dim=1)[:, None, None]

    def times(self, count: int) -> Tensor:
        """[F, C] positions in time, stretched over more frames than were learned (arXiv 2204.14198, appendix A.1.1)."""
        learned = self.frame_embedding.weight
        if count <= len(learned):
            return learned
        return F.interpolate(learned.T[None], size=count, mode="linear", align_corners=True)[0].T
