"""A document of too many passages is refused before anything of it is written."""

from __future__ import annotations

from pathlib import Path

import httpx

from memory.config import MemoryConfig
from tests.runtime.api.playing import PlayedWorld


def test_a_document_of_too_many_passages_is_a_413_that_names_the_setting(tmp_path: Path):
    config = MemoryConfig(max_document_passages=3)
    with PlayedWorld(tmp_path / "data", memory_config=config) as world:
        url = f"{world.url}/v1/documents"
        refused = httpx.post(url, json={"title": "Notes", "text": "# a\n" * 4}, timeout=30)
        assert refused.status_code == 413
        error = refused.json()["error"]
        assert error["code"] == "document_too_long" and "memory.max_document_passages" in error["message"]
        assert httpx.get(url, trust_env=False, timeout=60).json()["data"] == []
        assert httpx.post(url, json={"title": "Notes", "text": "# a\n" * 3}, timeout=30).status_code == 201
