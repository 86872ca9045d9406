"""The pages, in a real browser: nothing from the network, no faults, readable on a phone, and true to the board."""

from __future__ import annotations

import json
import re

import browser
import pytest
import toy_house

from common import claims, scoreboard
from pipelines import site
from pipelines.site.plot import interval_plot

house = toy_house.house
chromium = browser.chromium

# WCAG 2, level AA: relative luminances of text and background must differ by this factor for small text.
READABLE = 4.5


@pytest.fixture
def pages(house):
    """The site of a house with two profiles, a benchmark and an executed notebook; figures beside it."""
    toy_house.write_results(house, "toy", "laptop", toy_house.metrics(-3.0))
    rows = [{"op": "ct.project", "peer": "astra linear", "ratio": 71.2345, "detail": {"a": 1}}]
    (house / "results/bench.json").write_text(json.dumps({"machine": "two cores", "rows": rows}))
    (house / "results/gpu").mkdir()
    (house / "results/gpu/h200.json").write_text(json.dumps({"checks": [{"kernel": "ct", "passed": True}]}))
    notebook = house / "results/runs/toy/smoke/notebook.html"
    notebook.parent.mkdir(parents=True)
    notebook.write_text("<title>executed</title>")
    site.build(scoreboard.collect(["toy", "other"], "smoke"))
    return house / "results" / "site"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1200])
@pytest.mark.parametrize("name", ["index", "toy", "other"])
def test_a_page_is_whole_at_every_width(pages, chromium, name, width, dark):
    with browser.Visit(chromium, width, dark=dark) as visit:
        visit.page.goto((pages / f"{name}.html").as_uri())
        visit.page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        for image in visit.page.locator("img[loading]").all():
            image.scroll_into_view_if_needed()
            image.evaluate("(picture) => picture.decode()")  # rejects when it cannot be shown
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
        assert unreadable(visit.page) == []
        assert visit.faults == []


def test_the_checks_of_a_page_bite(pages, chromium):
    page = pages / "index.html"
    spoiled = '<img src="gone.png"><img src="https://example.org/x.png"><p style="width:900px;color:#ddd">pale</p>'
    page.write_text(page.read_text().replace("</main>", spoiled + "<script>nothing()</script></main>"))
    with browser.Visit(chromium, 390) as visit:
        visit.page.goto(page.as_uri())
        assert visit.page.evaluate("document.documentElement.scrollWidth") > 390
        assert any("pale" in text for text in unreadable(visit.page))
        told = " ".join(visit.faults)
        assert "gone.png" in told and "asked the network" in told and "nothing" in told


def test_the_browser_shows_each_claims_verdict_and_numbers(pages, chromium):
    board = json.loads(scoreboard.to_json(scoreboard.collect(["toy"], "smoke")))
    rows = {(row["id"], row["profile"]): row for row in board["claims"]}
    with browser.Visit(chromium, 390) as visit:
        visit.page.goto((pages / "toy.html").as_uri())
        cards = visit.page.locator("li.claim")
        assert cards.count() == 6
        shown = {card.get_attribute("id"): card for card in cards.all()}
        refuted = shown["teacher-helps"]
        assert "refuted" in refuted.locator(".badge").inner_text()
        assert rows["teacher-helps", "laptop"]["reason"] in refuted.inner_text()
        assert "reproduced" in refuted.locator("details").text_content()  # the lower profile, beside it
        assert not shown["psnr-18"].is_visible()  # untested claims wait behind one line
        shown["psnr-18-small"].locator("a").first.click()  # "stands in for" leads to one and opens it
        assert shown["psnr-18"].is_visible()
        assert "not tested" in shown["psnr-18"].locator(".badge").inner_text()
        assert shown["psnr-18"].locator("svg").count() == 0


def test_a_figure_enlarges_and_closes_without_leaving_the_page(pages, chromium):
    with browser.Visit(chromium, 390) as visit:
        visit.page.goto((pages / "toy.html").as_uri())
        figure = visit.page.locator("figure a").first
        figure.scroll_into_view_if_needed()
        before = figure.locator("img").bounding_box()["width"]
        figure.click()
        large = visit.page.locator("dialog img")
        assert large.is_visible() and large.bounding_box()["width"] > before
        large.click()
        assert not large.is_visible() and visit.page.url.endswith("toy.html")
        assert visit.faults == []


