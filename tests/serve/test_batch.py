"""`encache-batch` against `encache-run`'s pictures, and against itself when it was stopped."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner
from PIL import Image

from encache.contract.manifest import read_manifest
from encache.errors import EncacheError
from encache.files import write_new
from encache.runtime.cli import main as encache_run
from encache.runtime.images import read_metadata
from encache.runtime.jobs import Job
from encache.runtime.ort import open_onnxruntime
from encache.serve.batch_cli import main
from encache.serve.bulk import Cluster
from encache.serve.outputs import ImageFolder
from encache.serve.rows import read_rows
from encache.train.data import open_pictures

PROGRAM = [sys.executable, "-c", "from encache.serve.batch_cli import main; main()"]
NOTHING_SAID = Job("", 0)


@pytest.fixture
def batch(engine_folder, tmp_path, monkeypatch):
    """Call encache-batch with the tiny model's engines in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def batch(*arguments, code=0):
        fixed = ["--engine-dir", engine_folder, "--steps", "4"]
        result = CliRunner().invoke(main, [*map(str, [*arguments, *fixed])])
        assert result.exit_code == code, result.output
        assert code == 0 or isinstance(result.exception, SystemExit)
        return result

    return batch


def write_prompts(path, count=30):
    path.write_text("".join(f"hot dog {number}\n" for number in range(count)))
    return path


def content_of(folder):
    """Every file that is not hidden, with its bytes."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    shown = [path for path in paths if not path.relative_to(folder).as_posix().startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in shown}


LINES = [
    {"prompt": "hot dog", "seed": 3, "negative_prompt": "green", "height": 16, "width": 24},
    {"prompt": 'red, "apple"', "seed": None, "negative_prompt": None},
]
JOBS = [Job("hot dog", 3, "green", 16, 24), Job('red, "apple"', 7, "no", None, 16)]


def write_list(path):
    if path.suffix == ".csv":
        path.write_text(
            "seed,prompt,negative_prompt,height,width,id\n"
            '3,hot dog,green,16,24,a\n,"red, ""apple""",,,,b\n'
        )
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n\n" for line in LINES))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(LINES), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_list_is_the_same_in_every_format(tmp_path, suffix):
    default = Job("", 7, "no", None, 16)
    rows = read_rows(write_list(tmp_path / f"list{suffix}"), 1, default)
    assert [row.job for row in rows] == JOBS
    assert len({row.key for row in rows}) == 2


def test_rows_that_ask_for_the_same_are_rows(tmp_path):
    (tmp_path / "list.txt").write_text("a cat\n\na dog\na cat\n")
    rows = read_rows(tmp_path / "list.txt", 2, NOTHING_SAID)
    assert [(row.job.prompt, row.job.seed) for row in rows] == [
        *(("a cat", 0), ("a cat", 1), ("a dog", 0), ("a dog", 1), ("a cat", 0), ("a cat", 1))
    ]
    assert len({row.key for row in rows}) == 6


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "\n\n", "no prompt"),
        ("a.xlsx", "x", ".parquet"),
        ("a.csv", "caption\na cat\n", "no column prompt"),
        ("a.csv", "prompt,seed\na cat,-1\n", "row 1: seed"),
        ("a.csv", "prompt,seed\na cat,1\na dog,1.5\n", "row 2: seed"),
        ("a.csv", 'prompt\n"a cat', "no table"),
        ("a.jsonl", '{"prompt": "a cat"}\n{"prompt"', "line 2 is no JSON"),
        ("a.jsonl", "[1]", "line 1 is no object"),
        ("a.jsonl", '{"prompt": 5}', "prompt must be text"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "prompt must be text"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', "row 1: seed"),
        ("a.jsonl", '{"prompt": "a", "seed": 9223372036854775808}', "too large"),
        ("a.jsonl", '{"prompt": "a", "height": 20}', "row 1: Height"),
        ("a.jsonl", '{"seed": 5, "prompt": null}', "row 1 has no prompt"),
        ("a.parquet", "PAR1", "no whole Parquet"),
    ],
)
def test_lists_that_cannot_be_drawn(tmp_path, name, text, words):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(EncacheError, match=words):
        read_rows(tmp_path / name, 1, NOTHING_SAID)


