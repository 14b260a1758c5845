"""The model and the data that the tests of this directory share."""

import pytest
from cli_cases import ROWS, write_model, write_rows

from flexjax.cli.main import main


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.fixture
def flexjax(capfd, monkeypatch, tmp_path):
    """Runs a command line in this process; returns status, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run
