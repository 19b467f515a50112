"""run.sh with stand-ins for Python: nothing is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "run.sh"

# Answers the two questions that run.sh asks a Python, makes "environments" of itself, and logs
# everything else.
STAND_IN = """#!/bin/sh
case "$*" in
  *print*) echo {version};;
  *sys.exit*) exit {too_old};;
  "-m pip --version") exit {no_pip};;
  "-m venv "*) mkdir -p "$3/bin"; cp "{working}" "$3/bin/python";;
esac
echo "$@" >> "{log}"
"""


@pytest.fixture
def run(tmp_path):
    """run.sh with a PATH that has no Python but the one given."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "sh", "dirname", "cat", "cksum", "mkdir", "cp"):
        (tools / tool).symlink_to(shutil.which(tool))

    def run(*arguments, **environment):
        environment = {"PATH": str(tools), "SICOT_VENV": str(tmp_path / "venv"), **environment}
        return subprocess.run([RUN, *arguments], env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def stand_in(tmp_path):
    def make(name, *, version="3.12", too_old=0, no_pip=0):
        path = tmp_path / name
        working = path if not no_pip else tmp_path / "working"
        text = STAND_IN.format(
            version=version, too_old=too_old, no_pip=no_pip, working=working, log=tmp_path / "log"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    return make


def test_without_python_it_is_one_line_and_code_2(run, stand_in):
    done = run("test")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "run.sh: no Python 3.11 or newer as python3 python3.13 python3.12 python3.11; install one, "
        "or name it: PYTHON=/path/to/python ./run.sh"
    ]
    for python in ("/nowhere/python", stand_in("old", too_old=1)):
        done = run("test", PYTHON=python)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"run.sh: no Python 3.11 or newer as {python};")


def test_an_environment_without_pip_is_created_again(run, stand_in, tmp_path):
    python = stand_in("python")
    stand_in("venv/bin/python", no_pip=1)
    done = run("train", PYTHON=python)
    assert done.returncode == 0
    assert "making the environment" in done.stderr
    log = (tmp_path / "log").read_text().splitlines()
    assert f"-m venv {tmp_path / 'venv'}" in log
    assert log[-1] == "-m sicot_jax.main train"
    log_before = len(log)
    done = run("train", PYTHON=python)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "-m venv" not in "\n".join((tmp_path / "log").read_text().splitlines()[log_before:])


def test_an_environment_of_another_python_is_refused(run, stand_in, tmp_path):
    stand_in("venv/bin/python", version="3.11")
    done = run("test", PYTHON=stand_in("python"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"run.sh: {tmp_path / 'venv'} has Python 3.11, PYTHON is 3.12; remove it, or name another"
    )