def test_pictures_are_those_of_encache_run(batch, tmp_path, engine_folder):
    (tmp_path / "list.txt").write_text("hot dog\nred apple\n")
    batch("list.txt", "--num-images", 2, "--seed", 5, "--output", "out")
    arguments = ["--prompts-file", "list.txt", "--num-images", "2", "--seed", "5", "--steps", "4"]
    CliRunner().invoke(encache_run, [*arguments, "--engine-dir", str(engine_folder)])
    theirs = [read_metadata(path) for path in sorted((tmp_path / "outputs").iterdir())]
    expected = [Image.open(path).tobytes() for path in sorted((tmp_path / "outputs").iterdir())]
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").open()]
    for line, facts, picture in zip(lines, theirs, expected, strict=True):
        path = tmp_path / "out" / line["file_name"]
        assert read_metadata(path) == facts
        assert (line["text"], line["seed"]) == (facts["prompt"], facts["seed"])
        ours = Image.open(path).tobytes()
        assert max(abs(a - b) for a, b in zip(ours, picture, strict=True)) <= 1  # other batches


@pytest.mark.parametrize("format", [[], ["--shards", "--shard-size", 2]])
def test_encache_train_reads_the_pictures(batch, tmp_path, format):
    (tmp_path / "list.txt").write_text("hot dog\nred apple\nhot dog\n")
    result = batch("list.txt", *format)
    pictures = open_pictures(tmp_path / result.stdout.strip())
    assert pictures.captions == ["hot dog", "red apple", "hot dog"]
    assert (pictures.num_without_caption, pictures.num_without_picture) == (0, 0)
    first, _, third = (pictures.read(index, None)[0].tobytes() for index in range(3))
    assert first == third


@pytest.mark.parametrize("format", [[], ["--shards", "--shard-size", "8"]])
def test_a_killed_run_ends_as_if_it_had_not_been(batch, tmp_path, engine_folder, format):
    prompts = write_prompts(tmp_path / "list.txt")
    command = [*PROGRAM, prompts, "--engine-dir", engine_folder, "--steps", "4"]
    command += ["--output", tmp_path / "killed", "--batch-size", "4", *format]
    with subprocess.Popen(command) as process:
        while not any((tmp_path / "killed").rglob("*.png")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("??/*.png")}
    assert len(kept) < 30
    for output in ("killed", "whole"):
        batch(prompts, "--output", output, "--batch-size", 4, *format)
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")
    assert len(open_pictures(tmp_path / "killed").names) == 30
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_stop_between_picture_and_record(batch, tmp_path):
    prompts = write_prompts(tmp_path / "list.txt", 5)
    batch(prompts, "--batch-size", 2)
    whole = content_of(tmp_path / "pictures")
    metadata = tmp_path / "pictures" / "metadata.jsonl"
    metadata.write_text(metadata.read_text()[:-9])  # half of the last line
    lost = sorted((tmp_path / "pictures").glob("??/*.png"))[0]
    lost.unlink()
    (lost.parent / ".left.png.123").write_bytes(b"half")
    (tmp_path / "pictures" / ".metadata.jsonl.123").write_bytes(b"half")
    batch(prompts, "--batch-size", 2)
    assert content_of(tmp_path / "pictures") == whole
    assert not (tmp_path / "pictures" / ".metadata.jsonl.123").exists()


def test_a_full_disk(batch, tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path / "list.txt", 5)
    batch(prompts, "--batch-size", 2, "--output", "whole")
    written = []

    def write(path, content):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write_new(path, content)

    with monkeypatch.context() as full:
        full.setattr("encache.serve.outputs.write_new", write)
        assert "free some space" in batch(prompts, "--batch-size", 2, code=1).stderr
    batch(prompts, "--batch-size", 2)
    assert content_of(tmp_path / "pictures") == content_of(tmp_path / "whole")


