"""What is a language's name, and which of a sample's captions is its caption, where it has several.

In training the languages of an image take turns, in an order that is drawn anew for every round: after as many epochs
as it has languages, an image was seen with each of them once, and every batch mixes them. Within a language its texts
take turns from round to round in the same way. The draw is a function of the plan's place alone, so it is the same
after a resume and with other numbers of workers and ranks; and it is no function of the augmentation's seed, so that no
language sees other crops.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import langcodes
import yaml

from indiclip.datasets.tables import stable_hash
from indiclip.names import shorten
from indiclip.types import Sample

NAMES: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
OF_INDIA: list[str] = NAMES["of_india"]
_SPEAKERS = 1_000_000
_UNKNOWN = ("und", "mul", "mis", "zxx")  # BCP-47's tags of what is no language, or not one


@lru_cache(maxsize=4096)
def language_tag(name: str) -> str:
    """The standard form of a BCP-47 tag (`hi`, `hi-Latn`; of `ta_IN` `ta-IN`), or the tag of a language of India that
    is called by its English or own name (`Tamil`); "" of anything else.
    """
    try:
        if langcodes.tag_is_valid(name):
            tag = langcodes.standardize_tag(name)
            return "" if tag.partition("-")[0] in (*_UNKNOWN, "x") else tag
        found = langcodes.find(name)
    except (ValueError, LookupError):
        return ""
    # Other names are words too ("Male" is Malay), and langcodes finds the "Hindi" of "Hindi or so".
    return found.to_tag() if found.to_tag() in OF_INDIA and " " not in name else ""


def declared_language(found: Any) -> str:
    """The tag of the language that a user's file says a text is in; "" where it says that it is unknown.

    Raises:
        ValueError: It is no language's code or name.
    """
    tag = language_tag(found) if isinstance(found, str) else ""
    if found not in (None, "", *_UNKNOWN) and not tag:
        raise ValueError(f"found the language {shorten(found)}; expected a code such as hi or hi-Latn")
    return tag


def caption_language(column: str) -> str:
    """The language that a column is taken to have captions in, by its name alone; "" where it is not.

    Of the codes with a meaning only those of India's languages and of languages with a million speakers are taken
    (`key` and `url` are codes too), and of these not the `other_words` of languages.yaml, such as `id` and `cat`.
    """
    tag = language_tag(column)
    if not tag or column.lower() in NAMES["other_words"]:
        return ""
    language = tag.partition("-")[0]
    return tag if language in OF_INDIA or langcodes.get(language).speaking_population() >= _SPEAKERS else ""


def draw_caption(sample: Sample, stream: str, epoch: int = 0) -> Sample:
    """The sample with one of its `captions` as `caption`, and its `language` where that is known.

    A sample without `captions` stays as it is.

    Args:
        stream: Names the image. Two streams have their languages in independent orders.
        epoch: How many times the image was seen before.
    """
    captions = sample.get("captions")
    if not captions:
        return sample
    if not isinstance(captions, dict) or any(isinstance(texts, str) for texts in captions.values()):
        found = shorten(captions)  # a text would be taken for a list of letters
        raise ValueError(f"captions of sample {sample['key']!r}: found {found}; expected lists of texts by language")
    rounds, turn = divmod(epoch, len(captions))
    # By a hash for each language: another language moves only the images that get it.
    order = sorted(captions, key=lambda language: stable_hash(f"{stream}:{rounds}:{language}"))
    language, texts = order[turn], captions[order[turn]]
    cycle, turn = divmod(rounds, len(texts))
    texts = sorted(texts, key=lambda text: stable_hash(f"{stream}:{cycle}:{language}:{text}"))
    drawn = sample | Sample(caption=texts[turn])
    return drawn | Sample(language=language) if language else drawn
