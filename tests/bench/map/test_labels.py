from __future__ import annotations

import itertools
import random

from slm.bench.map.labels import Label, arrange_labels, shorten


def boxes(placed):
    """Where the letters are: 6.7 px a character and 12 px a line are what a browser takes at most."""
    for label, (dx, dy) in placed:
        half = 6.7 * len(label.text) / 2
        yield label.x + dx - half, label.y + dy - 6, label.x + dx + half, label.y + dy + 6


def test_no_label_lies_on_another_or_on_a_mark_or_outside():
    chosen = random.Random(0)
    labels = [Label(f"task-number-{i}", chosen.uniform(20, 530), chosen.uniform(20, 500)) for i in range(60)]
    marks = [(label.x, label.y) for label in labels]
    placed = arrange_labels(labels, marks, (0, 0, 550, 520))
    assert 30 <= len(placed) < 60  # the others find no room
    for one, other in itertools.combinations(boxes(placed), 2):
        assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
    for left, top, right, bottom in boxes(placed):
        assert left >= 0
        assert top >= 0
        assert right <= 550
        assert bottom <= 520
        assert not any(left < x < right and top < y < bottom for x, y in marks)


def test_a_dozen_labels_that_are_not_crowded_all_find_room_near_their_points():
    labels = [Label(f"task-{i}", 80 + 120 * (i % 4), 80 + 120 * (i // 4)) for i in range(12)]
    placed = arrange_labels(labels, [(label.x, label.y) for label in labels], (0, 0, 550, 520))
    assert [label for label, _ in placed] == labels
    assert all(abs(dx) < 60 and abs(dy) < 30 for _, (dx, dy) in placed)


def test_long_names_lose_their_middle():
    assert shorten("agnews") == "agnews"
    short = shorten("news-of-the-world-in-english-2024")
    assert (short, len(short)) == ("news-of-the-…nglish-2024", 24)
