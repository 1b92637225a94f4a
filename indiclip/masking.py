"""Secrets in what others will read: passwords and signatures of URLs, and values of environment variables.

Every writer of URLs, messages and config values calls `mask`; `mask_written` is for what a config keeps.
"""

import html
import json
import os
import re
from collections.abc import Iterable

MASK = "***"
_LEAST = 6  # characters; a shorter value is a number or a word, and may be part of any text
_END = r"[^\s'\"<>]"
_URL = re.compile(
    rf"\b(?P<scheme>\w[\w+.-]*)://(?P<user>[^/\s?#'\"<>]*@)?(?P<path>[^\s?#'\"<>]*)(?P<query>[?#]{_END}+)?"
)
_SIGNED = re.compile(r"[?&#][^=&]*(sig|token|key|secret|pass|credential)[^=&]*=", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)")
_known: dict[str, str] = {}  # a spelling of a value -> how a config names it


def remember_variables(written: Iterable[str]) -> None:
    """Mask from now on the values of the environment variables that these strings of a config name."""
    for name in {name for text in written for name in _VARIABLE.findall(text)}:
        value = os.environ.get(name, "")
        if len(value) >= _LEAST and not os.path.exists(value):  # noqa: PTH110 (any text, also one too long for a path)
            _known.update(dict.fromkeys(_spellings(value), f"${{oc.env:{name}}}"))


def mask(text: str) -> str:
    """A text without passwords and signatures of URLs, and with `${oc.env:NAME}` for what a config took from there."""
    for value, name in _known.items():
        text = text.replace(value, name)
    return _URL.sub(_masked, text)


def mask_written(written: str, value: str) -> str:
    """The same for a string of a config: references stay, so that who has the variables can go on from it.

    Args:
        written: As the config has it.
        value: What it stands for.
    """
    masked = _URL.sub(_masked, written)
    _, mark, query = value.partition("?")
    if mark and query and masked.endswith(mark + query) and mask(value) != value:  # `${oc.env:SERVER}/a.tar?sig=...`
        return masked.removesuffix(query) + MASK
    return masked


def is_masked(text: str) -> bool:
    """Whether something was taken out of a URL."""
    return f"://{MASK}@" in text or any(f"{mark}{MASK}" in text for mark in "?#")


def without_secrets(url: str) -> str:
    """The part of a URL that names the file: no password, no signature, no mark in their place."""
    return mask(url).replace(f"://{MASK}@", "://").partition("?")[0].partition("#")[0]


def _spellings(value: str) -> set[str]:
    """A value as text, HTML and JSON have it."""
    in_json = {json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}
    in_html = html.escape(value)
    in_jinja = in_html.replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
    return {value, in_html, in_jinja, *in_json}


def _masked(found: re.Match[str]) -> str:
    scheme, user, path, query = (part or "" for part in found.groups())
    is_web = scheme.lower() in ("http", "https")
    # `abfs://container@account` and `hdfs://user@host` are no secrets.
    if user and "${" not in user and (is_web or ":" in user):
        user = f"{MASK}@"
    if query and "${" not in query and (is_web or _SIGNED.search(query)):
        stop = re.search(r"[:,.;)\]]*$", query)  # of the sentence around
        assert stop is not None
        query = f"{query[0]}{MASK}{stop[0] if stop.start() else ''}"
    return f"{scheme}://{user}{path}{query}"
