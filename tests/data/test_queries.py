"""Phrases about pictures, made of expressions and of labels."""

import numpy as np

from vlmpipe.data.masks import Polygons, Rle
from vlmpipe.data.queries import queries_of_detections, queries_of_regions
from vlmpipe.data.records import DetectionRecord, RegionRecord

SIZE = (64, 32)
LEFT = Polygons(32, 64, ((0, 0, 32, 0, 32, 32, 0, 32),))


def test_queries_of_regions():
    record = RegionRecord("1", "a", SIZE, ("left", "the left half"), (0, 0, 32, 32), LEFT)
    assert [query.phrase for query in queries_of_regions([record])] == ["left", "the left half"]
    assert queries_of_regions([record])[0].masks == (LEFT,)


def test_queries_of_detections_leave_out_crowds_and_ask_for_what_is_not_there():
    boxes = np.array([(0, 0, 32, 32), (0, 0, 9, 9), (1, 1, 5, 5), (2, 2, 6, 6)], np.float32)
    masks = (LEFT, Rle.of_pixels(np.zeros((32, 64), bool)), None, LEFT)
    crowds = np.array([False, False, True, False])
    first = DetectionRecord("1", "a", SIZE, boxes, ("cat", "dog", "sheep", "cat"), crowds, masks)
    second = DetectionRecord("2", "b", SIZE, boxes[:0], (), crowds[:0], ())
    queries = queries_of_detections([first, second], absent=2)
    found = [(query.image, query.phrase, len(query.boxes)) for query in queries]
    assert found[:2] == [("a", "cat", 2), ("a", "dog", 1)]
    assert queries[0].masks == (LEFT, LEFT)
    assert len(queries) == 4 and {query.image for query in queries[2:]} == {"b"}
    assert all(query.boxes == () for query in queries[2:])
    assert queries == queries_of_detections([first, second], absent=2)
