"""The policy that comes with an embedded model: an adapter of this project's, which a new data directory starts with.

Invariant: only a new directory gets it; the caller knows whether it is one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from memory.adapters import FILE_NAMES, digest_adapter, read_manifest, write_adapter_atomically
from memory.records.policies import BASE_VERSION, Policies
from memory.schema import Policy

NOTE = "comes with the embedded model; its release report is in the model's directory"


async def install_embedded_policy(policies: Policies, adapters: Path, adapter: Path) -> Policy:
    """Make `adapter` the active policy of a directory whose only policy is the bare base; return it.

    `adapters` is the data directory's folder of adapters. The adapter is copied there, because an upgrade of the
    program replaces its own files, and an engine may read an adapter's again at any time.
    """
    manifest = read_manifest(adapter)
    directory = adapters / f"{manifest.name}-v{manifest.version}"
    if not directory.exists():  # it does after a start that was killed here
        unfinished = adapters / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(adapter, unfinished, ignore=lambda _, names: set(names) - FILE_NAMES)
        write_adapter_atomically(unfinished, directory)
    policy = await policies.draft(
        adapter_path=str(directory), adapter_digest=digest_adapter(directory), parent=BASE_VERSION, note=NOTE
    )
    return await policies.promote(policy.version)
