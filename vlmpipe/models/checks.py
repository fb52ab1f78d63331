"""Which parts of a model go together, where one config can't know of the other."""

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
    if cross is not None and (config.heads.language_model is None) == (config.heads.image_tokens is None):
        raise UserError(f"heads: found {config.heads} with fusion '{kind}'; expected language_model or image_tokens")
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
