"""Which parts of a model go together, where one config can't know of the other; and what answers need."""

from vlmpipe.errors import UserError


def check_crossing(config) -> None:
    """Cross-attention needs something to look at, and the other way round.

    Raises:
        UserError: parts of a VLMConfig that don't fit.
    """
    kind, cross, encoder = config.fusion.kind, config.text.transformer.cross, config.encoder
    if (kind in ("cross", "encoder_decoder")) != (cross is not None):
        raise UserError(
            f"text.transformer.cross: found {cross} with fusion '{kind}'; expected one with 'cross' and "
            f"'encoder_decoder', and null with others"
        )
    if (kind == "encoder_decoder") != (encoder is not None):
        raise UserError(
            f"encoder: found {'one' if encoder else 'none'} with fusion '{kind}'; expected one with 'encoder_decoder' "
            f"and none with others"
        )
    heads = [name for name, head in vars(config.heads).items() if head is not None]
    if cross is not None and (not heads or {"language_model", "image_tokens"} <= set(heads)):
        found = " and ".join(heads) or "none"
        raise UserError(f"heads: found {found} with fusion '{kind}'; expected some, and words or pictures to write")
    if encoder is not None and (encoder.causal or encoder.positions == "rotary"):
        raise UserError(
            f"encoder: found causal {encoder.causal}, positions '{encoder.positions}'; expected false, and learned or "
            f"none"
        )


def check_pictures(config) -> None:
    """A model reads pictures with `vision` or writes them with `image_tokens` and `codes`.

    Raises:
        UserError: it does neither or both.
    """
    writes = config.heads.image_tokens is not None
    if writes != (config.codes is not None) or writes == (config.vision is not None):
        found = [name for name in ("vision", "codes") if getattr(config, name) is not None]
        raise UserError(
            f"vision, codes: found {' and '.join(found) or 'none of them'}, {'with' if writes else 'without'} "
            f"heads.image_tokens; expected vision alone, or codes and that head"
        )
    if writes and (config.encoder is None or config.text.context < config.codes.length):
        raise UserError(
            f"heads.image_tokens: found fusion '{config.fusion.kind}' and text.context {config.text.context}; expected "
            f"'encoder_decoder' and {config.codes.length} positions, one for each code of a picture"
        )
    if config.encoder is not None and not writes:
        widths = [part.transformer.width for part in (config.encoder, config.text)]
        if widths[0] != widths[1]:
            raise UserError(f"encoder: found width {widths[0]}; expected {widths[1]}, for it shares the word embedding")


def check_size(config) -> None:
    """Pictures of another size than the tower's get interpolated positions, and are more or fewer tokens.

    Raises:
        UserError: the processor's size is none that the tower takes, or pictures keep their own where they can't.
    """
    size, vision = config.processor.image_size, config.vision
    packed = vision is not None and vision.native is not None and config.processor.resize == "native"
    if packed and config.fusion.kind != "prefix":
        raise UserError(
            f"processor.resize: found 'native' with vision.native and fusion '{config.fusion.kind}'; expected fusion "
            f"'prefix', which reads pictures of several sizes, or resize: squash"
        )
    if not size or (vision is not None and size == vision.image_size):
        return
    if vision is None or not vision.transformer or config.fusion.kind != "none" or size % vision.patch_size:
        raise UserError(
            f"processor.image_size: found {size} with fusion '{config.fusion.kind}'; expected 0, the size of the "
            f"picture tower, or with fusion 'none' and a vision transformer a multiple of its patch_size"
        )


def check_pointing(config) -> None:
    """Masks and boxes ask with the embeddings of a dual encoder, and need to know where each patch is.

    Raises:
        UserError: there is no such embedding, or patches don't stand in their places.
    """
    heads, vision = config.heads, config.vision
    if heads.mask is None and heads.detection is None:
        return
    if config.fusion.kind != "none" or heads.projection is None:
        raise UserError(
            f"heads: found mask or detection with fusion '{config.fusion.kind}' and projection {heads.projection}; "
            f"expected fusion 'none' and heads.projection, whose embeddings they ask with"
        )
    if not vision.transformer or vision.native or vision.patch_dropout:
        raise UserError(
            "heads: found mask or detection with a picture tower of another kind; expected a vision transformer with "
            "neither native nor patch_dropout"
        )


def check_answers(model) -> None:
    """Refuse a model that can't name anything, such as one that only says whether picture and text match.

    Raises:
        UserError: naming the heads.
    """
    if model.language_model is None and model.answers is None and model.projection is None:
        raise UserError(
            "found a model without heads.language_model, answers and projection; expected one of them to answer "
            "questions or name classes; add it to model.architecture.heads, or choose another task"
        )
