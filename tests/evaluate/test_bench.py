"""encache-bench draws the same picture in every way, and says what each costs."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from encache.errors import EngineError
from encache.evaluate.bench import matrix_peak, measure
from encache.evaluate.bench_cli import main
from encache.evaluate.contenders import Task, assemble
from encache.model.arithmetic import count_arithmetic
from encache.model.checkpoint import find_checkpoint
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.settings import Policy
from tests.conftest import ONE_SEGMENT, save_tuned, tiny_unet


def bench(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def by_torch(pipeline, task, compiling=False):
    def open_backend(_, cut):
        return EncachePipeline.from_pipe(pipeline, cut)

    return assemble(pipeline, open_backend, ["torch"], ["up2"], task, compiling)[0]


def test_few_steps_guidance_and_an_existing_report(model_folder, tmp_path):
    """What was not asked for is not refused; the guidance is the model's; nothing is lost."""
    command = ["--ckpt", model_folder, "--backend", "torch", "--cut", "none", "--repeats", 1]
    command += ["--steps", 4, "--json", tmp_path / "bench.json"]
    first = bench(*command)
    assert first.exit_code == 0, first.output
    task = json.loads((tmp_path / "bench.json").read_text())["task"]
    assert task["policies"]["stride 3"]["stride"] == 3
    assert task["guidance_scale"] == find_checkpoint(model_folder).guidance_scale == 7.5
    again = bench(*command)
    assert again.exit_code == 1
    assert "bench.json exists already and is not overwritten" in again.stderr


