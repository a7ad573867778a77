"""What the commands share."""

import click
import pytest
from click.testing import CliRunner

from encache.command import Command, FiniteFloat


@click.command(cls=Command)
@click.option("--any", type=FiniteFloat(), default=1.0)
@click.option("--share", type=FiniteFloat(0, 1, min_open=True), default=0.5)
def command(any: float, share: float) -> None:
    click.echo(f"{any} {share}")


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("option", ["--any", "--share"])
def test_numbers_that_are_not_finite_are_refused(option, value):
    result = CliRunner().invoke(command, [option, value])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr


def test_finite_numbers_are_read():
    result = CliRunner().invoke(command, ["--any", "-2.5e3", "--share", "1"])
    assert result.stdout == "-2500.0 1.0\n"


def test_bounds_are_kept_and_named():
    result = CliRunner().invoke(command, ["--share", "0"])
    assert "0.0 is not in the range 0<x<=1" in result.stderr
    text = CliRunner().invoke(command, ["--help"]).stdout
    assert "0<x<=1" in text
    assert "None" not in text
