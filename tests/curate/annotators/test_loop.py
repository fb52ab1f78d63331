"""The loop: what fails is a value with a reason, whatever fails; order and bytes do not depend on threads."""

import threading

import numpy as np
import pyarrow as pa
import pytest

from tests.curate.made_pools import jpeg, picture
from vlmpipe.curate.annotators.base import Annotator, Batch, NoConfig, Tools
from vlmpipe.curate.annotators.loop import Row, ahead, ask, measure
from vlmpipe.errors import UserError


class Length(Annotator):
    """The caption's length, in its own way for some captions."""

    fields = (pa.field("length", pa.float32()), pa.field("pair", pa.list_(pa.float16(), 2)))

    def __call__(self, batch: Batch) -> list[pa.Array]:
        if "crash" in batch.captions:
            raise ZeroDivisionError("of  all\nthings")
        values = np.array([np.nan if text == "nan" else len(text) for text in batch.captions], np.float32)
        pairs = np.stack([values, np.where(values == 3, np.inf, values)], axis=1).astype(np.float16)
        return [pa.array(values), pa.FixedSizeListArray.from_arrays(pa.array(pairs.reshape(-1)), 2)]


class Double(Annotator):
    needs = ("length",)
    fields = (pa.field("double", pa.float32()),)

    def __call__(self, batch: Batch) -> list[pa.Array]:
        assert batch.columns["length"].null_count == 0
        return [pa.array(batch.columns["length"].to_numpy() * 2)]


class Broken(Annotator):
    fields = (pa.field("broken", pa.int32()),)

    def __init__(self, error: Exception):
        super().__init__(NoConfig(), Tools())
        self.error = error

    def __call__(self, batch: Batch) -> list[pa.Array]:
        raise self.error


def made(cls) -> Annotator:
    return cls(NoConfig(), Tools())


def table(captions, annotators, threads=1, size=4, broken=()):
    rows = [Row(str(n), text, b"no picture" if n in broken else jpeg(picture(n))) for n, text in enumerate(captions)]
    batches = ((rows[at : at + size], {}) for at in range(0, len(rows), size))
    return pa.concat_tables(measure(batches, annotators, threads)).to_pylist()


def test_one_bad_pair_costs_itself_only():
    found = table(["a", "crash", "bb"], {"length": made(Length)})
    assert [row["length"] for row in found] == [1, None, 2]
    assert [row["pair"] for row in found] == [[1, 1], None, [2, 2]]
    assert [row["length_error"] for row in found] == [None, "ZeroDivisionError: of all things", None]
    assert [row["error"] for row in found] == [None] * 3


def test_numbers_that_are_not_finite_are_nulls_with_a_reason():
    found = table(["nan", "abc", "ok"], {"length": made(Length)})
    by_text = [(row["length"], row["pair"], row["length_error"]) for row in found]
    assert by_text[0] == (None, None, "not finite: length")
    assert by_text[1] == (3, None, "not finite: pair")
    assert by_text[2] == (2, [2, 2], None)


def test_who_needs_a_missing_value_is_not_asked():
    found = table(["a", "crash", "bb", "nan"], {"length": made(Length), "double": made(Double)})
    assert [row["double"] for row in found] == [2, None, 4, None]
    assert [row["double_error"] for row in found] == [None, "no length", None, "no length"]
    none = table(["crash"], {"length": made(Length), "double": made(Double)})
    assert none[0]["double_error"] == "no length"


def test_a_row_that_does_not_decode_has_nulls_in_its_place():
    found = table(["a", "bb", "ccc"], {"length": made(Length)}, broken={1})
    assert [row["error"] for row in found] == [None, "not_an_image", None]
    assert [row["length"] for row in found] == [1, None, 3]
    assert table(["a"], {"length": made(Length)}, broken={0})[0]["error"] == "not_an_image"


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_change_nothing(threads):
    captions = ["a" * n for n in range(1, 12)]
    annotators = {"length": made(Length), "double": made(Double)}
    assert table(captions, annotators, threads, broken={4}) == table(captions, annotators, 0, broken={4})


def test_what_is_no_pairs_fault_goes_up():
    batch = Batch([], ["a", "b"])
    for error in (UserError("found x"), MemoryError(), OSError(28, "full")):
        with pytest.raises(type(error)):
            ask(Broken(error), batch)
    out_of_memory = type("OutOfMemoryError", (RuntimeError,), {})
    with pytest.raises(UserError, match=r"lower curation\.annotate\.batch_size"):
        ask(Broken(out_of_memory("CUDA")), batch)


def test_items_are_made_ahead_and_no_further():
    made_so_far, released = [], threading.Event()

    def items():
        for number in range(5):
            made_so_far.append(number)
            if number == 1:
                released.set()
            yield number

    wanted = ahead(items(), 2)
    assert next(wanted) == 0 and released.wait(5)
    assert list(wanted) == [1, 2, 3, 4] and made_so_far == [0, 1, 2, 3, 4]


def test_what_is_raised_ahead_is_raised_here():
    def items():
        yield 1
        raise UserError("found a damaged shard")

    wanted = ahead(items(), 2)
    assert next(wanted) == 1
    with pytest.raises(UserError, match="damaged"):
        next(wanted)
