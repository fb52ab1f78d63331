"""The one loop: a picture is decoded once, on threads beside the models, and every annotator sees it.

What fails is a value: a row that does not decode has `error` and nulls; an annotator that fails on a row has nulls
there and says why in its `NAME_error`. Legend: N rows of a batch, D of them decoded.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from vlmpipe.curate.annotators.base import Annotator, Batch
from vlmpipe.errors import UserError, disk_full
from vlmpipe.images import NotAnImage, decode_rgb, quiet

AHEAD = 2  # batches that wait, decoded
Item = TypeVar("Item")
Annotators = Mapping[str, Annotator]


class Row(NamedTuple):
    """One downloaded pair: its uid, caption and encoded picture."""

    uid: str
    caption: str
    data: bytes


@dataclass
class Decoded:
    """N rows: `errors` says of each why it did not decode (None: it did); `batch` holds those that did."""

    uids: list[str]
    errors: list[str | None]
    batch: Batch


def error_field(name: str) -> pa.Field:
    return pa.field(f"{name}_error", pa.string())


def schema_of(annotators: Annotators) -> pa.Schema:
    """uid, each annotator's columns and its error, and the error of rows that do not decode."""
    fields = [field for name, one in annotators.items() for field in (*one.fields, error_field(name))]
    return pa.schema([pa.field("uid", pa.string()), *fields, pa.field("error", pa.string())])


def measure(
    batches: Iterator[tuple[list[Row], dict[str, pa.Array]]], annotators: Annotators, threads: int
) -> Iterator[pa.Table]:
    """One table of `schema_of(annotators)` for each batch of rows; with them come known columns that may be needed."""
    schema = schema_of(annotators)
    if not threads:
        for rows, known in batches:
            yield _table(_decoded(rows, known, map), annotators, schema)
        return
    with ThreadPoolExecutor(threads) as pool:
        made = (_prepared(_decoded(rows, known, pool.map), annotators, pool) for rows, known in batches)
        for decoded in ahead(made, AHEAD):
            yield _table(decoded, annotators, schema)


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, made on a thread up to `depth` before they are asked for."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item


# --- decoding ----------------------------------------------------------------------------------------------

def _decoded(rows: Sequence[Row], known: Mapping[str, pa.Array], mapped: Callable) -> Decoded:
    with quiet():
        outcomes = list(mapped(_decode, [row.data for row in rows]))
    errors = [outcome if isinstance(outcome, str) else None for outcome in outcomes]
    fine = [at for at, error in enumerate(errors) if error is None]
    columns = {name: column.take(pa.array(fine, pa.int64())) for name, column in known.items()}
    batch = Batch([outcomes[at] for at in fine], [rows[at].caption for at in fine], columns)
    return Decoded([row.uid for row in rows], errors, batch)


def _decode(data: bytes) -> Image.Image | str:
    try:
        return decode_rgb(data)
    except NotAnImage as error:
        return error.reason


def _prepared(decoded: Decoded, annotators: Annotators, pool: Executor) -> Decoded:
    for name, annotator in annotators.items():
        try:
            decoded.batch.prepared[name] = annotator.prepare(decoded.batch, pool.map)
        except Exception:
            decoded.batch.prepared[name] = None  # the call prepares for itself, where each pair's failure is its own
    return decoded


# --- asking ------------------------------------------------------------------------------------------------

def _table(decoded: Decoded, annotators: Annotators, schema: pa.Schema) -> pa.Table:
    measured: list[pa.Array] = []
    for annotator in annotators.values():
        arrays = ask(annotator, decoded.batch) if len(decoded.batch) else _nothing(annotator)
        decoded.batch.columns |= {field.name: array for field, array in zip(annotator.fields, arrays)}
        measured += arrays
    fine = np.array([error is None for error in decoded.errors])
    spread = [_spread(array, fine) for array in measured]
    return pa.Table.from_arrays(
        [pa.array(decoded.uids, pa.string()), *spread, pa.array(decoded.errors, pa.string())], schema=schema
    )


def _nothing(annotator: Annotator) -> list[pa.Array]:
    return [pa.array([], field.type) for field in (*annotator.fields, error_field(""))]


def _spread(array: pa.Array, here: np.ndarray) -> pa.Array:
    """The values at the places that are `here`, nulls between them."""
    return array.take(pa.array(np.cumsum(here) - 1, mask=~here))  # a null index takes a null


def ask(annotator: Annotator, batch: Batch) -> list[pa.Array]:
    """The annotator's columns and its errors: arrays of its fields and strings, each [D].

    Raises:
        UserError: the annotator can't be used as it is configured, or the memory is too small.
    """
    missing = _missing(annotator, batch)
    here = np.array([reason is None for reason in missing])
    if here.all():
        return _answers(annotator, batch)
    errors = pa.array(missing, pa.string())
    if not here.any():
        return [*(pa.nulls(len(batch), field.type) for field in annotator.fields), errors]
    *found, reasons = (_spread(array, here) for array in _answers(annotator, batch.take(np.flatnonzero(here))))
    return [*found, pc.coalesce(reasons, errors)]


def _missing(annotator: Annotator, batch: Batch) -> list[str | None]:
    """Of each pair the first needed column that it has no value in, as a reason."""
    missing: list[str | None] = [None] * len(batch)
    for name in reversed(annotator.needs):
        for at in np.flatnonzero(batch.columns[name].is_null().to_numpy(zero_copy_only=False)):
            missing[at] = f"no {name}"
    return missing


def _answers(annotator: Annotator, batch: Batch) -> list[pa.Array]:
    try:
        return _finite(annotator, annotator(batch))
    except (UserError, MemoryError):
        raise
    except Exception as error:
        _refuse_fatal(error)
        if len(batch) == 1:
            nulls = [pa.nulls(1, field.type) for field in annotator.fields]
            return [*nulls, pa.array([_reason(error)], pa.string())]
    rows = [_answers(annotator, batch.take([at])) for at in range(len(batch))]
    return [pa.concat_arrays(column) for column in zip(*rows)]


def _refuse_fatal(error: Exception) -> None:
    """What is no fault of a pair goes on up."""
    if disk_full(error):
        raise error
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported where no model runs
        raise UserError(f"the accelerator's memory is too small ({_reason(error)}); expected room for a batch; lower "
                        f"curation.annotate.batch_size: finished shards are kept") from None


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:200]


def _finite(annotator: Annotator, arrays: Sequence[pa.Array]) -> list[pa.Array]:
    """The arrays with nulls where a number is not finite, and the reasons."""
    count, settled = len(arrays[0]), []
    reasons: list[str | None] = [None] * count
    for field, array in zip(annotator.fields, arrays, strict=True):
        bad = _not_finite(array, count)
        for at in np.flatnonzero(bad):
            reasons[at] = reasons[at] or f"not finite: {field.name}"
        settled.append(_spread(array.filter(pa.array(~bad)), ~bad) if bad.any() else array)
    return [*settled, pa.array(reasons, pa.string())]


def _not_finite(array: pa.Array, count: int) -> np.ndarray:
    """bool [N]: a number, or one of a list, is NaN or infinite. A null is no number."""
    values = array.flatten() if pa.types.is_fixed_size_list(array.type) else array
    if not pa.types.is_floating(values.type):
        return np.zeros(count, bool)
    if array.null_count:
        filled = _not_finite(array.drop_null(), count - array.null_count)
        bad = np.zeros(count, bool)
        bad[array.is_valid().to_numpy(zero_copy_only=False)] = filled
        return bad
    return ~np.isfinite(values.to_numpy(zero_copy_only=False)).reshape(count, -1).all(axis=1)
