"""Bounds the rows that each teacher contributes, and counts them for the report.

Row limits hold for every user, key and tenant that gave feedback. Shares apply only among several teachers,
because a single teacher drowns out nobody:
- A tenant other than the default one never gives more than its share, however few rows the others have: the weights
  serve all tenants, and the operator's own rows must not become the minority.
- A key or a user keeps at least `floor` rows, the fewest that a training needs. Otherwise one thumbs-up by a second
  person would cut the hundreds of a server's only real user down to one.
A reward measured by an environment has no claimant: it is bounded for its tenant only, and counts as others' rows. The
same holds for examples imported in the default tenant: who may import there may also start cycles, and a first few wins
must not cut a seed of hundreds down to their own number.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from memory.teaching import DEFAULT_TENANT, Teacher, TeacherKind
from optimizer.config import TeachingConfig

Teachers = tuple[Teacher, ...]
"""The teachers behind one row: a preference has two, one for each side."""


def _user_of(teacher: Teacher) -> Hashable | None:
    return None if teacher.kind is TeacherKind.ENVIRONMENT or not teacher.user_id else (teacher.tenant, teacher.user_id)


def _key_of(teacher: Teacher) -> Hashable | None:
    is_operators_import = teacher.kind is TeacherKind.IMPORT and teacher.tenant == DEFAULT_TENANT
    return None if teacher.kind is TeacherKind.ENVIRONMENT or is_operators_import else teacher.key_id


def _tenant_of(teacher: Teacher) -> Hashable | None:
    return None if teacher.tenant == DEFAULT_TENANT else teacher.tenant


GROUPS: tuple[tuple[str, Callable[[Teacher], Hashable | None]], ...] = (
    ("user", _user_of),
    ("key", _key_of),
    ("tenant", _tenant_of),
)


def choose_rows(
    teachers: Sequence[Teachers], config: TeachingConfig, *, floor: int, seed: int, counts: Counter[str]
) -> list[int]:
    """Return the positions of the rows to keep, in order; the rows left out are counted by reason."""
    # one sequence of draws, so the order of groups decides too: `teachers` must come in the same order from a repeated
    # stage
    dice = random.Random(seed)
    kept = list(range(len(teachers)))
    for name, group_of in GROUPS:
        most = getattr(config, f"max_rows_per_{name}")
        for rows in _rows_by_group(teachers, kept, group_of).values():
            kept = _leave_out(kept, rows, most, f"over_{name}_cap", dice, counts)
    if config.max_share == 1:
        return kept
    num_before = None
    while num_before != len(kept):  # a cut in one group makes the shares of the others larger
        num_before = len(kept)
        for name, group_of in GROUPS:
            least = 0 if name == "tenant" else floor
            for rows in _rows_by_group(teachers, kept, group_of).values():
                num_others = len(kept) - len(rows)
                # without others there is no share to exceed
                if num_others:
                    most = max(least, int(num_others * config.max_share / (1 - config.max_share)))
                    kept = _leave_out(kept, rows, most, f"over_{name}_share", dice, counts)
    return kept


def _rows_by_group(
    teachers: Sequence[Teachers], kept: Sequence[int], group_of: Callable[[Teacher], Hashable | None]
) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position in kept:
        # once for a preference whose two sides have one teacher; no set, whose order is another one in each process
        for group in dict.fromkeys(map(group_of, teachers[position])):
            if group is not None:
                groups[group].append(position)
    return groups


def _leave_out(
    kept: list[int], rows: Sequence[int], most: int, reason: str, dice: random.Random, counts: Counter[str]
) -> list[int]:
    """Return `kept` with at most `most` of a group's `rows`, chosen by chance."""
    # `rows` was grouped before earlier cuts of this round: some may be gone
    present = [position for position in rows if position in set(kept)]
    if len(present) <= most:
        return kept
    dropped = set(dice.sample(present, len(present) - most))
    counts[reason] += len(dropped)
    return [position for position in kept if position not in dropped]


def count_rows(teachers: Sequence[Teachers], key_names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return how many rows each teacher gave, the most first. A person is shown as a short hash."""
    num_rows_by = Counter(teacher for of_row in teachers for teacher in set(of_row))
    return [
        {
            "tenant": teacher.tenant,
            "teacher": teacher.kind.value,
            "key_id": teacher.key_id,
            "key_name": key_names.get(teacher.key_id or ""),
            "user": hash_user(teacher.tenant, teacher.user_id),
            "num_rows": num_rows,
        }
        for teacher, num_rows in sorted(num_rows_by.items(), key=lambda item: (-item[1], _order(item[0])))
    ]


def _order(teacher: Teacher) -> tuple[str, ...]:
    return (teacher.tenant, teacher.key_id or "", teacher.user_id, teacher.kind.value)


def hash_user(tenant: str, user_id: str) -> str:
    """Return eight characters that are the same for a person in every report, without identifying them."""
    # does not withstand guessing: a person who knows a user's id can compute its hash
    return hashlib.sha256(f"{tenant}/{user_id}".encode()).hexdigest()[:8] if user_id else ""
