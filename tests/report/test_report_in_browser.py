"""The report in a real headless Chromium, as readers meet it: wide, narrow, light, dark, by mouse and by keyboard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.report.browser import CHROMIUM, Browser
from trtdeploy.cli.main import app
from trtdeploy.plan import LayerPrecision, Plan
from trtdeploy.report import Report, render
from trtdeploy.report.confusion import MOST_CLASSES, PAIRS
from trtdeploy.report.content import StageRow
from trtdeploy.statistics import compare_counts, wilson_percent

pytest.importorskip("jinja2")
PROBES = Path(__file__).with_name("report_probes.js")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
AA_TEXT, AA_LARGE_TEXT, AA_GRAPHICS = 4.5, 3.0, 3.0
"""Smallest contrasts of WCAG 2.2, success criteria 1.4.3 and 1.4.11."""

NAMES = [
    "<script>hacked = 1</script>",
    '" onmouseover="hacked = 1',
    "{{ 7*7 }}",
    "مستشفى",
    "\u202egnirts desrever",
    "日本語",
    "a name of many words that its author did not want to be any shorter than this one is",
    "a_name_without_a_space_" * 6,
]


@pytest.fixture(scope="module")
def report(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the plan with random weights, which is wrong often enough."""
    folder = tmp_path_factory.mktemp("report")
    path, ledger = folder / "out.html", folder / "ledger.json"
    common = ["validate", "--data", "digits", "--plan", str(qdq_plan.path), "--batch-size", "8"]
    done = CliRunner().invoke(app, [*common, "--max-variation", "5", "--ledger", str(ledger), "--report", str(path)])
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def rich(report: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The same with all that a report can have: six stages, three kinds, 300 layers and 130 classes, some awkward."""
    facts = Report.model_validate_json(report.with_suffix(".json").read_text())
    classes = tuple(NAMES + [f"class_{index:03d}" for index in range(130 - len(NAMES))])
    confusion = np.diag(np.full(130, 90)) + np.random.default_rng(0).integers(0, 2, (130, 130))
    confusion[3, 5] = 77
    # correct answers of 10,000, and how many were gained and lost against the stage before
    counts = {"float": (9000, 0, 0), "ptq": (8963, 3, 40), "qat": (8992, 30, 1)}
    counts |= dict.fromkeys(("onnx", "plan", "served"), (8992, 0, 0))
    stages = tuple(
        StageRow(
            stage=name,
            n=10000,
            top1=wilson_percent(correct, 10000),
            agreement=None if name == "float" else 99.5,
            change=None if name == "float" else compare_counts(gained=gained, lost=lost, n=10000),
            latency_ms=None,
            recorded_at="2026-01-01T00:00:00+00:00",
        )
        for name, (correct, gained, lost) in counts.items()
    )
    kinds = ("lost", "won", "both wrong")
    disagreements = [
        item.model_copy(update={"kind": kinds[index % 3], "label": NAMES[index % 8], "answer": NAMES[-1 - index % 8]})
        for index, item in enumerate(facts.disagreements)
    ]
    assert facts.precision is not None
    layers = {
        f"/features.{i}/block/conv_with_a_long_name/Conv": LayerPrecision(macs=i, quantized=True) for i in range(300)
    }
    validation = facts.validation
    full = facts.model_copy(
        update={
            "title": NAMES[0],
            "classes": classes,
            "confusion": tuple(tuple(map(int, row)) for row in confusion),
            "stages": stages,
            "disagreements": tuple(disagreements),
            "precision": facts.precision.model_copy(update={"layers": layers}),
            "validation": validation.model_copy(
                update={"gates": (*validation.gates, validation.gates[0].model_copy(update={"passed": False}))}
            ),
        }
    )
    path = tmp_path_factory.mktemp("rich") / "rich.html"
    path.write_text(render(full))
    return path, full


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser; what a page writes to its console, or asks of the network, fails its test."""
    chromium.console.clear()
    chromium.requests.clear()
    yield chromium
    assert chromium.console == []
    assert chromium.requests == []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 120 s"
        time.sleep(0.02)


def visit(browser: Browser, page: Path, *, width: int = 1280, dark: bool = False) -> None:
    browser.open(page, width=width, dark=dark)
    browser.evaluate(PROBES.read_text())


def shown(browser: Browser) -> int:
    return int(browser.evaluate("probes.all('.cards li').length"))


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_filters_and_zoom_work(browser: Browser, width: int, rich: tuple[Path, Report]) -> None:
    page, facts = rich
    visit(browser, page, width=width)
    kinds = [item.kind for item in facts.disagreements]
    for kind in ("lost", "won", "both wrong"):
        browser.evaluate(f"document.querySelector('[data-kind=\"{kind}\"]').click()")
        assert shown(browser) == kinds.count(kind)
        assert browser.evaluate("document.getElementById('shown').textContent") == f"{kinds.count(kind)} shown"
    browser.evaluate("document.querySelector('[data-kind=all]').click()")
    assert shown(browser) == len(kinds) > 5
    browser.evaluate(f"probes.choose({json.dumps(NAMES[1])})")
    assert shown(browser) == sum(item.label == NAMES[1] for item in facts.disagreements) > 0
    thumb = browser.evaluate("probes.all('.card img')[0].getBoundingClientRect().width")
    browser.evaluate("probes.all('.card')[0].click()")
    assert browser.evaluate("document.querySelector('dialog img').naturalWidth") > 0
    assert browser.evaluate("document.querySelector('dialog img').getBoundingClientRect().width") > 1.5 * thumb
    top, below = browser.evaluate("(({top, bottom}) => [top, innerHeight - bottom])(zoom.getBoundingClientRect())")
    assert abs(top - below) < 2  # in the middle of the window
    browser.evaluate("document.getElementById('close').click()")
    assert not browser.evaluate("document.getElementById('zoom').open")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_or_runs_into_something_else(
    browser: Browser, width: int, rich: tuple[Path, Report], report: Path
) -> None:
    for page in (rich[0], report):
        visit(browser, page, width=width)
        browser.evaluate("probes.all('details').forEach((details) => details.open = true)")
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.evaluate("probes.cut()") == []
        assert browser.evaluate("probes.crowdedLabels()") == []
        rights = browser.evaluate(
            "probes.all('.gates .verdict').map((verdict) => verdict.getBoundingClientRect().right)"
        )
        assert max(rights) < width  # what came of a gate is in sight without scrolling


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_has_enough_contrast(browser: Browser, dark: bool, rich: tuple[Path, Report]) -> None:
    visit(browser, rich[0], dark=dark)
    browser.evaluate("probes.all('details').forEach((details) => details.open = true)")
    found = browser.evaluate("probes.contrasts()")
    browser.evaluate("probes.all('.card')[0].click()")
    found += browser.evaluate("probes.contrasts()")
    limits = {"text": AA_TEXT, "large": AA_LARGE_TEXT, "graphics": AA_GRAPHICS}
    assert [item for item in found if item["ratio"] < limits[item["kind"]]] == []
    kinds = [item["kind"] for item in found]
    assert kinds.count("text") > 500
    assert kinds.count("graphics") > 50


@needs_chromium
def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Browser, rich: tuple[Path, Report]) -> None:
    visit(browser, rich[0])
    elements = browser.evaluate("probes.focusable().length")
    assert elements > 20
    for index in range(elements):
        browser.press("Tab")
        # in the order of the page, and none left out
        assert browser.evaluate("probes.focusable().indexOf(document.activeElement)") == index
        assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@needs_chromium
