"""The tables of `arks.db`, and how an older file becomes today's.

`usage` has no rowid: its rows lie in the order of (id, attempt), so ids that grow with time append to the tree instead
of dirtying a page each. `counters` holds what was charged; what is only reserved follows from `leases`,
whose rows name the counters through `rulesets`: thousands of leases share a few of those.
"""

import sqlite3

MIGRATIONS = (
    """
    CREATE TABLE counters (
        key TEXT PRIMARY KEY, window_s INTEGER NOT NULL, start_s INTEGER NOT NULL, used INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE rulesets (id INTEGER PRIMARY KEY, holds BLOB NOT NULL);
    CREATE TABLE leases (
        id TEXT PRIMARY KEY, admitted_s REAL NOT NULL, expires_s REAL NOT NULL, requests INTEGER NOT NULL,
        prompt INTEGER NOT NULL, response INTEGER NOT NULL, ruleset INTEGER NOT NULL, context BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE usage (
        id TEXT NOT NULL, attempt INTEGER NOT NULL, request_id TEXT NOT NULL, time_ms INTEGER NOT NULL,
        token TEXT NOT NULL, namespace TEXT NOT NULL, model TEXT NOT NULL, endpoint TEXT NOT NULL,
        engine TEXT NOT NULL, status INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL,
        accuracy TEXT NOT NULL, stream INTEGER NOT NULL, duration_ms INTEGER NOT NULL, ttft_ms INTEGER,
        error TEXT NOT NULL, api TEXT NOT NULL, PRIMARY KEY (id, attempt)
    ) WITHOUT ROWID;
    CREATE INDEX usage_time ON usage (time_ms);
    """,
)
VERSION = len(MIGRATIONS)


def version(connection: sqlite3.Connection) -> int:
    """0 for an empty file."""
    known = connection.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'schema_version'")
    if known.fetchone() is None:
        return 0
    row = connection.execute("SELECT version FROM schema_version").fetchone()
    return int(row[0])


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file to `VERSION`, each step in a transaction of its own. The file is not newer."""
    for step in range(version(connection), VERSION):
        connection.executescript(
            f"""
            BEGIN IMMEDIATE;
            {MIGRATIONS[step]}
            CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL);
            DELETE FROM schema_version;
            INSERT INTO schema_version VALUES ({step + 1});
            COMMIT;
            """  # noqa: S608 - constants of this module only
        )
