"""Where a pool's pairs come from: how a source is configured."""

from dataclasses import dataclass, fields
from typing import Literal

from vlmpipe.errors import UserError

FIELDS = {
    "list": (), "folder": ("captions",), "webdataset": ("files", "image"),
    "dataset": ("files", "image", "hub", "subset", "split", "revision"), "documents": (),
}


@dataclass(frozen=True)
class Source:
    """What lies at a pool's `urls`.

    list: URLs with captions. folder: pictures; `captions` is `sidecar` (a.txt or a.json beside a.jpg), `name` (the
    file's name), or a file of names and captions; null takes metadata.{csv,jsonl,parquet} where there is one, else
    sidecars. webdataset: tars; `files` are patterns below `urls` ({00000..00010}.tar), `image` the suffix of the
    picture where a sample holds several. dataset: a Hugging Face dataset, saved or as parquet; `image` is its column,
    `split` its split; or `hub`, an id to stream with `subset` and `revision` (`urls` is then any local file, such as
    the pool's own config). documents: texts with pictures between them, in order.
    """

    kind: Literal["list", "folder", "webdataset", "dataset", "documents"] = "list"
    captions: str | None = None
    files: tuple[str, ...] = ()
    image: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for option in fields(self)[1:]:
            if getattr(self, option.name) and option.name not in FIELDS[self.kind]:
                known = ", ".join(FIELDS[self.kind]) or "nothing else"
                raise UserError(f"found {option.name} with kind {self.kind}; expected {known} with that kind")
        if not self.hub and (self.subset or self.revision):
            raise UserError("found subset or revision without hub; expected a dataset of the hub; set hub")
