"""Secrets are masked in whatever way a file spells them."""

import html
import json

import jinja2
import pytest

from indiclip import masking


@pytest.mark.parametrize("spell", [str, json.dumps, html.escape, lambda text: json.dumps(text, ensure_ascii=False)])
def test_a_secret_is_masked_as_text_html_and_json_have_it(spell, monkeypatch):
    monkeypatch.setattr(masking, "_known", {})
    monkeypatch.setenv("THE_KEY", secret := """pä&ss"<wörd'>""")
    masking.remember_variables(["${oc.env:THE_KEY}"])
    assert masking.mask(spell(f"key {secret}")) == spell("key SECRET").replace("SECRET", "${oc.env:THE_KEY}")
    page = jinja2.Environment(autoescape=True).from_string("{{ key }}").render(key=secret)
    assert masking.mask(page) == "${oc.env:THE_KEY}"
