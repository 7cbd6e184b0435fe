"""The HTML report: its structure always; how it looks and filters in Chromium, where that is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qcompile.report import Report, Row

NAME = "<script>alert(1)</script>"
VOID = {"meta", "input", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def row(layer: str, role: str = "fprop", **changes: object) -> Row:
    values: dict[str, object] = {
        "layer": layer, "op": "linear", "role": role, "shape": "2×2048×4096 · 14336×4096",
        "formats": "e2m1 row + residual × e2m1 row", "estimator": "ste × dge(k=5,cap=3)" if role == "fprop" else "",
        "provider": "cpp quantize; dequantize + aten", "saved_bytes": 1536 if role == "fprop" else 0,
        "decision": "quantized", "reason": "",
    }  # fmt: skip
    return Row(**{**values, **changes})  # type: ignore[arg-type]


def skipped(layer: str, reason: str) -> Row:
    empty = {"formats": "", "estimator": "", "provider": "", "saved_bytes": 0}
    return row(layer, "-", decision="skipped", reason=reason, **empty)


@pytest.fixture(scope="module")
def report() -> Report:
    names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(20) for kind in "qkv"]
    rows = [row(name, role) for name in names for role in ("fprop", "dgrad", "wgrad")]
    rows += [row(NAME, estimator="trust × trust"), skipped("lm_head", "skip='lm_head' & <b>more</b>")]
    remarks = ["not captured: base (linear 5×48 · 32×48 ran in Python) <i>"]
    return Report("qcompile_fp4", rows, saved=[{"bytes": 2048, "codes": False}], graphs=1, remarks=remarks)


class Tree(HTMLParser):
    """Tags, texts and attributes; raises for a tag that is closed out of turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))


def test_the_page_is_well_formed_and_complete(report):
    page = report.to_html()
    tree = Tree(page)
    assert page.startswith("<!doctype html>")
    assert tree.open == []
    assert tree.tags["table"] == tree.tags["thead"] == tree.tags["tfoot"] == tree.tags["title"] == 1
    assert tree.tags["tbody"] == report.sites == 62
    assert ("html", {"lang": "en"}) in tree.attributes
    assert any(a.get("name") == "viewport" and "width=device-width" in str(a["content"]) for _, a in tree.attributes)
    titles = [text for tag, text in tree.texts if tag == "title"]
    assert titles == [report.summary().split("\n")[0]]
    cells = [text for tag, text in tree.texts if tag == "td"]
    assert {row.layer for row in report.rows} <= set(cells)
    assert "61 of 62 sites quantized" in cells  # the totals
    assert any(text.endswith("ran in Python) <i>") for tag, text in tree.texts if tag == "li")


def test_all_text_is_escaped(report):
    """One script, the page's own; no tag that came with a name, a reason or a remark."""
    for page in (report.to_html(), report._repr_html_()):
        tree = Tree(page)
        assert tree.tags["script"] == page.count("<script") == int("<!doctype" in page)
        assert not {"b", "i"} & set(tree.tags)
        assert NAME in [text for tag, text in tree.texts if tag == "td"]


def test_quotes_do_not_end_an_attribute():
    report = Report("\"><img src=x>'", [row("\" onload='x'")])
    tags = Tree(report.to_html()).tags
    assert tags["img"] == 0
    assert not any("onload" in attributes for _, attributes in Tree(report.to_html()).attributes)


def test_nothing_is_fetched(report):
    """No address at all, and a policy that forbids any."""
    page = report.to_html()
    assert not re.search(r"https?://|url\(|@import", page)
    assert not any({"src", "href"} & set(attributes) for _, attributes in Tree(page).attributes)
    policy = next(a["content"] for _, a in Tree(page).attributes if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")


def test_a_notebook_gets_a_piece_without_scripts(report):
    piece = report._repr_html_()
    tree = Tree(piece)
    assert tree.open == []
    assert not {"script", "style", "html", "body"} & set(tree.tags)
    assert tree.tags["tr"] == 1 + 3 + 2  # the header; q, k and v of all layers; the two others
    assert "model.layers.*.self_attn.q_proj ×20" in piece


# --- in a browser -------------------------------------------------------------------------------------------

#: Asks the page about itself and hands the answers to the window around it.
PROBE = """<script>
const root = document.documentElement, find = id => document.getElementById(id);
const box = element => element.getBoundingClientRect();
const answers = {};
answers.width = window.innerWidth;
answers.overflow = root.scrollWidth - root.clientWidth;
answers.shown = find("shown").textContent;
window.scrollTo(0, 600);
answers.header = getComputedStyle(document.querySelector("thead")).display === "none" ? "none"
  : String(Math.round(box(document.querySelector("th")).top));
answers.hiddenRole = getComputedStyle(document.querySelector("tr.role")).display;
find("roles").checked = true;
find("filter").value = "LAYERS.7. k_proj";
find("filter").dispatchEvent(new Event("input", {bubbles: true}));
answers.filtered = find("shown").textContent;
answers.visible = [...document.querySelectorAll("tbody")].filter(body => box(body).height > 0).length;
answers.role = getComputedStyle(document.querySelector("tbody:not([hidden]) tr.role")).display;
find("filter").value = "";
find("wide").checked = true;
find("wide").dispatchEvent(new Event("input", {bubbles: true}));
answers.wide = find("shown").textContent;
answers.back = getComputedStyle(document.body).backgroundColor;
window.parent.postMessage(JSON.stringify(answers), "*");
</script>"""
#: No window of Chromium's is as narrow as a phone, but a frame is.
AROUND = """<!doctype html><meta name="color-scheme" content="light dark"><title></title>
<script>window.addEventListener("message", event => { document.title = event.data; });</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; the page's structure is tested without it")
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_works_in_a_browser(width, dark, report, tmp_path):
    """No sideways scrolling on a phone; the header stays in view; filter, roles and both colour schemes work."""
    (tmp_path / "page.html").write_text(report.to_html().replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    (tmp_path / "around.html").write_text(AROUND.replace("WIDTH", str(width)), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=2000 --dump-dom"
    )
    done = subprocess.run(
        [
            str(CHROMIUM),
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1600,1000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            (tmp_path / "around.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    answers = json.loads(title[1])
    assert (answers["width"], answers["overflow"]) == (width, 0)
    assert answers["header"] == ("0" if width > 700 else "none")
    assert answers["shown"] == "62 of 62 sites shown"
    assert answers["filtered"] == "1 of 62 sites shown"
    assert answers["visible"] == 1
    assert answers["wide"] == "1 of 62 sites shown"
    assert (answers["hiddenRole"], answers["role"]) == ("none", "table-row" if width > 700 else "block")
    assert answers["back"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")


def test_the_page_is_a_file_of_the_package():
    """Its template is installed with the sources."""
    import qcompile.report

    assert (Path(qcompile.report.__file__).parent / "page.html").is_file()
    assert '"qcompile.report" = ["*.html"]' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
