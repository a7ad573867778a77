"""encache-export as its users type it."""

import subprocess
import sys
import time

from click.testing import CliRunner
from safetensors.torch import save_file

from encache.export.cli import main
from tests.conftest import SLIM, tiny_unet


def export(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_repeating_a_finished_export_says_so_at_once(model_folder, engine_folder):
    command = [sys.executable, "-c", "from encache.export.cli import main; main()"]
    command += ["--ckpt", str(model_folder), "--engine-dir", str(engine_folder.parent)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{engine_folder}\n"
    assert "Nothing to do" in done.stderr
    # Without importing torch it takes 0.2 s; the bound leaves room for a busy machine.
    assert time.perf_counter() - start < 2


def test_a_unet_over_its_base(slim_folder, tmp_path):
    path = tmp_path / "fcr.safetensors"
    save_file(tiny_unet(seed=1, **SLIM).state_dict(), path)
    result = export("--ckpt", path, "--base", slim_folder, "--engine-dir", tmp_path / "engines")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(str(tmp_path / "engines" / "fcr-"))
    assert "checked unet: relative error" in result.stderr


def test_mistakes(model_folder, engine_folder):
    for arguments, code, word in [
        (("--ckpt", "/no/model"), 1, "/no/model"),
        (("--ckpt", "model.ckpt"), 1, "pickle"),
        (("--backend", "abacus"), 2, "abacus"),
        (("--cut", "down1"), 2, "down1"),
        (("--dtype", "int4"), 2, "int4"),
        (("--ckpt", model_folder, "--engine-dir", "/proc/none"), 1, "/proc/none"),
        (("--ckpt", model_folder, "--engine-dir", engine_folder), 1, "its parent"),
    ]:
        result = export(*arguments)
        assert result.exit_code == code, result.output
        assert word in result.stderr.strip().splitlines()[-1]
        assert isinstance(result.exception, SystemExit)  # anything else would be a traceback


def test_the_help_is_laid_out():
    text = export("--help").output
    assert "\\b" not in text
    assert "\b" not in text
    assert "\n    encache-export --ckpt fcr.safetensors" in text
