"""Reports: what is written can be read again, and the page says only what the rows say."""

import base64
import csv
import io
import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from encache.evaluate.headline import headline, significant
from encache.evaluate.page import MAX_SIDE, render
from encache.evaluate.plots import front_plot
from encache.evaluate.report import to_csv, to_json, write_report
from encache.evaluate.results import (
    Drift,
    Interval,
    Report,
    Row,
    front,
    match,
)


def interval(mean):
    return Interval(mean, 0.9 * mean, 1.1 * mean)


FULL = Row(
    name="full",
    checkpoint="emoji",
    scheduler="ddim",
    steps=50,
    cut="up2",
    blend="extrapolate",
    key_calls=tuple(range(50)),
    prior_noise=False,
    plain=True,
    num_images=64,
    encoder_runs=50,
    num_calls=50,
    gflop=57.3,
    share=1.0,
    seconds=0.5,
)


def plain(steps, error):
    share = steps / 50
    return replace(
        FULL,
        name=f"plain {steps}",
        steps=steps,
        encoder_runs=steps,
        num_calls=steps,
        share=share,
        seconds=share / 2,
        gflop=57.3 * share,
        latent_error=interval(error),
    )


def cached(name, share, error, **changes):
    defaults = {
        "latent_error": interval(error),
        "key_calls": (0, 5),
        "encoder_runs": 2,
        "opponent": "plain 20",
        "times_plain": interval(error / 0.005),
    }
    changes = {**defaults, **changes}
    return replace(FULL, name=name, plain=False, share=share, seconds=share / 2, **changes)


GOOD, BAD = cached("good", 0.404, 0.001), cached("bad", 0.41, 0.05, psnr=interval(30.0))
ROWS = (FULL, plain(25, 0.002), plain(20, 0.005), plain(10, 0.1), GOOD, BAD)
DRIFT = Drift(
    lags=(1, 5),
    by_tensor={"skip_0": (0.1, 0.2)},
    extrapolated={"skip_0": (0.01, 0.3)},
    by_call={"skip_0": (0.3, 0.2, 0.1)},
    by_time={"skip_0": (0.1, 0.1, 0.0)},
)


def report(rows=ROWS, **changes):
    grid = {"red <script>alert(1)</script>": {"good": Image.new("RGB", (64, 64), "red")}}
    values = {
        "title": "A <b>title</b>",
        "machine": {"cpu": "two & a half"},
        "protocol": {"prompts": 3, "checkpoints": {"emoji": "abc"}},
        "drift": DRIFT,
        "grid": grid,
        **changes,
    }
    return Report(rows=tuple(rows), **values)


def test_what_is_written_can_be_read_again(tmp_path):
    written = report()
    page = write_report(written, tmp_path / "new" / "folder")
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "index.html",
        "report.json",
        "rows.csv",
    ]
    content = json.loads((page.parent / "report.json").read_text())
    assert content["title"] == written.title
    for stored, row in zip(content["rows"], ROWS, strict=True):
        assert stored == json.loads(json.dumps(asdict(row)))
    assert content["drift"]["by_time"] == {"skip_0": [0.1, 0.1, 0.0]}


def parse_cell(line, name, value):
    """The value of a row's field as the table's line has it."""
    if isinstance(value, Interval):
        return Interval(*(float(line[name + end]) for end in ("", "_low", "_high")))
    if isinstance(value, tuple):
        return tuple(map(int, line[name].split()))
    if value is None or isinstance(value, bool):
        return {"": None, "True": True, "False": False}[line[name]]
    return type(value)(line[name])


