"""Documents, their passages, and their replacement."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.errors import DocumentTooLong, UnknownDocument
from memory.records.documents import Documents, split_text
from memory.storage.database import Database


@pytest.fixture
def documents(database: Database) -> Documents:
    return Documents(database, passage_tokens=20)


async def test_the_same_content_again_changes_nothing(documents: Documents):
    first = await documents.ingest("Stove", "How to fry.")
    assert await documents.ingest("Stove", "How to fry.") == first
    assert await documents.ingest("Another title", "How to fry.") == first
    assert documents.select() == [first]


async def test_the_same_title_replaces_the_document_as_a_whole(documents: Documents):
    first = await documents.ingest("Stove", "How to fry.\n\n" + "Old words. " * 40)
    second = await documents.ingest(" Stove ", "How to roast.")
    assert documents.select() == [second] and second.id != first.id
    assert [passage.text for passage in documents.passages(second.id)] == ["How to roast."]
    with pytest.raises(UnknownDocument, match=first.id):
        documents.passages(first.id)


async def test_a_removed_document_is_gone(documents: Documents):
    document = await documents.ingest("Stove", "How to fry.")
    await documents.remove(document.id)
    assert documents.select() == []
    with pytest.raises(UnknownDocument, match=document.id):
        await documents.remove(document.id)


async def test_a_file_is_read_and_a_binary_one_refused(documents: Documents, tmp_path: Path):
    (tmp_path / "stove.md").write_text("# Stove\n\nHow to fry.", encoding="utf-8")
    (tmp_path / "stove.png").write_bytes(b"\x89PNG\xff\xfe")
    assert (await documents.ingest("Stove", tmp_path / "stove.md")).title == "Stove"
    with pytest.raises(ValueError, match=r"stove\.png.*not UTF-8"):
        await documents.ingest("Picture", tmp_path / "stove.png")
    with pytest.raises(ValueError, match="'Empty' holds no text"):
        await documents.ingest("Empty", " \n ")
    with pytest.raises(ValueError, match="needs a title"):
        await documents.ingest(" ", "text")


async def test_a_document_of_too_many_passages_is_refused_by_the_settings_name(database: Database):
    documents = Documents(database, passage_tokens=20, max_passages=3)
    kept = await documents.ingest("Notes", "# a\n# b\n# c\n")
    began = time.process_time()
    with pytest.raises(DocumentTooLong, match=r"'Notes' has more than 3 passages.*memory\.max_document_passages"):
        await documents.ingest("Notes", "# a\n" * 250_000)
    assert time.process_time() - began < 5
    assert documents.select() == [kept] and len(documents.passages(kept.id)) == 3


def test_passages_follow_the_structure():
    text = "# Stove\n\nFry here.\n\nRoast elsewhere.\n\n# Oven\n\n" + "Roast in it. " * 12
    passages = list(split_text(text, 100))
    assert passages[0] == "# Stove\n\nFry here.\n\nRoast elsewhere."
    assert passages[1].startswith("# Oven\n\nRoast in it.") and passages[1].endswith(".")


@given(st.text(alphabet="ab .\n#!é", max_size=400), st.integers(1, 60))
def test_no_passage_is_too_long_and_no_word_is_lost(text: str, max_chars: int):
    passages = list(split_text(text, max_chars))
    assert all(0 < len(passage) <= max_chars for passage in passages)
    assert "".join("".join(passages).split()) == "".join(text.split())
