"""The report in a real headless Chromium: it renders, filters and enlarges, at two widths, without an error."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.plan import Plan

pytest.importorskip("jinja2")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
LIMIT_S = 60

# Appended to the page: does what a reader does and leaves what it saw in the document.
USE_IT = """
<script>
window.addEventListener("load", () => {
  const seen = {};
  const shown = () => [...document.querySelectorAll(".cards li")].filter((card) => card.offsetParent !== null).length;
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.all = shown();
  const kinds = [...document.querySelectorAll("button[data-kind]")];
  seen.kinds = {};
  for (const button of kinds) { button.click(); seen.kinds[button.dataset.kind] = shown(); }
  kinds[0].click();
  const select = document.getElementById("class-filter");
  select.value = select.options[1].value;
  select.dispatchEvent(new Event("change"));
  seen.one_class = shown();
  seen.status = document.getElementById("shown").textContent;
  select.value = "";
  select.dispatchEvent(new Event("change"));
  const cards = document.querySelectorAll(".card");
  cards[0].focus();
  cards[0].click();
  const zoom = document.getElementById("zoom");
  seen.open = zoom.open;
  const first = zoom.querySelector("p").textContent;
  zoom.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
  seen.stepped = zoom.querySelector("p").textContent !== first;
  seen.width = zoom.querySelector("img").getBoundingClientRect().width;
  seen.thumb = cards[0].querySelector("img").getBoundingClientRect().width;
  zoom.querySelector("#close").click();
  seen.closed = !zoom.open;
  seen.unlabelled = [...document.querySelectorAll("svg, img, select, button, dialog")].filter((element) =>
    !(element.getAttribute("aria-label") || element.alt || element.textContent.trim() || element.labels?.length)
    && element.closest("dialog") === null).length;
  seen.dark = getComputedStyle(document.body).backgroundColor;
  const result = document.createElement("script");
  result.type = "application/json"; result.id = "seen"; result.textContent = JSON.stringify(seen);
  document.body.append(result);
});
</script>
"""


@pytest.fixture(scope="module")
def report(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the plan with random weights, which is wrong often enough."""
    folder = tmp_path_factory.mktemp("report")
    path, ledger = folder / "out.html", folder / "ledger.json"
    common = ["validate", "--data", "digits", "--plan", str(qdq_plan.path), "--batch-size", "8"]
    done = CliRunner().invoke(app, [*common, "--max-variation", "5", "--ledger", str(ledger), "--report", str(path)])
    assert done.exit_code == 0, done.output
    return path


def chromium(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    return subprocess.run(
        [CHROMIUM, *common, f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def use(report: Path, folder: Path, width: int, *options: str) -> dict[str, Any]:
    """Open the page in a frame of this width, where a window cannot be so narrow, and return what it saw."""
    content = report.read_text().replace("</body>", USE_IT + "</body>")
    (folder / "used.html").write_text(content)
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(content)}"></iframe>'
        "<script>addEventListener('load', () => setTimeout(() => {"
        "const seen = document.getElementById('f').contentDocument.getElementById('seen');"
        "const copy = document.createElement('pre'); copy.id = 'copied'; copy.textContent = seen && seen.textContent;"
        "document.body.append(copy);}, 100));</script>"
    )
    done = chromium(frame, folder, "--virtual-time-budget=3000", "--window-size=1400,1000", "--dump-dom", *options)
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    found = re.search(r'<pre id="copied">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_filters_and_zoom_work_and_nothing_overflows(width: int, report: Path, tmp_path: Path) -> None:
    facts = json.loads(report.with_suffix(".json").read_text())
    seen = use(report, tmp_path, width)
    assert seen["overflow"] <= 0
    assert seen["all"] == len(facts["disagreements"]) > 5
    kinds = [item["kind"] for item in facts["disagreements"]]
    assert seen["kinds"] == {"all": len(kinds)} | {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    smallest = min(item["label"] for item in facts["disagreements"])
    expected = sum(item["label"] == smallest for item in facts["disagreements"])
    assert seen["one_class"] == expected < seen["all"]
    assert seen["status"] == f"{expected} shown"
    assert seen["open"]
    assert seen["stepped"]
    assert seen["closed"]
    assert seen["width"] > 1.5 * seen["thumb"]
    assert seen["unlabelled"] == 0


@needs_chromium
def test_it_is_painted_light_and_dark(report: Path, tmp_path: Path) -> None:
    brightness = {}
    for scheme, option in (("light", "preferredColorScheme=1"), ("dark", "preferredColorScheme=0")):
        picture = tmp_path / f"{scheme}.png"
        chromium(report, tmp_path, f"--blink-settings={option}", "--window-size=800,600", f"--screenshot={picture}")
        with Image.open(picture) as image:
            pixels = image.convert("L")
            assert len(pixels.getcolors(256) or ()) > 20, "nothing was painted"
            brightness[scheme] = pixels.getpixel((2, 2))
    assert brightness["light"] > 200
    assert brightness["dark"] < 60


def test_the_page_needs_nothing_from_anywhere(report: Path) -> None:
    page = report.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']""", page)
    assert not re.findall(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", page)