def test_a_longer_list_draws_what_is_new(batch, tmp_path):
    prompts = write_prompts(tmp_path / "list.txt", 3)
    batch(prompts)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").glob("??/*.png")}
    prompts.write_text("red apple\n" + prompts.read_text())
    batch(prompts)
    assert open_pictures(tmp_path / "pictures").captions[:2] == ["red apple", "hot dog 0"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    prompts.write_text("red apple\n")
    batch(prompts)
    assert len(open_pictures(tmp_path / "pictures").captions) == 4


def test_nothing_is_drawn_twice(batch, tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path / "list.txt", 3)
    batch(prompts)
    monkeypatch.setattr("encache.serve.bulk.Worker", None)  # no engine is opened either
    batch(prompts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--stride", "2"], "another plan"),
        (["--shards"], "another format"),
        (["--guidance-scale", "2"], "another guidance_scale"),
    ],
)
def test_other_pictures_need_another_folder(batch, tmp_path, changes, words):
    prompts = write_prompts(tmp_path / "list.txt", 1)
    batch(prompts)
    assert words in batch(prompts, *changes, code=1).stderr


def test_folders_of_others(batch, tmp_path):
    prompts = write_prompts(tmp_path / "list.txt", 1)
    assert "not empty" in batch(prompts, "--output", ".", code=1).stderr
    batch(prompts, "--shards")
    write_prompts(prompts, 2)
    assert "another list" in batch(prompts, "--shards", code=1).stderr
    (tmp_path / "pictures" / ".encache-batch.json").write_text("{")
    assert "damaged" in batch(prompts, "--shards", code=1).stderr


def test_one_process_writes_at_a_time(batch, tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path / "list.txt", 1)
    refused = []

    def finish(self):
        refused.append(batch(prompts, code=1).stderr)

    monkeypatch.setattr(ImageFolder, "finish", finish)
    batch(prompts)
    assert "Another encache-batch" in refused[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard-size", "5"], "--shards"),
        (["--cores", "1"], "--workers"),
        (["--key-calls", "0", "--stride", "2"], "--key-calls"),
        (["--dtype", "fp16"], "one engine folder"),
    ],
)
def test_options_that_mean_nothing(batch, tmp_path, options, words):
    assert words in batch(write_prompts(tmp_path / "list.txt", 1), *options, code=2).stderr


def test_the_cost_is_known_before(batch, tmp_path):
    prompts = write_prompts(tmp_path / "list.txt", 5)
    result = batch(prompts, "--num-images", 2, "--stride", 2, "--dry-run")
    assert json.loads(result.stdout) == {
        "pictures": 10,
        "evaluations": 20,
        "rows": 40,
        "decoder_rows": 0,
    }
    assert not Path("pictures").exists()


def test_a_picture_that_cannot_be_drawn_ends_the_run(batch, tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path / "list.txt", 1)

    def refuse(*_):
        raise EncacheError("it is black")

    monkeypatch.setattr("encache.runtime.generator.draw", lambda *a, **k: refuse())
    assert "it is black" in batch(prompts, code=1).stderr


@pytest.mark.parametrize(
    ("address", "wanted", "total", "expected"),
    [
        (None, (2, None), {"CPU": 8.0}, (2, {"num_cpus": 4.0})),
        (None, (None, 2), {"CPU": 8.0}, (4, {"num_cpus": 2.0})),
        ("auto", (None, None), {"CPU": 8.0}, (8, {"num_cpus": 1.0})),
        ("auto", (None, None), {"CPU": 36.0, "GPU": 2.0}, (2, {"num_cpus": 1.0, "num_gpus": 1.0})),
        ("auto", (4, 3), {"CPU": 36.0, "GPU": 2.0}, (4, {"num_cpus": 3.0, "num_gpus": 0.5})),
    ],
)
def test_what_each_worker_gets(address, wanted, total, expected):
    assert Cluster(address, *wanted).resources(total) == expected


def test_what_ray_says_is_one_sentence(batch, tmp_path, monkeypatch):
    class RayError(Exception):
        pass

    def fail(error, **_):
        raise error

    altered = partial(fail, RayError("Traceback\n  File x\nEngineError: it was altered"))
    ray = SimpleNamespace(
        init=lambda **_: None,
        shutdown=lambda: None,
        cluster_resources=altered,
        exceptions=SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setattr("encache.serve.bulk._import_ray", lambda: ray)
    prompts = write_prompts(tmp_path / "list.txt", 1)
    assert "EngineError: it was altered" in batch(prompts, "--workers", 2, code=1).stderr
    ray.init = partial(fail, ConnectionError("nobody answers"))
    refused = batch(prompts, "--ray-address", "auto", code=1).stderr
    assert "no Ray cluster at auto: nobody answers" in refused


def test_a_worker_keeps_to_its_cores(engine_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray sets it
    graphs, _ = open_onnxruntime(engine_folder, read_manifest(engine_folder))
    options = [graph._session.get_session_options() for graph in graphs.values()]
    assert {one.intra_op_num_threads for one in options} == {1}


@pytest.fixture
def two_workers(monkeypatch):
    """Options of two workers of Ray, which finds this folder's modules."""
    pytest.importorskip("ray", reason="several workers need Ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # not behind all else that runs here
    return ["--workers", "2", "--cores", "1"]


def test_workers_change_no_picture_though_one_is_killed(
    batch, tmp_path, engine_folder, two_workers
):
    prompts = write_prompts(tmp_path / "list.txt", 40)
    batch(prompts, "--output", "one", "--batch-size", 2)
    command = [*PROGRAM, prompts, "--engine-dir", engine_folder, "--steps", "4"]
    command += ["--output", tmp_path / "two", "--batch-size", "2", *two_workers]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        while not any((tmp_path / "two").rglob("*.png")) and process.poll() is None:
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [one for one in children if one.name().startswith("ray::MapWorker")]
        assert len(workers) == 2
        workers[0].kill()
        said, complained = process.communicate()
        assert process.returncode == 0, complained
        assert said == f"{tmp_path / 'two'}\n"
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")
