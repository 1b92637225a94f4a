"""Pictures for reports: the right one, small, and none where there is none."""

import numpy as np
from layout_files import jpeg, write

from indiclip.evals.cards.card import load_card
from indiclip.evals.images.items import FileImages, Items
from indiclip.evals.reports.pictures import Pictures, thumbnail
from indiclip.evals.results import PHOTOGRAPHS, PROCEDURAL


def test_a_thumbnail_is_no_larger_than_asked_and_never_enlarged():
    wide = np.zeros((100, 400, 3), np.uint8)
    assert thumbnail(wide, 40).shape == (10, 40, 3)
    assert thumbnail(wide[:1], 40).shape == (1, 40, 3)
    assert np.array_equal(thumbnail(wide, 400), wide)


def test_pictures_are_those_of_card_part_and_key(tmp_path):
    write(tmp_path, {"a.jpg": jpeg(4), "b.jpg": jpeg(20), "broken.jpg": jpeg(1)[:40]})
    names, card = ["a.jpg", "b.jpg", "broken.jpg"], load_card("indian_colours")
    photographs = Items(card, FileImages(tmp_path, names), names, np.zeros(3, np.int64))
    drawn = Items(card, [np.full((4, 6, 3), 7, np.uint8)], ["a.jpg"], np.zeros(1, np.int64), procedural=True)
    picture = Pictures([photographs, drawn], max_side=6)
    for key, red in (("a.jpg", 36), ("b.jpg", 180)):
        found = picture(card.id, PHOTOGRAPHS, key)
        assert found.shape == (4, 6, 3)
        assert abs(found[..., 0].mean() - red) < 5  # JPEG's rounding
    assert (picture(card.id, PROCEDURAL, "a.jpg") == 7).all()
    for nothing in ((card.id, PHOTOGRAPHS, "broken.jpg"), (card.id, PROCEDURAL, "b.jpg"), ("x", PHOTOGRAPHS, "a.jpg")):
        assert picture(*nothing) is None
