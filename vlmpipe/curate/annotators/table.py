"""The one table of annotators, and the config that chooses among them."""

from collections.abc import Collection
from dataclasses import dataclass, field

import cv2

from vlmpipe.curate.annotators.base import Annotator, NoConfig, Tools
from vlmpipe.curate.annotators.caption import Language, PersonalData, Text
from vlmpipe.curate.annotators.embedding import Embeddings, Probe
from vlmpipe.curate.annotators.faces import Faces
from vlmpipe.curate.annotators.negative import NegClipLossConfig
from vlmpipe.curate.annotators.ocr import Ocr, Tmars
from vlmpipe.curate.annotators.picture import Geometry, Hashes, Quality
from vlmpipe.errors import UserError

# In the order in which they are asked: who needs another's columns comes later.
ANNOTATORS: dict[str, type[Annotator]] = {
    "geometry": Geometry, "quality": Quality, "hashes": Hashes, "text": Text, "language": Language,
    "pii": PersonalData, "embeddings": Embeddings, "ocr": Ocr, "tmars": Tmars, "faces": Faces,
}
PROBE = "probe_"
NEEDS = {"tmars": ("ocr", "embeddings"), "probes": ("embeddings",), "neg_clip_loss": ("embeddings",)}


@dataclass(frozen=True)
class AnnotateConfig:
    """Which annotators run: each by its name, with its own config (`{}` for its defaults) or null for off.

    Off by default, as they cost much more than the others or need a file: `neg_clip_loss: {}`, `ocr: {}`, `tmars: {}`
    (needs ocr), `faces: {}`, and `probes: {NAME: {file: …}}`, which makes columns `probe_NAME`. `batch_size` pairs are
    in memory at once, and as many again for each of two batches that `threads` decode beside the models; 0
    threads decode in between.
    """

    batch_size: int = 64
    threads: int = 1
    geometry: NoConfig | None = field(default_factory=NoConfig)
    quality: Quality.Config | None = field(default_factory=Quality.Config)
    hashes: Hashes.Config | None = field(default_factory=Hashes.Config)
    text: Text.Config | None = field(default_factory=Text.Config)
    language: Language.Config | None = field(default_factory=Language.Config)
    pii: NoConfig | None = field(default_factory=NoConfig)
    embeddings: Embeddings.Config | None = field(default_factory=Embeddings.Config)
    neg_clip_loss: NegClipLossConfig | None = None
    ocr: Ocr.Config | None = None
    tmars: NoConfig | None = None
    faces: Faces.Config | None = None
    probes: dict[str, Probe.Config] = field(default_factory=dict)

    def __post_init__(self):
        if self.batch_size < 1 or self.threads < 0:
            raise UserError(f"found batch_size {self.batch_size}, threads {self.threads}; expected at least 1 and 0")
        for name, needed in ((name, needed) for name, several in NEEDS.items() for needed in several):
            if getattr(self, name) and getattr(self, needed) is None:
                raise UserError(f"found {name} without {needed}; expected both; add `{needed}: {{}}` beside it in "
                                f"curation.annotate, or turn {name} off")

    def __hash__(self) -> int:
        return hash(repr(self))  # `probes` is a dict

    def chosen(self) -> dict[str, tuple[type[Annotator], object]]:
        """(class, config) of each annotator that is on, by name, in the order in which they are asked."""
        on = {name: (cls, getattr(self, name)) for name, cls in ANNOTATORS.items() if getattr(self, name) is not None}
        return on | {PROBE + name: (Probe, config) for name, config in self.probes.items()}

    def needed_by(self, name: str) -> tuple[str, ...]:
        """The annotators whose columns an annotator reads."""
        return NEEDS.get("probes" if name.startswith(PROBE) else name, ())

    @property
    def scores(self) -> bool:
        """Whether any annotator asks the scorer."""
        return any(cls.uses_scorer for cls, _ in self.chosen().values())

    def build(self, names: Collection[str], scorer: str) -> dict[str, Annotator]:
        """The named annotators, loaded.

        Raises:
            UserError: a file or a package that one of them needs is not there; it says how to mend or turn it off.
        """
        cv2.setNumThreads(1)  # one item of work a core, as everywhere: more threads would only wait for each other
        prefix = self.embeddings.caption_prefix if self.embeddings else ""
        tools = Tools(scorer, self.batch_size, prefix)
        chosen = {name: both for name, both in self.chosen().items() if name in names}
        return {
            name: Probe(config, tools, name) if cls is Probe else cls(config, tools)
            for name, (cls, config) in chosen.items()
        }
