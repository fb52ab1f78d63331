"""Readers of official dataset files, by the name of what they read. Formats and quirks: docs/data.md."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vlmpipe.data.readers.clevr import read_clevr
from vlmpipe.data.readers.coco import read_coco_captions, read_coco_instances
from vlmpipe.data.readers.contrast import read_sugarcrepe, read_winoground
from vlmpipe.data.readers.folders import read_folders
from vlmpipe.data.readers.karpathy import read_karpathy
from vlmpipe.data.readers.listings import read_listing
from vlmpipe.data.readers.nlvr import read_nlvr, read_nlvr2
from vlmpipe.data.readers.pope import read_pope
from vlmpipe.data.readers.refcoco import read_refcoco
from vlmpipe.data.readers.textvqa import read_textcaps, read_textvqa
from vlmpipe.data.readers.videos import read_video_questions
from vlmpipe.data.readers.vizwiz import read_vizwiz
from vlmpipe.data.readers.vqav2 import read_vqav2
from vlmpipe.data.records import Record

READERS: dict[str, Callable[[Path], Sequence[Record]]] = {
    "coco_captions": read_coco_captions,
    "coco_instances": read_coco_instances,
    "karpathy": read_karpathy,
    "conceptual_captions": read_listing,
    "laion": read_listing,
    "pmd": read_listing,
    "vqav2": read_vqav2,
    "nlvr2": read_nlvr2,
    "nlvr": read_nlvr,
    "textvqa": read_textvqa,
    "textcaps": read_textcaps,
    "clevr": read_clevr,
    "vizwiz": read_vizwiz,
    "refcoco": read_refcoco,
    "video_qa": read_video_questions,
    "folders": read_folders,
    "sugarcrepe": read_sugarcrepe,
    "winoground": read_winoground,
    "pope": read_pope,
}
