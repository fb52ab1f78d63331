"""What every vision encoder does first: raw pixels to normalised ones, on the device where they are."""

import torch
from torch import Tensor, nn


class PixelEncoder(nn.Module):
    """Keeps the mean and deviation of each colour; constants of the config, so they stay out of the saved file."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Colours in dimension 1. uint8 becomes floats of mean 0 and deviation 1; floats are taken as normalised."""
        if images.dtype != torch.uint8:
            return images
        ones = (1,) * (images.ndim - 2)
        mean, std = self.mean.view(1, -1, *ones), self.std.view(1, -1, *ones)
        return (images.to(mean.dtype) / 255 - mean) / std
