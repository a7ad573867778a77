"""The report as one HTML page that needs nothing else: no script, no other file, no network."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from encache.evaluate.headline import headline
from encache.evaluate.plots import SMALLEST_ERROR, can_plot, curves_plot, front_plot
from encache.evaluate.results import Drift, Picture, Report, Row
from encache.evaluate.table import DASH, number, table

#: Larger pictures are shrunk to this many pixels, twice what a screen shows of them.
MAX_SIDE = 320

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #616b76; --line: #dde2e7;
  --page: #fff; --tint: #f3f6f8; --accent: #0b63b0; --good: #12774f; --bad: #b93a2b;
  --shade: #1c212659; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --line: #343b43;
  --page: #15181c; --tint: #1e2329; --accent: #6db3f2; --good: #55c795;
  --bad: #f08a7b; --shade: #9aa4ae73; } }
* { box-sizing: border-box; }
/* As wide as the widest table, and no wider than the window. */
body { margin: 0 auto; width: fit-content; min-width: min(100%, 76rem); max-width: 100%;
  padding: 1.5rem clamp(.9rem, 3vw, 2.5rem) 4rem;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: var(--ink); background: var(--page); overflow-wrap: break-word; }
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h1, h2, .lead, dl { max-width: 60rem; }
p { max-width: 46rem; margin: .6rem 0; }
.lead { font-size: 1.08rem; padding-left: 1rem;
  border-left: 3px solid var(--accent); }
.note, small, figcaption, summary { color: var(--soft); font-size: .85rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.5rem; max-width: 74rem; }
figure { margin: 0; max-width: 36rem; }
.pair svg { width: 100%; height: auto; }
.scroll { display: flex; overflow: auto; width: fit-content; max-width: 100%; max-height: 92vh;
  border: 1px solid var(--line); border-radius: 6px; }
/* What is cut off at the right lies under a shadow. It stays at the edge, and at the end of the
   table under a cover, so that a table that is seen whole has none. */
.scroll::before, .scroll::after { content: ""; flex: none; width: 1rem; pointer-events: none; }
.scroll::before { order: 1; position: relative; z-index: 5; background: var(--page); }
.scroll::after { order: 2; position: sticky; right: 0; z-index: 4; margin-left: -1rem;
  background: linear-gradient(to left, var(--shade), transparent); }
.scroll::-webkit-scrollbar { width: .7rem; height: .7rem; }
.scroll::-webkit-scrollbar-thumb { background: var(--soft); border: .15rem solid var(--page);
  border-radius: .35rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .86rem; line-height: 1.35; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; background: var(--page); }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { display: block; font-size: .74rem; }
tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 2; vertical-align: bottom;
  background: var(--tint); }
tbody th { position: sticky; left: 0; z-index: 1; text-align: left; font-weight: 500;
  min-width: 10.5rem; max-width: 15rem; border-right: 1px solid var(--line); }
thead th:first-child { left: 0; z-index: 3; text-align: left;
  border-right: 1px solid var(--line); }
.words { text-align: left; }
td.words { white-space: normal; min-width: 6rem; }
tr.plain > * { background: var(--tint); }
.star { color: var(--accent); }
.closer { color: var(--good); }
.further, .diverged { color: var(--bad); font-style: normal; }
.alike { font-weight: 400; }
.grid th, .grid td { text-align: center; }
.grid tbody th { text-align: left; }
.grid thead th { min-width: 8.6rem; max-width: 11rem; font-weight: 500; }
.grid thead small { white-space: nowrap; }
.grid td { padding: .3rem; }
.grid img { display: block; width: 8rem; height: auto; margin: auto; border-radius: 4px; }
.grid img.small { image-rendering: pixelated; }
dl { display: grid; grid-template-columns: fit-content(38%) minmax(0, 1fr); gap: .25rem 1rem;
  font-size: .88rem; margin: .6rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  th, td { padding: .35rem .45rem; }
  tbody th { min-width: 7.5rem; max-width: 8.5rem; font-size: .8rem; }
  .grid tbody th { min-width: 5rem; max-width: 5.5rem; }
  .grid thead th { font-size: .74rem; min-width: 7rem; }
  .grid img { width: 6.4rem; }
}
@media print { .scroll { overflow: visible; max-height: none; }
  .scroll::before, .scroll::after { display: none; } }
"""