def test_csv_equals_the_rows():
    rows = (*ROWS, replace(BAD, name='a "quoted", name', frechet=12.5, clip_score=interval(0.3)))
    table = list(csv.DictReader(io.StringIO(to_csv(report(rows)))))
    for line, row in zip(table, rows, strict=True):
        values = {field.name: getattr(row, field.name) for field in fields(Row)}
        assert {name: parse_cell(line, name, value) for name, value in values.items()} == values


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_divergence_is_named_everywhere(number):
    lost = cached("lost", 0.3, 1.0, latent_error=Interval(number, math.nan, math.nan))
    diverged = report([*ROWS, lost])
    error = json.loads(to_json(diverged), parse_constant=pytest.fail)["rows"][-1]["latent_error"]
    assert error == {"mean": None, "low": None, "high": None}
    assert headline(diverged.rows).endswith("“lost” diverged.")
    assert '<em class="diverged">diverged</em>' in render(diverged)
    assert lost not in front(diverged.rows, lambda row: row.share)
    for cost in (lambda row: row.share, lambda row: row.seconds):
        assert front_plot(diverged.rows, cost, "cost") == front_plot(ROWS, cost, "cost")


def test_facts_of_any_kind_become_json():
    facts = {
        "path": Path("some/folder"),
        "number": np.float32(0.5),
        "count": np.int64(3),
        "bad": math.nan,
    }
    content = json.loads(to_json(report(machine=facts)))["machine"]
    assert content == {"path": "some/folder", "number": 0.5, "count": 3, "bad": None}


def test_nothing_from_a_user_becomes_markup():
    page = render(report())
    assert "<script" not in page
    assert page.count("red &lt;script&gt;alert(1)&lt;/script&gt;") == 2  # heading and image
    assert "A &lt;b&gt;title" in page
    assert "two &amp; a half" in page


def test_the_page_needs_nothing_else():
    page = render(report())
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_namespaces.replace("http-equiv", "")
    assert 'src="data:image/png;base64,' in page
    for source in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source.startswith(("data:", "#"))


def test_a_table_that_is_cut_off_shows_it():
    page = render(report())
    tables = page.split("<table>")[:-1]
    assert len(tables) == 2  # of settings and of pictures
    assert all(re.search(r'<div class="scroll[^"]*" tabindex="0">$', before) for before in tables)
    style = page[: page.index("</style>")]
    assert re.search(r"body \{[^}]*width: fit-content;[^}]*max-width: 100%", style)
    assert re.search(r"\.scroll::after \{[^}]*position: sticky; right: 0;[^}]*gradient", style)


def test_facts_are_words():
    facts = {
        "checkpoints": {"a": "x, sha256 0f", "b": "y"},
        "unreadable": ["1.png", "2.png"],
        "c": [],
    }
    page = render(report(protocol=facts))
    assert "<dd>a: x, sha256 0f; b: y</dd>" in page
    assert "<dd>1.png, 2.png</dd>" in page
    assert "<dt>c</dt><dd>none</dd>" in page


def test_headings_stand_over_their_columns():
    page = render(report())
    assert not re.search(r"\s[↑↓]", re.sub(r"&nbsp;[↑↓]", "", page))  # no arrow on its own line
    assert '<th scope="col" class="words">key calls</th>' in page


def test_outcomes_follow_the_paired_ratio():
    assert match(GOOD, ROWS).outcome == "closer"
    assert match(GOOD, ROWS).opponent.name == "plain 20"
    assert match(BAD, ROWS).outcome == "further"
    assert match(cached("near", 0.404, 0.0048), ROWS).outcome == "alike"


def test_no_match_without_two_finite_errors():
    assert match(FULL, ROWS) is None
    assert match(replace(GOOD, times_plain=None), ROWS) is None
    assert match(GOOD, (FULL, GOOD)) is None
    lost = replace(plain(20, 0.005), psnr=Interval(math.nan, math.nan, math.nan))
    assert match(GOOD, (FULL, lost, GOOD)) is None


def test_the_front_holds_what_no_other_row_beats():
    names = [row.name for row in front(ROWS, lambda row: row.share)]
    assert names == ["plain 10", "plain 20", "good", "full"]


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(1e-6, 1)), min_size=1))
def test_every_row_is_on_the_front_or_beaten_by_it(points):
    rows = [cached(str(index), *point) for index, point in enumerate(points)]
    best = front(rows, lambda row: row.share)
    for row in rows:
        rivals = [
            one for one in best if one.share <= row.share and one.error.mean <= row.error.mean
        ]
        assert rivals
        assert (row in best) == all(
            (one.share, one.error.mean) == (row.share, row.error.mean) for one in rivals
        )