def test_the_keyboard_operates_everything(browser: Browser, rich: tuple[Path, Report]) -> None:
    page, facts = rich
    visit(browser, page, width=390)

    def focus(selector: str) -> None:
        browser.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")

    focus("[data-kind=won]")
    browser.press(" ")
    assert shown(browser) == sum(item.kind == "won" for item in facts.disagreements)
    assert browser.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    focus("[data-kind=all]")
    browser.press("Enter")
    focus("#class-filter")
    browser.press("End")
    assert 0 < shown(browser) < len(facts.disagreements)
    browser.evaluate("probes.choose('')")

    text = "document.querySelector('dialog p').textContent"
    focus(".card")
    browser.press("Enter")
    first = browser.evaluate(text)
    assert browser.evaluate("document.activeElement.id") == "close"
    browser.press("ArrowRight")
    assert facts.disagreements[1].id in browser.evaluate(text)
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert facts.disagreements[-1].id in browser.evaluate(text)
    browser.press("Tab", shift=True)
    assert browser.evaluate("document.activeElement.id") == "next"
    browser.press("Enter")
    assert browser.evaluate(text) == first
    browser.press("Escape")
    assert not browser.evaluate("document.getElementById('zoom').open")
    assert browser.evaluate("document.activeElement === document.querySelector('.card')")

    focus("summary")
    browser.press("Enter")
    assert browser.evaluate("document.querySelector('details').open")
    for region, key, way in (("Ledger", "ArrowRight", "scrollLeft"), ("Confusion matrix", "ArrowDown", "scrollTop")):
        focus(f"[aria-label='{region}']")
        browser.press(key)
        wait_for(lambda way=way: browser.evaluate(f"document.activeElement.{way} > 0"))  # type: ignore[misc]


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_matrix_of_many_classes_can_be_read(browser: Browser, width: int, rich: tuple[Path, Report]) -> None:
    page, facts = rich
    visit(browser, page, width=width)
    mistakes = browser.evaluate(
        "probes.all('.mistakes tbody tr').map((row) => [...row.cells].map((c) => c.textContent))"
    )
    assert len(mistakes) == PAIRS
    assert mistakes[0] == [f"77 of {sum(facts.confusion[3])}", NAMES[3], NAMES[5]]
    assert browser.evaluate("probes.all('.matrix tbody tr').length") == MOST_CLASSES
    # headers stay where they are while the cells scroll, and a cell says in words what it is
    seen = browser.evaluate("probes.lastCell()")
    assert abs(seen["header_left"]) < 2
    assert abs(seen["column_top"]) < 2
    assert seen["header_share"] < 0.5
    assert seen["touched"]
    assert re.search(r"class_\d+\W+answered as \W*class_\d+\W+: 9\d of \d+", seen["text"])
    assert browser.evaluate("typeof hacked") == "undefined"