def test_rows_of_every_backend(model_folder, up2_folder, tmp_path):
    path = tmp_path / "bench.json"
    result = bench(
        *("--ckpt", model_folder, "--engine-dir", up2_folder.parent, "--cut", "up2"),
        *("--steps", 6, "--stride", 3, "--repeats", 2, "--batch", 1, "--batch", 2),
        *("--json", path),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["task"]["policies"]["stride 3"]["stride"] == 3
    rows = {(row["backend"], row["sampling"], row["batch"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    assert rows["diffusers", "6 steps", 1]["speed"] == 1
    assert rows["diffusers", "6 steps", 1]["psnr"] is None
    assert {"diffusers, tomesd", "diffusers, DeepCache"} <= {backend for backend, _, _ in rows}
    for backend in ("torch", "onnxruntime"):
        full, cached = (rows[backend, name, 2] for name in ("6 steps", "cut up2, stride 3"))
        assert cached["psnr"] < 60 < full["psnr"]
        assert full["gflop"] == pytest.approx(rows["diffusers", "6 steps", 1]["gflop"])
        names = {name for (one, name, _), row in rows.items() if one == backend}
        (fewer,) = names - {"6 steps", "cut up2, stride 3"}
        steps = int(fewer.removesuffix(" steps"))
        assert steps / 6 * full["gflop"] <= cached["gflop"] < (steps + 1) / 6 * full["gflop"]
        parts = cached["parts"]
        assert set(parts) == {"texts", "encode", "decode", "codec", "outside"}
        assert all(seconds >= 0 for seconds in parts.values())
        assert cached["spread"][0] <= cached["seconds"] <= cached["spread"][1]
        assert cached["tflops"] == pytest.approx(cached["gflop"] * 2 / cached["seconds"] / 1e3)
    assert "onnxruntime, cut up2, stride 3" in result.stdout


def test_fitted_plans_are_timed_beside_strides(model_folder, plans, tmp_path):
    """Here plans that are the rule itself, at strides 2 and 5."""
    path = tmp_path / "bench.json"
    command = ["--ckpt", model_folder, "--backend", "torch", "--cut", "none", "--cut", "up2"]
    command += ["--repeats", 1, "--stride", 5, "--guidance-scale", 3, "--plan", plans]
    result = bench(*command, "--steps", 10, "--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    rows = {row["sampling"]: row for row in report["rows"] if row["backend"] == "torch"}
    fitted, rule = (rows[f"cut none, {name}"] for name in ("fitted plan of 2 runs", "stride 5"))
    assert fitted["gflop"] == rule["gflop"]
    assert fitted["psnr"] == pytest.approx(rule["psnr"], abs=0.1)
    assert "cut none, fitted plan of 5 runs" in rows
    assert not any("cut up2, fitted" in name for name in rows)
    assert len(report["task"]["policies"]["fitted plan of 2 runs"]["plan"]) == 16
    refused = bench(*command, "--steps", 11)
    assert refused.exit_code == 1
    assert "fitted for 10 steps, not 11" in refused.stderr


def test_plans_need_the_output_cache(plans):
    refused = bench("--plan", plans, "--cut", "mid")
    assert refused.exit_code == 2
    assert "add --cut none" in refused.stderr


def test_weights_made_for_a_plan_are_timed_beside_their_base(model_folder, tmp_path):
    tuned = save_tuned(tmp_path, model_folder, ONE_SEGMENT)
    path = tmp_path / "bench.json"
    result = bench(
        *("--ckpt", tuned.weights, "--backend", "torch", "--cut", "up2", "--steps", 6),
        *("--stride", 3, "--repeats", 1, "--json", path),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["model"] == "tuned"
    rows = {(row["backend"], row["sampling"]): row for row in report["rows"]}
    full, own = rows["torch", "6 steps"], rows["torch", "trained for 1 of 4 calls"]
    # One row per picture for two; the decoder's four calls and the encoder's one.
    cost = count_arithmetic(tiny_unet(), "mid", 8, 8, 16)
    assert own["gflop"] == pytest.approx(cost.encoder + 4 * cost.decoder)
    assert full["gflop"] == pytest.approx(2 * 6 * (cost.encoder + cost.decoder))
    # The full sampler is the base's: what it draws, diffusers draws.
    assert full["psnr"] > 60 > own["psnr"]


def test_every_full_sampler_draws_the_same(pipeline, up2_folder):
    def open_backend(backend, cut):
        if backend == "torch":
            return EncachePipeline.from_pipe(pipeline, cut)
        return EncachePipeline.from_engines(up2_folder)

    task = Task(("red apple",), 4, 7.5, None, None, {"stride 2": Policy(2)})
    contenders, _ = assemble(
        pipeline, open_backend, ["torch", "onnxruntime"], ["up2"], task, compiling=False
    )
    ((prompt, noise),) = task.draw_inputs(pipeline, 1, [0])
    full = [one.draw(prompt, noise) for one in contenders if one.sampling == "4 steps"]
    assert len(full) == 3
    for picture in full[1:]:
        torch.testing.assert_close(picture, full[0], rtol=1e-3, atol=1e-3)
    cached = next(one for one in contenders if one.sampling == "cut up2, stride 2")
    assert (cached.draw(prompt, noise) - full[0]).abs().max() > 1e-3


def test_timed_draws_are_replays_where_graphs_can_be(pipeline, monkeypatch):
    calls = {}

    class Counted:
        def __init__(self, function):
            self.function = function

        def __call__(self, *arguments):
            calls[self] = calls.get(self, 0) + 1
            return self.function(*arguments)

    def open_backend(backend, cut):
        ours = EncachePipeline.from_pipe(pipeline, cut)
        ours.engines.capturable = True
        return ours

    monkeypatch.setattr("encache.runtime.executor.Replay", Counted)
    policies = {f"stride {n}": Policy(n) for n in (2, 3)}
    task = Task(("red apple",), 4, 7.5, None, None, policies)
    contenders, _ = assemble(pipeline, open_backend, ["torch"], ["up2", "none"], task, False)
    ours = [one for one in contenders if one.backend == "torch"]
    measure(contenders, task.draw_inputs(pipeline, 1, range(3)), peak_tflops=1.0)
    # One draw warms up, three are timed, always by the same graph.
    assert sorted(calls.values()) == [4] * len(ours)


def test_what_cannot_run_is_named_and_the_rest_is_measured(pipeline):
    task = Task(("red apple",), 2, 7.5, None, None, {"stride 2": Policy(2)})
    contenders = by_torch(pipeline, task)

    def fail(*_):
        raise torch.OutOfMemoryError("too much")

    contenders.append(replace(contenders[0], backend="greedy", draw=fail))
    draws = iter(range(1))  # warm-up succeeds

    def tire(*_):
        if next(draws, None) is None:
            raise ValueError
        return torch.zeros(1, 3, 16, 16)

    contenders.append(replace(contenders[0], backend="tired", draw=tire))
    rows, failures = measure(contenders, task.draw_inputs(pipeline, 1, [0]), peak_tflops=1.0)
    assert failures == {
        "greedy, 2 steps": "too much",
        "tired, 2 steps": "ValueError",
    }
    assert len(rows) == len(contenders) - 2


def test_a_backend_that_does_not_open_is_named(pipeline):
    def open_backend(backend, cut):
        if backend == "tensorrt-rtx":
            raise EngineError("not here")
        return EncachePipeline.from_pipe(pipeline, cut)

    task = Task(("red apple",), 2, 7.5, None, None, {"stride 2": Policy(2)})
    wanted = ["tensorrt-rtx", "torch"], ["up2"], task
    contenders, left_out = assemble(pipeline, open_backend, *wanted, compiling=False)
    assert left_out == {"tensorrt-rtx, cut up2": "not here"}
    assert {"torch"} == {one.backend for one in contenders if one.pipeline}


def test_no_backend_that_opens(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = bench("--ckpt", model_folder, "--backend", "tensorrt", "--cut", "mid", "--steps", 2)
    assert result.exit_code == 1
    assert "No backend is left to measure. tensorrt, cut mid: " in result.stderr


def test_torch_compile_is_put_in_place_and_back(pipeline, monkeypatch):
    calls, modes = [], []

    def compile(forward, mode=None):
        modes.append(mode)
        return lambda *arguments, **options: calls.append(1) or forward(*arguments, **options)

    monkeypatch.setattr(torch, "compile", compile)
    task = Task(("red apple",), 2, 7.5, None, None, {"stride 2": Policy(2)})
    contenders = by_torch(pipeline, task, compiling=True)
    ((prompt, noise),) = task.draw_inputs(pipeline, 1, [0])
    plain, compiled = contenders[:2]
    with compiled.patch():
        picture = compiled.draw(prompt, noise)
    assert len(calls) == 3  # two calls of the UNet, one picture
    assert modes == ["reduce-overhead", None]
    torch.testing.assert_close(plain.draw(prompt, noise), picture)
    assert len(calls) == 3


def test_a_peer_that_is_missing_is_named(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    result = bench(
        *("--ckpt", model_folder, "--backend", "torch", "--cut", "mid"),
        *("--steps", 2, "--stride", 2, "--repeats", 1),
    )
    assert result.exit_code == 0, result.output
    assert "tomesd, batch 1 is left out" in result.stdout
    assert "diffusers, DeepCache" in result.stdout


def test_the_peak_is_that_of_a_product():
    assert 1e-3 < matrix_peak(torch.device("cpu"), torch.float32) < 1e3


def test_mistakes(model_folder):
    for arguments, code, word in [
        (("--sd15-shape", "--ckpt", model_folder), 2, "leave out --ckpt"),
        (("--ckpt", "/no/model"), 1, "/no/model"),
        (("--stride", 1), 2, "1"),
        (("--height", 100), 1, "try 96"),
        (("--json", "/proc/none/bench.json"), 1, "/proc/none"),
    ]:
        result = bench(*arguments)
        assert result.exit_code == code, result.output
        assert word in result.stderr
