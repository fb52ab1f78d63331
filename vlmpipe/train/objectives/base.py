"""What objectives share: the batch as the model takes it."""

from torch import Tensor

from vlmpipe.errors import UserError

Batch = dict[str, Tensor]
Result = tuple[Tensor, dict[str, Tensor]]

# What `VisionLanguageModel.forward` takes from a batch, as far as it is there.
MODEL_INPUTS = (
    "images", "tokens", "segments", "positions", "types", "image_places", "image_rows", "frames", "grids",
    "prefix",
)


def model_inputs(batch: Batch, **changes: Tensor | None) -> dict[str, Tensor | None]:
    """The model's arguments in `batch`, some of them changed."""
    return {**{name: batch[name] for name in MODEL_INPUTS if name in batch}, **changes}


def require(objective: object, batch: Batch, *names: str) -> None:
    """Refuse a batch that lacks what the objective needs.

    Raises:
        UserError: naming the keys.
    """
    missing = [name for name in names if name not in batch]
    if missing:
        raise UserError(
            f"objective {type(objective).__name__}: found no {', '.join(missing)} in the batch; expected them; choose "
            f"an objective that fits the data"
        )