def test_every_local_link_leads_somewhere(pages):
    for page in pages.glob("*.html"):
        text = page.read_text()
        for target in re.findall(r'(?:href|src)="([^"]*)"', text):
            if target.startswith(("https://", "data:")):
                continue
            path, _, anchor = target.partition("#")
            file = (pages / path) if path else page
            assert file.is_file(), f"{page.name} links to {target}"
            assert not anchor or f'id="{anchor}"' in file.read_text(), f"{page.name} links to {target}"


def test_what_the_paper_says_is_there_and_escaped(pages):
    text = (pages / "toy.html").read_text()
    assert "&lt;with &amp; without&gt;" in text and "<with & without>" not in text
    assert "resparse run toy --profile laptop" in text
    assert "both behind a switch" in text and "Phantoms instead of patients" in text
    assert "../runs/toy/smoke/notebook.html" in text and "runs/toy/laptop" not in text
    assert "0123456789abcdef" in text and "https://arxiv.org/abs/2301.00001" in text


def test_benchmarks_and_gpu_results_are_tables(pages):
    text = (pages / "index.html").read_text()
    assert "<td>71.23</td>" in text and "two cores" in text
    assert "h200: checks" in text and "<td>yes</td>" in text


def test_a_paper_chooses_the_figure_that_stands_for_it(house, pages):
    assert "laptop/reconstructions.png" in (pages / "index.html").read_text()
    about = house / "papers/toy/paper.yaml"
    about.write_text(about.read_text() + "\ncover: curves\n")
    site.build(scoreboard.collect(["toy", "other"], "smoke"))
    text = (pages / "index.html").read_text()
    assert "laptop/curves.png" in text and "reconstructions.png" not in text


def test_pages_without_results_still_stand(house):
    (house / "results/figures/toy/smoke/figures.json").write_text("{broken")
    (house / "results/bench.json").write_text("[]")
    written = site.build(scoreboard.collect(["toy", "other"], "smoke"))
    assert [path.name for path in written] == ["index.html", "toy.html", "other.html"]
    assert "Nothing is measured yet" in written[2].read_text() and "Benchmarks" not in written[0].read_text()


def test_the_interval_is_drawn_where_it_lies(house):
    """Positions along the axis keep the order of the values: band's border, then the interval, its mean inside."""
    entry = scoreboard.collect(["toy"], "smoke").entries[0]
    claim = next(claim for claim in entry.claims if claim.id == "teacher-helps")
    row = entry.at("teacher-helps", "smoke")
    assert row.verdict == claims.REPRODUCED
    drawing = str(interval_plot(claim, row))
    border = float(re.search(r'class="border" x1="([\d.]+)"', drawing)[1])
    bar = re.search(r'<g class="measured reproduced"><line x1="([\d.]+)" x2="([\d.]+)"', drawing)
    dot = float(re.search(r'<circle cx="([\d.]+)"', drawing)[1])
    assert border < float(bar[1]) < dot < float(bar[2])
    assert f"measured {scoreboard.measured(row)}" in drawing


def unreadable(page):
    """Texts whose contrast with the background behind them is below `READABLE`."""
    return page.evaluate(
        """(least) => {
          const channels = (color) => color.match(/[\\d.]+/g).map(Number);
          const light = (color) => {
            const [r, g, b] = channels(color).slice(0, 3).map((value) => {
              const part = value / 255;
              return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const behind = (element) => {
            for (let at = element; at; at = at.parentElement) {
              const color = getComputedStyle(at).backgroundColor;
              if (channels(color)[3] !== 0) return color;
            }
            return "rgb(255, 255, 255)";
          };
          const faults = [];
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (walker.nextNode()) {
            const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
            if (!text || element.closest("script, style, svg, dialog")) continue;
            const a = light(getComputedStyle(element).color), b = light(behind(element));
            if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < least) faults.push(text.slice(0, 60));
          }
          return faults;
        }""",
        READABLE,
    )
