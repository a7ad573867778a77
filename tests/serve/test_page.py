"""The page's script in node, against a real server: draw, toggle, compare, errors shown."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import encache.serve
from encache.evaluate.fidelity import psnr
from tests.serve.served import Served

PAGE = Path(encache.serve.__file__).with_name("page.html")
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node runs the page's script")


def visit(url, *steps):
    """What the page says at each ["see"] while a person takes these steps."""
    command = [
        NODE,
        Path(__file__).with_name("page_in_node.js"),
        url,
        PAGE,
        *map(json.dumps, steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def served(engine_folder):
    with Served(engine_folder) as one:
        yield one


def test_the_page_is_served_alone(served):
    answer = served.client.get("/")
    assert answer.text == PAGE.read_text()
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "://" not in answer.text  # nothing comes from elsewhere


def test_the_strip_shows_the_servers_plan(served):
    (seen,) = visit(served.url, ["see"])
    assert seen["pressed"] == [True, False, True, False]
    assert seen["stride"] == 2
    assert seen["cost"] == "2 key calls of 4: 4 rows of the UNet, and 8 in full."
    assert not seen["shown"]
    assert not seen["error"]


def test_key_calls_are_toggled(served):
    steps = [["click", 3], ["click", 2], ["see"], ["set", "stride", "4"], ["see"]]
    by_hand, uniform = visit(served.url, *steps)
    assert by_hand["pressed"] == [True, False, False, True]
    assert by_hand["stride"] == ""
    assert uniform["pressed"] == [True, False, False, False]
    assert uniform["cost"].startswith("1 key calls of 4: 2 rows")


def test_pictures_are_drawn_and_compared(served):
    every = [["click", 1], ["click", 3]]
    steps = [["draw"], ["see"], *every, ["draw"], ["slide", "30"], ["see"]]
    cached, full = visit(served.url, *steps)
    assert cached["shown"]
    assert cached["can_draw"]
    assert cached["busy"] == ""
    assert cached["psnr"].endswith(" dB")
    assert cached["cached-told"].endswith(" ms")
    assert cached["full-told"].endswith(" ms")
    assert full["pressed"] == [True] * 4
    assert full["clip"] == "inset(0 70% 0 0)"


def test_errors_are_shown(served):
    steps = [["set", "stride", "60"], ["see"], ["set", "stride", "2"], ["see"]]
    steps += [["set", "prompt", "x" * 51], ["draw"], ["see"]]
    wrong, mended, long = visit(served.url, *steps)
    assert "stride" in wrong["error"]
    assert mended["error"] == ""
    assert "50 characters" in long["error"]
    assert long["can_draw"]
    assert not long["shown"]


def test_a_server_that_wants_a_token(engine_folder):
    token = "a secret of some length"
    with Served(engine_folder, token=token) as served:
        asked, given = visit(served.url, ["see"], ["set", "token", token], ["see"])
    assert asked["asks_token"]
    assert "token" in asked["error"]
    assert given["error"] == ""
    assert len(given["pressed"]) == 4


def test_a_server_that_is_gone():
    (seen,) = visit("http://127.0.0.1:9", ["see"])
    assert seen["error"] == "The server cannot be reached."


def test_psnr_is_that_of_the_reports():
    ours, theirs = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 4))
    (found,) = visit("http://127.0.0.1:9", ["psnr", ours.ravel().tolist(), theirs.ravel().tolist()])
    pictures = (one[None, ..., :3].transpose(0, 3, 1, 2) / 255 for one in (ours, theirs))
    assert math.isclose(found, psnr(*pictures)[0], rel_tol=1e-9)