def render(report: Report) -> str:
    """The page as HTML."""
    sections = (
        _front_section(report.rows),
        f"<h2>All settings</h2>\n{table(report.rows)}" if report.rows else "",
        _drift_section(report.drift),
        _grid_section(report.grid, report.rows),
        _facts_section("Protocol", report.protocol),
        _facts_section("Machine", report.machine),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # The browser, too, is told that nothing may be loaded or run.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(report.title)}</h1>\n"
        f'<p class="lead">{escape(headline(report.rows))}</p>\n'
        f"{''.join(sections)}</body>\n</html>\n"
    )


def _front_section(rows: Sequence[Row]) -> str:
    if not any(map(can_plot, rows)):
        return ""
    share = front_plot(rows, lambda row: row.share, "share of the full sampler's arithmetic")
    seconds = front_plot(rows, lambda row: row.seconds, "seconds per image")
    return (
        "<h2>Quality against cost</h2>\n"
        f'<div class="pair"><figure>{share}</figure>\n<figure>{seconds}</figure></div>\n'
        '<p class="note">Lower left is better. Bars are 95 % bootstrap intervals over the '
        "pictures, the number at a point is its encoder runs, the broad band joins the settings "
        "that no other beats, the dotted line is the full sampler. Errors below "
        f"{SMALLEST_ERROR:g} are rounding and left out.</p>\n"
    )


def _drift_section(drift: Drift | None) -> str:
    if drift is None or not drift.by_tensor:
        return ""
    lags = curves_plot(drift.by_tensor, drift.lags, "calls between")
    lines = curves_plot(drift.extrapolated, drift.lags, "calls between")
    num_calls = max(map(len, drift.by_call.values()), default=0)
    calls = curves_plot(drift.by_call, range(num_calls), "call")
    times = curves_plot(drift.by_time, range(num_calls), "call")
    return (
        "<h2>How fast features change</h2>\n"
        f'<div class="pair"><figure>{lags}<figcaption>Between two calls of the full sampler, by '
        "their distance, mean over all calls: what reusing a feature gets wrong.</figcaption>"
        f"</figure>\n<figure>{lines}<figcaption>Between a call and the line through the two calls "
        "that lie one and two such distances before it: what extrapolating gets wrong."
        "</figcaption></figure>\n"
        f"<figure>{calls}<figcaption>From each call to the next.</figcaption></figure>\n"
        f"<figure>{times}<figcaption>The same when only the timestep moves on and the latents "
        "stay: what the time embedding alone does.</figcaption></figure></div>\n"
    )


def _grid_section(grid: Mapping[str, Mapping[str, Picture]], rows: Sequence[Row]) -> str:
    shown = {name for pictures in grid.values() for name in pictures}
    by_name = {row.name: row for row in rows}
    names = [*(name for name in by_name if name in shown), *sorted(shown - by_name.keys())]
    if not names:
        return ""
    heads = "".join(f'<th scope="col">{_grid_head(n, by_name.get(n))}</th>' for n in names)
    body = "\n".join(
        f'<tr><th scope="row">{escape(prompt)}</th>'
        + "".join(f"<td>{_picture(pictures.get(n), f'{prompt}: {n}')}</td>" for n in names)
        + "</tr>"
        for prompt, pictures in grid.items()
    )
    return (
        "<h2>Pictures</h2>\n"
        '<p class="note">Every row starts from the same noise. Below a setting: its share of the '
        "arithmetic and its latent error.</p>\n"
        '<div class="scroll grid" tabindex="0"><table><thead><tr><th scope="col">prompt</th>'
        f"{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _grid_head(name: str, row: Row | None) -> str:
    if row is None:
        return escape(name)
    error = "" if row.latent_error is None else f" · {number(row.latent_error.mean)}"
    return f"{escape(name)}<br><small>{number(row.share, '{:.2f}')}{error}</small>"


def _picture(picture: Picture | None, description: str) -> str:
    if picture is None:
        return DASH
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    small = ' class="small"' if image.width < MAX_SIDE / 2 else ""
    return f'<img{small} alt="{escape(description)}" src="data:image/png;base64,{data}">'


def _facts_section(title: str, facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    items = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(_fact(value))}</dd>\n"
        for name, value in facts.items()
    )
    return f"<h2>{title}</h2>\n<dl>{items}</dl>\n"


def _fact(value: Any) -> str:
    """Lists and named values as words."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_fact(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value)) or "none"
    return str(value)
