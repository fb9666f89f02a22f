"""A page in headless Chromium: what it draws at a phone's and a desktop's width, its complaints and its requests."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-sync",
    "--disable-extensions",
    "--disable-default-apps",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-domain-reliability",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
)
# The page runs in frames of the widths asked for, which Chromium's own window cannot be made as narrow as.
PROBE = """<!doctype html><meta charset="utf-8"><body><pre id="result"></pre><script>
const html = new TextDecoder().decode(Uint8Array.from(atob("PAGE"), (c) => c.charCodeAt(0)));
const widths = WIDTHS, result = {};
const look = (frame, width) => {
  const page = frame.contentDocument, window_ = frame.contentWindow;
  const press = (selector) => page.querySelector(selector)?.click();
  const texts = (selector) => [...page.querySelectorAll(selector)].map((node) => node.textContent);
  const seen = result[width] = {
    title: page.title,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    charts: Object.fromEntries([...page.querySelectorAll("figure[data-chart]")].map((figure) => [figure.id, {
      curves: [...figure.querySelectorAll(".frame path.curve")].filter((p) => p.getAttribute("d").length > 8).length,
      bands: figure.querySelectorAll(".frame .band").length,
      references: [...figure.querySelectorAll(".frame text.name")].map((node) => node.textContent),
      ticks: figure.querySelectorAll(".frame text").length,
      broken: /NaN|Infinity|undefined/.test(figure.querySelector(".frame svg").outerHTML),
      outside: [...figure.querySelectorAll(".frame text")].filter((node) => {
        const box = node.getBoundingClientRect(), frame = figure.getBoundingClientRect();
        return box.left < frame.left || box.right > frame.right;
      }).map((node) => node.textContent),
    }])),
    missing: texts("figure.missing h3"),
    injected: page.querySelectorAll("#samples script, #samples img, h1 b, td b, th b").length,
    smallest: Math.min(...[...page.querySelectorAll("main *")].map((node) =>
      parseFloat(window_.getComputedStyle(node).fontSize))),
    requests: window_.performance.getEntriesByType("resource").length,
  };
  const node = page.querySelector("#chart-loss .frame svg"), box = node.getBoundingClientRect();
  const place = { clientX: box.left + box.width / 2, clientY: box.top + 20 };
  node.dispatchEvent(new window_.PointerEvent("pointermove", place));
  seen.tip = page.querySelector("#chart-loss .tip").textContent;
  for (const axis of ["tokens", "minutes"]) {
    press(`[data-axis=${axis}]`);
    seen[axis] = texts("#chart-loss .frame text");
  }
  press(".whole");
  seen.whole = texts("#chart-loss .frame text");
  press('[data-run="0"]');
  seen.curves_without_first = page.querySelectorAll("#chart-loss .frame path.curve").length;
};
let left = widths.length;
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.onload = () => setTimeout(() => {
    try { look(frame, width); } catch (error) { result[width] = { error: String(error) }; }
    const text = encodeURIComponent(JSON.stringify(result));
    if (--left === 0) document.getElementById("result").textContent = text;
  }, 200);
  frame.srcdoc = html;
  document.body.append(frame);
}
</script>"""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What Chromium saw."""

    widths: dict[str, dict[str, Any]]
    console: list[str]
    """Errors, warnings and whatever else was printed there, refusals of the page's own policy among them."""
    requests: list[str]
    """Addresses asked for that are neither the file nor data inside it."""


def visit(page: Path, directory: Path, widths: tuple[int, ...] = (390, 1280)) -> Seen:
    """Opens the page alone for console and requests, and in frames of those widths for what it draws."""
    probe = directory / "probe.html"
    encoded = base64.b64encode(page.read_bytes()).decode("ascii")
    probe.write_text(PROBE.replace("PAGE", encoded).replace("WIDTHS", json.dumps(widths)), encoding="utf-8")
    asked, said = look_at(page, directory)
    framed = _chromium(probe, directory)
    result = re.search(r'<pre id="result">([^<]+)</pre>', framed.stdout)
    assert result, (framed.stdout[-2000:], framed.stderr[-2000:])
    return Seen(json.loads(urllib.parse.unquote(result[1])), said + _console(framed), asked)


def look_at(page: Path, directory: Path) -> tuple[list[str], list[str]]:
    """The addresses that the page alone asks for, other than its own file and data in it; what its console says."""
    log = directory / "net.json"
    done = _chromium(page, directory, f"--log-net-log={log}", "--net-log-capture-mode=Everything")
    asked = set()
    for event in json.loads(log.read_text(encoding="utf-8", errors="replace"))["events"]:
        params = event.get("params", {})
        # Chromium's own errands (the time, updates) have no page that started them.
        if params.get("initiator", "not an origin") != "not an origin" and re.match("(http|ws)s?:", params["url"]):
            asked.add(params["url"])
    return sorted(asked), _console(done)


def _console(done: "subprocess.CompletedProcess[str]") -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _chromium(page: Path, directory: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET, f"--user-data-dir={directory / 'profile'}", *more, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
