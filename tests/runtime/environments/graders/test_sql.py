"""A task's own database: the permitted statements, and the grading of its state."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from runtime.environments.converters.agentbench import read_agentbench
from runtime.environments.graders.base import GradingResources, Submission
from runtime.environments.graders.sql import DatabaseState
from runtime.environments.sql_database import SqlDatabase, Table
from runtime.errors import ToolError
from tests.support.shared_data import find_shared, read_shared_rows

FRUIT = Table.model_validate(
    {
        "name": "my fruit",
        "columns": [{"name": "name"}, {"name": "n", "type": "INTEGER"}],
        "rows": [["fig", 2], ["kiwi", 9]],
    }
)


@pytest.fixture
async def database():
    database = SqlDatabase([FRUIT])
    yield database
    await database.close()


async def test_statements_read_and_change_the_tables(database: SqlDatabase):
    assert await database.execute("SELECT name FROM `my fruit` WHERE n > 5") == "[('kiwi',)]"
    assert await database.execute("UPDATE `my fruit` SET n = 3 WHERE name = 'fig'") == "1 rows changed"
    assert await database.execute('SELECT n FROM "my fruit"') == "[(3,), (9,)]"
    with pytest.raises(ToolError, match="no such table: nuts"):
        await database.execute("SELECT * FROM nuts")


@pytest.mark.parametrize(
    "statement",
    [
        "ATTACH DATABASE '{}/other.db' AS other",
        "PRAGMA temp_store_directory = '/tmp'",
        "VACUUM INTO '{}/copy.db'",
        "SELECT load_extension('{}/evil.so')",
        "SELECT writefile('{}/made', 'x')",
        "CREATE TEMP TABLE made AS SELECT 1",
        "CREATE TABLE temp.made (x)",
        "CREATE TEMP VIEW made AS SELECT 1",
        "CREATE VIRTUAL TABLE temp.made USING fts5(x)",
        "SELECT 1; SELECT 2",
    ],
)
async def test_a_statement_reaches_nothing_outside(database: SqlDatabase, tmp_path: Path, statement: str):
    with pytest.raises(ToolError):
        await database.execute(statement.format(tmp_path))
    assert not any(tmp_path.iterdir())


async def test_a_statement_that_takes_too_long_or_too_much_is_stopped(
    database: SqlDatabase, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("runtime.environments.sql_database.STATEMENT_SECONDS", 0.2)
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    with pytest.raises(ToolError, match=r"interrupted; a statement may take 0.2 seconds"):
        await database.execute(endless)
    with pytest.raises(ToolError, match="too big"):
        await database.execute("SELECT zeroblob(100000000)")
    many = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT hex(zeroblob(10000)) FROM c"
    assert 40_000 < len(await database.execute(many)) < 70_000
    assert await database.execute("SELECT 1") == "[(1,)]"


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        (
            "replace(hex(zeroblob(30000)), '0', 'a') LIKE '%' || replace(hex(zeroblob(200)), '0', 'a') || 'b'",
            "too complex",
        ),
        ("'a' GLOB replace(hex(zeroblob(200)), '0', '*')", "too complex"),
        ("replace(hex(zeroblob(30000)), '0', 'ab')", "too big"),
        ("length(randomblob(100000))", "too big"),
        (" + ".join(["abs(1)"] * 101), "not authorized"),
        ("'" + "a" * 70_000 + "'", "too (big|large)"),
    ],
)
async def test_no_single_operator_outlasts_the_deadline(database: SqlDatabase, expression: str, complaint: str):
    with pytest.raises(ToolError, match=complaint):
        await database.execute(f"SELECT {expression}")
    assert await database.execute("SELECT 'fig' LIKE '%g', abs(-1)") == "[(1, 1)]"


async def test_a_sort_fills_no_disk(database: SqlDatabase, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("runtime.environments.sql_database.MAX_TEMPORARY_BYTES", 2**20)
    monkeypatch.setattr("runtime.environments.sql_database.STATEMENT_SECONDS", 60.0)
    numbers = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
    with pytest.raises(ToolError, match="interrupted; a statement may take 60 seconds and 1 MB of temporary files"):
        await database.execute(f"{numbers} SELECT x, zeroblob(60000) AS y FROM c ORDER BY y")
    assert await database.execute("SELECT name FROM `my fruit` ORDER BY n DESC") == "[('kiwi',), ('fig',)]"


async def test_closing_ends_the_statement_that_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("runtime.environments.sql_database.STATEMENT_SECONDS", 60.0)
    database = SqlDatabase([FRUIT])
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    running = asyncio.create_task(database.execute(endless))
    await asyncio.sleep(0.1)
    await database.close()
    assert not running.done()  # closing did not wait for it
    with pytest.raises(ToolError, match="interrupted"):
        await running


async def test_the_state_counts_whatever_the_order_of_rows(database: SqlDatabase):
    rule = DatabaseState(type="database_state", statement="UPDATE `my fruit` SET n = 3 WHERE name = 'fig'")
    submission = Submission("done", database=database)
    assert (await rule.grade(submission, GradingResources())).value == 0.0
    await database.execute("DELETE FROM `my fruit` WHERE name = 'fig'")
    await database.execute("INSERT INTO `my fruit` VALUES ('fig', 3)")
    assert (await rule.grade(submission, GradingResources())).value == 1.0
    await database.execute("DROP TABLE `my fruit`")
    assert (await rule.grade(submission, GradingResources())).value == 0.0


CONTACTS = Table.model_validate(
    {
        "name": "c",
        "columns": [{"name": "id", "type": "INTEGER"}, {"name": "home"}, {"name": "work"}],
        "rows": [[1, None, None], [2, None, None]],
    }
)


@pytest.mark.parametrize(
    ("wanted", "played", "reward"),
    [
        ("UPDATE c SET work = '123' WHERE id = 1", "UPDATE c SET work = 123 WHERE id < 2", 1.0),
        ("UPDATE c SET work = '123' WHERE id = 1", "UPDATE c SET home = '123' WHERE id = 1", 0.0),
        ("UPDATE c SET home = 'a', work = 'b,c'", "UPDATE c SET home = 'a,b', work = 'c'", 0.0),
        ("UPDATE c SET work = 'None'", "UPDATE c SET home = 'None'", 0.0),
        ("INSERT INTO c VALUES (3, 'a', 'b')", "INSERT INTO c VALUES (3, 'a', 'b'), (3, 'a', 'b')", 0.0),
        ("ALTER TABLE c ADD COLUMN mail", "SELECT 1", 0.0),
        ("ALTER TABLE c ADD COLUMN mail", "ALTER TABLE c ADD COLUMN mail TEXT", 1.0),
        ("CREATE TABLE d (x)", "SELECT 1", 0.0),
        ("ALTER TABLE c RENAME TO d", "SELECT 1", 0.0),
        ("ALTER TABLE c RENAME TO d", "ALTER TABLE c RENAME TO d", 1.0),
        ("DROP TABLE c", "DELETE FROM c", 0.0),
        ("DROP TABLE c", "DROP TABLE c", 1.0),
        ("SELECT 1", "ALTER TABLE c ADD COLUMN d AS (abs(-9223372036854775807 - 1))", 0.0),
        ("DELETE FROM c", "UPDATE c SET work = CAST(x'ff' AS TEXT)", 0.0),
    ],
)
async def test_the_state_is_that_of_the_statement_cell_by_cell(wanted: str, played: str, reward: float):
    database = SqlDatabase([CONTACTS])
    await database.execute(played)
    rule = DatabaseState(type="database_state", statement=wanted)
    assert (await rule.grade(Submission("done", database=database), GradingResources())).value == reward
    await database.close()


def test_a_table_with_a_short_row_is_refused():
    with pytest.raises(ValueError, match="row 2 of the table 't' has 1 values, not 2"):
        Table.model_validate({"name": "t", "columns": [{"name": "a"}, {"name": "b"}], "rows": [["1", "2"], ["3"]]})


async def test_digests_are_those_that_agentbench_publishes():
    """Of 60 published changes, all but those in MySQL's own spelling give the published digest."""
    rows = read_shared_rows("agentbench/dbbench_dev.jsonl")
    differing = []
    for row, task in zip(rows, read_agentbench(find_shared("agentbench/dbbench_dev.jsonl")), strict=True):
        if task["grader"]["type"] != "database_state":
            continue
        database = SqlDatabase([Table.model_validate(table) for table in task["database"]])
        await database.execute(row["label"][0])
        if await database.digest() != task["grader"]["digest"]:
            differing.append(row["label"][0])
        await database.close()
    assert len(differing) <= 1