def test_the_headline_names_wins_and_losses():
    text = headline(ROWS)
    assert (
        "1 of 2 stays closer to it than the plain sampler at equal arithmetic does: “good”. "
        "At 0.40 of the arithmetic, “good” has an error of 0.0010 [0.00090, 0.0011] in 0.202 s; "
        "the plain sampler with as many steps as that buys (20, at 0.40) has "
        "0.0050 [0.0045, 0.0055] in 0.200 s." in text
    )
    assert "1 does worse than the plain sampler: “bad”." in text
    assert "nothing to compare" in headline((FULL,))


def test_the_headline_says_what_it_cannot_tell():
    near = cached("near", 0.404, 0.0048)
    cheap = cached("cheap", 0.05, 0.5, opponent=None, times_plain=None)
    text = headline((*ROWS[:4], near, cheap, replace(GOOD, name="unmeasured", latent_error=None)))
    assert "None stays closer" in text
    assert "Not to be told apart from the plain sampler: “near”." in text
    assert "No plain sampler at equal arithmetic was measured beside “cheap”." in text
    own = cached("own", 0.05, 0.5, opponent=FULL.name, times_plain=None)
    assert "diverged, or is the reference itself, beside “own”." in headline((*ROWS[:4], own))
    assert "unmeasured" not in text


def test_the_headline_counts_long_lists_and_shortens_names():
    many = [cached(f"emoji, 50 steps, stride {n}", 0.404, 0.001 / n) for n in (3, 2, 5, 4, 1)]
    text = headline((*ROWS[:4], *many))
    assert ": “stride 5”, “stride 4”, “stride 3” and 2 more. Most clearly, at 0.40" in text
    assert "“emoji, 50 steps, stride 3”" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00123, "0.0012"), (1234.5, "1,234"), (3.14159, "3.1"), (1.2e-7, "1.2e-7")],
)
def test_numbers_are_short(value, text):
    assert significant(value) == text


def test_only_positive_finite_errors_are_plotted():
    exact = cached("stride 1", 0.9, 0.0)
    assert render(report((FULL, exact))).count("<svg") == 4  # only those of the drift
    assert render(report()).count("<svg") == 6


def test_names_are_not_mathematics_nor_markup_in_plots():
    name = "$x_1$ --> <script>"
    rows = [replace(row, checkpoint=name) for row in ROWS] + [replace(GOOD, checkpoint="$")]
    svg = front_plot(rows, lambda row: row.share, "share")
    assert "$x_1$ --&gt; &lt;script&gt;" in svg
    assert "<script" not in svg


def test_large_pictures_are_shrunk_and_small_ones_kept():
    pictures = [Image.effect_noise(size, 50) for size in ((64, 64), (1024, 512))]
    file = io.BytesIO()
    pictures[0].save(file, "PNG")
    grid = {"noise": {"full": pictures[0], "good": pictures[1], "unknown": file.getvalue()}}
    encoded = re.findall(r'src="data:image/png;base64,([^"]*)"', render(report(grid=grid)))
    small, large, bytes_ = (Image.open(io.BytesIO(base64.b64decode(text))) for text in encoded)
    assert small.tobytes() == bytes_.tobytes() == pictures[0].tobytes()
    assert large.size == (MAX_SIDE, MAX_SIDE // 2)
    assert pictures[1].size == (1024, 512)  # the caller's picture is untouched


@pytest.mark.parametrize("rows", [(), (FULL,), ROWS, (GOOD,)])
def test_pages_of_little(rows):
    page = render(report(rows, drift=None, grid={}, machine={}, protocol={}))
    assert page.endswith("</html>\n")
    assert "Pictures</h2>" not in page
    assert "How fast features change" not in page
