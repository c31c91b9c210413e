"""Pages: whole, self-contained, for phones, light and dark; pictures that serve both."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from arriero.pages.page import Cell, Column, Section, render, table
from arriero.pages.pictures import Mark, Panel, picture
from arriero.pages.scales import plot_shares
from arriero.pages.style import DARK, LIGHT

VOID = {"meta", "br", "wbr", "path", "use", "image", "rect", "line"}
CIRCUMSTANCES = {
    "date": "2031-05-01T03:00:00Z",
    "command": "arriero check <a> & b",
    "machine": {"processor": "AMD EPYC", "processors": 2, "memory_bytes": 64e9, "system": "Linux x86_64"},
    "versions": {"arriero": "0.1.0"},
}


class Nesting(HTMLParser):
    """Checks that every element that opens also closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    panel = Panel(title="SQNR", draw=lambda axes: axes.plot([0, 1], [1, 2]), below="layer")
    drawn = picture([panel], label="a picture", legend=[Mark(colour="c1", words="attention")])
    body = table([Column(name="weight", breaks=True), Column(name="dB", numeric=True)], [["a.<b>", Cell(text="1")]])
    sections = [Section(title="Errors", text="Of <all>.", body=drawn), Section(title="All", body=body, folded=True)]
    return render(title="x passes", outcome="pass", lead="Lead & more.", sections=sections, circumstances=CIRCUMSTANCES)


def test_a_page_has_one_heading_and_ends_with_its_circumstances(page: str) -> None:
    parser = Nesting()
    parser.feed(page)
    assert not parser.open
    assert page.count("<h1") == 1
    assert page.index("<h1") < page.index("<h2")
    footer = page.partition("<footer>")[2]
    order = [
        "2031-05-01 03:00:00 UTC",
        "arriero check &lt;a&gt; &amp; b",
        "AMD EPYC, 2 processors, 64 GB",
        "arriero 0.1",
    ]
    places = [footer.index(text) for text in order]
    assert places == sorted(places)


def test_a_page_fits_a_phone_and_a_dark_room(page: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert "overflow-x: auto" in page
    assert "http" not in page
    assert "<b>" not in page.replace("&lt;b&gt;", "")


def test_pictures_have_the_pages_colours_alone(page: str) -> None:
    svg = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert svg is not None
    assert not re.findall(r"#[0-9a-f]{6}", svg[0])
    assert set(re.findall(r"var\(--(\w+)\)", svg[0])) <= set(LIGHT)
    assert "var(--c1)" in svg[0]
    assert ">layer</text>" in svg[0]  # letters stay letters


def luminance(colour: str) -> float:
    parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_letters_and_lines_stand_out_from_the_paper(colours: dict[str, str]) -> None:
    """The ratios of WCAG 2.1: 4.5 for text, 3 for graphics."""

    def contrast(name: str) -> float:
        first, second = sorted((luminance(colours["paper"]), luminance(colours[name])))
        return (second + 0.05) / (first + 0.05)

    for name in ("ink", "faint", "good", "bad", "open"):
        assert contrast(name) >= 4.5, name
    for name in (f"c{number}" for number in range(1, 8)):
        assert contrast(name) >= 3, name


def test_one_map_serves_8_experts_and_128_in_48_layers() -> None:
    levels = ((1.0, "up to 1 %"), (5.0, "1–5 %"), (100.0, "over 5 %"))
    for rows, experts, labelled in ((4, 8, True), (48, 128, False)):
        shares = np.full((rows, experts), 0.4)
        shares[0, 0], shares[1, 1] = 77, np.nan
        drawn = plot_shares(shares, range(rows), levels, label="moved", empty="no token")
        assert (">77</text>" in drawn) == labelled
        assert drawn.count("<svg") == 2
        assert "no token" in drawn
        assert len(drawn) < 200_000
