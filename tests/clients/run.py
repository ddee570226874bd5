"""Runs every client against a server with the pocket model and one with SmolLM2-135M, and writes docs/clients.md.

    python -m tests.clients.run                                    everything
    python -m tests.clients.run --client llm --model pocket        some of it; the table keeps the other cells
    python -m tests.clients.run --url http://127.0.0.1:8080 --model pocket      a server that runs already

Results are kept in results.json beside this file, environments and node modules in the user's cache. Packages come from
the indexes that uv and npm are configured with; versions are pinned in `requirements/` and `node/package-lock.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.clients.matrix import CLIENTS, DISTRIBUTIONS, HERE, NODE, Client
from tests.clients.table import OUTCOMES, Cell, render, replace_table

ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "clients.md"
RESULTS = HERE / "results.json"
"""In the repository, so that a run of some clients keeps the others' rows of the table."""
UV = "uv==0.13.9"
CLIENT_SECONDS = 1800
MODELS = {"pocket": "the pocket model", "smollm2": "SmolLM2-135M-Instruct"}
# Switches off telemetry and look-ups of the clients, which are no part of a check.
QUIET = {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "OTEL_SDK_DISABLED": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "OPENAI_API_KEY": "none",
    "NO_PROXY": "127.0.0.1,localhost",
}


def home() -> Path:
    """Return the directory of environments."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ratchet-clients"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def find_uv() -> str:
    """Return the program; install it into the cache first if it is missing."""
    found = shutil.which("uv", path=os.pathsep.join([os.environ.get("PATH", ""), str(home() / "uv" / "bin")]))
    if found is not None:
        return found
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--target", str(home() / "uv"), UV], check=True)
    return str(home() / "uv" / "bin" / "uv")


def install(client: Client) -> list[str]:
    """Create the client's environment from its pins; return the command that runs its script."""
    if client.is_node:
        return install_node(client)
    if client.requirements is None:
        return [sys.executable, str(client.script)]
    environment = home() / (client.package or "")
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([find_uv(), "venv", "--quiet", "--python", sys.executable, str(environment)], check=True)
    sync = [find_uv(), "pip", "sync", "--quiet", "--native-tls", "--python", str(python), str(client.requirements)]
    subprocess.run(sync, check=True)
    return [str(python), str(client.script)]


def install_node(client: Client) -> list[str]:
    directory = home() / "node"
    shutil.copytree(NODE, directory, dirs_exist_ok=True)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--loglevel", "error"], check=True, cwd=directory)
    return ["node", str(directory / client.script.name)]


def read_version(client: Client, command: Sequence[str]) -> str:
    """Return the installed version."""
    if client.package is None:
        return subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    if client.is_node:
        package = home() / "node" / "node_modules" / client.package / "package.json"
        return json.loads(package.read_text(encoding="utf-8"))["version"]
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    distribution = DISTRIBUTIONS.get(client.package, client.package)
    asked = [command[0], "-c", code, distribution]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def serve(model: str) -> Iterator[str]:
    """Start a server with an empty database; yield its address."""
    data = home() / f"data-{model}"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    (data / "ratchet.toml").touch()
    flags = ["--config", str(data / "ratchet.toml"), "--data", str(data / "data"), "--port", "0", "--json"]
    flags += ["--engine.kv_cache_gib", "1", "--engine.startup_seconds", "900"]
    flags += ["--engine.model", model]
    with (data / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "serve.py", "serve", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {(data / 'server.log').read_text(errors='replace')[-2000:]}")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.communicate(timeout=180)


def run_client(client: Client, url: str, model: str) -> list[Cell]:
    """Install and run one client; a script that dies adds a failed check."""
    command = install(client)
    version, today = read_version(client, command), datetime.date.today().isoformat()
    environment = {**os.environ, **QUIET, "CLIENT_BASE_URL": f"{url}/v1", "HOME": str(home() / "home")}
    environment.pop("PYTHONPATH", None)
    (home() / "home").mkdir(exist_ok=True)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CLIENT_SECONDS, env=environment, cwd=home()
        )
        output, trouble, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        output, trouble, code = (late.stdout or b"").decode(), f"not done after {CLIENT_SECONDS} s", 1
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"check"')]
    if code != 0 or not found:
        found.append({"check": "script", "outcome": "failed", "reason": trouble[-400:] or "it printed nothing"})
    return [Cell(MODELS[model], client.name, version, date=today, **each) for each in found]


def keep(cells: Sequence[Cell]) -> list[Cell]:
    """Replace earlier cells of the same client and model; return all known cells, in order."""
    known = [Cell(**each) for each in json.loads(RESULTS.read_text(encoding="utf-8"))] if RESULTS.exists() else []
    known = [cell for cell in known if cell.outcome in OUTCOMES]  # earlier versions had other outcomes
    new = {(cell.model, cell.client) for cell in cells}
    together = [cell for cell in known if (cell.model, cell.client) not in new] + list(cells)
    models, clients = list(MODELS.values()), [client.name for client in CLIENTS]
    together = [cell for cell in together if cell.client in clients and cell.model in models]
    together.sort(key=lambda cell: (models.index(cell.model), clients.index(cell.client)))
    RESULTS.write_text(json.dumps([asdict(cell) for cell in together], indent=1) + "\n", encoding="utf-8")
    return together


def run_all(clients: Sequence[Client], url: str, model: str) -> int:
    """Run the clients one after the other, and write the page after each; return how many checks failed."""
    num_failed = 0
    for client in clients:
        cells = run_client(client, url, model)
        for cell in cells:
            print(f"{cell.model}  {cell.client}  {cell.check}: {cell.outcome}  {cell.reason}", flush=True)
        PAGE.write_text(replace_table(PAGE.read_text(encoding="utf-8"), render(keep(cells))), encoding="utf-8")
        num_failed += sum(cell.outcome == "failed" for cell in cells)
    return num_failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Run real clients against a server, and write docs/clients.md.")
    parser.add_argument("--client", action="append", choices=[client.name for client in CLIENTS])
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--url", help="A server that runs already; --model says what it serves.")
    given = parser.parse_args()
    clients = [client for client in CLIENTS if given.client is None or client.name in given.client]
    models = given.model or list(MODELS)
    if given.url and len(models) != 1:
        parser.error("--url needs --model, once: the table must say what the server serves")
    num_failed = 0
    for model in models:
        with contextlib.nullcontext(given.url) if given.url else serve(model) as url:
            num_failed += run_all(clients, url, model)
    print("\n" + PAGE.read_text(encoding="utf-8").split("make clients: begin -->")[1].split("<!--")[0])
    if num_failed:
        raise SystemExit(f"{num_failed} checks failed; each is named below its table in {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
