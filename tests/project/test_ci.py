"""`.ci/run` installs bubblewrap, without which tests are skipped, where it may, and then runs the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("bash", "dirname", "mktemp", "tail", "rm")


@pytest.mark.parametrize(
    ("user", "status", "said"),
    [(0, 0, "installing"), (0, 100, "could not install"), (1000, 0, "not installed, and only root on Debian could")],
)
def test_it_installs_bubblewrap_where_it_may_and_goes_on_in_any_case(tmp_path: Path, user: int, status: int, said: str):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in NEEDED:
        (programs / name).symlink_to(shutil.which(name))
    trace = tmp_path / "trace"
    played = {
        "id": f"echo {user}",
        "apt-get": f'echo "apt-get $*" >>{trace}; exit {status}',
        "make": f"echo make $* >>{trace}",
    }
    for name, body in played.items():
        (programs / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": str(programs)}
    run = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    assert said in run.stdout and "bubblewrap" in run.stdout
    lines = trace.read_text().splitlines()
    assert lines[-2:] == ["make lint", "make test"]
    is_asked = [line for line in lines if line.startswith("apt-get")]
    assert bool(is_asked) is (user == 0)
    assert (any("bubblewrap" in line for line in is_asked)) is (user == 0 and status == 0)
