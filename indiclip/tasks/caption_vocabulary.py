"""The ids of a caption decoder: those of any tokenizer, and behind them its own.

Its own are those that not every tokenizer has: the end of a text, what a sequence is to be, the mask of parallel
prediction, places in the image, and the letters of language codes. A language is written as its code, so that any may
come, without a list and in whatever script the tokenizer reads; `hi` and `hi-Latn` begin alike. LocCa (Wan et al.,
NeurIPS 2024, arXiv:2403.19596) writes places as numbers in the words of its tokenizer; here they are ids of their own,
as in Pix2seq (Chen et al., ICLR 2022, arXiv:2109.10852): a tokenizer that was trained on captions need not know digits,
and a box is four tokens with any of them.
"""

import string
from collections.abc import Sequence

_CODE_LETTERS = string.ascii_lowercase + string.digits + "-"
_LONGEST_CODE = 35  # letters of a language code (RFC 5646, section 4.4.1)


class CaptionVocabulary:
    """Ids, and sequences of them.

    Args:
        text_ids: The tokenizer's `vocab_size`.
        num_bins: Places along each side of an image, of which a box's coordinates are the nearest.

    Attributes:
        end: Ends what is predicted.
        caption: Begins the image's caption.
        refer: Begins a name, behind which the box of a thing of this name follows.
        ground: Begins a box, behind which its name follows.
        mask: Stands where parallel prediction must not look.
        size: Number of all ids.
        longest_prompt: Ids before a caption.
    """

    def __init__(self, text_ids: int, num_bins: int) -> None:
        self.num_bins = num_bins
        # Behind the tokenizer's, so that what a caption may be made of is one range.
        self.end, self.caption, self.refer, self.ground, self.mask = range(text_ids, text_ids + 5)
        self._first_letter = self.mask + 1
        self._first_bin = self._first_letter + len(_CODE_LETTERS)
        self.size = self._first_bin + num_bins
        self.longest_prompt = 1 + _LONGEST_CODE

    @property
    def texts(self) -> slice:
        """Of what a predicted text is made: the tokenizer's ids and the end."""
        return slice(0, self.end + 1)

    @property
    def places(self) -> slice:
        """Of what a predicted box is made."""
        return slice(self._first_bin, self.size)

    def caption_prompt(self, language: str) -> list[int]:
        """What stands before a caption in a language; its code is "" where it is unknown."""
        letters = [letter for letter in language.lower()[:_LONGEST_CODE] if letter in _CODE_LETTERS]
        return [self.caption, *(self._first_letter + _CODE_LETTERS.index(letter) for letter in letters)]

    def box(self, box_xyxy: Sequence[float], size_hw: tuple[int, int]) -> list[int]:
        """The four ids of a box in an image of this size."""
        height, width = size_hw
        shares = [place / side for place, side in zip(box_xyxy, (width, height) * 2, strict=True)]
        return [self._first_bin + min(max(int(share * self.num_bins), 0), self.num_bins - 1) for share in shares]

    def box_xyxy(self, ids: Sequence[int], size_hw: tuple[int, int]) -> list[float]:
        """The box of four such ids: the middles of their bins, whichever corner is written first."""
        height, width = size_hw
        x1, y1, x2, y2 = ((id - self._first_bin + 0.5) / self.num_bins for id in ids)
        return [min(x1, x2) * width, min(y1, y2) * height, max(x1, x2) * width, max(y1, y2) * height]