@needs_chromium
def test_the_first_shown_loss_is_named_and_marked(browser: Browser, rich: tuple[Path, Report]) -> None:
    visit(browser, rich[0])
    assert browser.evaluate("probes.all('.lost .strong').map((text) => text.textContent)") == ["ptq"]
    sentence = browser.evaluate("document.querySelector('#h-ledger + p').textContent")
    assert "ptq lost accuracy: -0.37 [" in sentence
    assert "40 answers lost and 3 gained of 10000" in sentence


@needs_chromium
def test_it_is_painted_light_and_dark_and_printed_on_white(browser: Browser, report: Path, tmp_path: Path) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        visit(browser, report, width=800, dark=scheme == "dark")
        with Image.open(browser.screenshot(tmp_path / f"{scheme}.png", whole=False)) as image:
            pixels = image.convert("L")
            assert len(pixels.getcolors(256) or ()) > 20, "nothing was painted"
            brightness[scheme] = pixels.getpixel((2, 2))
    assert brightness["light"] > 200
    assert brightness["dark"] < 60
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.command("Emulation.setEmulatedMedia", media="print", features=dark)
    with Image.open(browser.screenshot(tmp_path / "print.png", whole=False)) as image:
        assert image.convert("L").getpixel((2, 2)) > 250
    assert browser.evaluate("probes.all('.controls').length") == 0
    assert browser.evaluate("[...document.images].every((image) => image.complete)")


@needs_chromium
def test_its_parts_are_named_and_in_order(browser: Browser, rich: tuple[Path, Report]) -> None:
    visit(browser, rich[0])
    levels = browser.evaluate("probes.all('h1, h2, h3').map((heading) => Number(heading.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert browser.evaluate("probes.unnamed()") == 0


def test_the_page_needs_nothing_from_anywhere(report: Path, rich: tuple[Path, Report]) -> None:
    for path in (report, rich[0]):
        page = path.read_text()
        assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']""", page)
        assert not re.findall(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", page)
        assert len(page) < 1_000_000
