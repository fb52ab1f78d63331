"""What objectives share: the batch as the model takes it."""

from torch import Tensor

Batch = dict[str, Tensor]
Result = tuple[Tensor, dict[str, Tensor]]

# What `VisionLanguageModel.forward` takes from a batch, as far as it is there.
MODEL_INPUTS = (
    "images", "tokens", "segments", "positions", "types", "image_places", "image_rows", "frames", "grids",
)


def model_inputs(batch: Batch, **changes: Tensor | None) -> dict[str, Tensor | None]:
    """The model's arguments in `batch`, some of them changed."""
    return {**{name: batch[name] for name in MODEL_INPUTS if name in batch}, **changes}
