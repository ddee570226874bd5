"""The budget of one `teach` run, in tokens and in money.

Invariant: before each call its worst case is reserved, so that what was spent and what may still be charged stay within
the limits together. Prices are per million tokens, in the currency of `max_cost`.
"""

from __future__ import annotations

from runtime.serving.chat_endpoint import Usage

MILLION = 1_000_000


class BudgetSpent(Exception):
    """The worst case of the next call does not fit into what is left."""


class TeacherBudget:
    """The `CallBudget` of a run: what it may spend, has spent and has reserved."""

    def __init__(
        self,
        *,
        max_tokens: int,
        max_cost: float | None = None,
        prompt_price: float | None = None,
        output_price: float | None = None,
    ) -> None:
        self._max_tokens = max_tokens
        self._max_cost = max_cost
        self._prompt_price = prompt_price
        self._output_price = output_price
        self._spent = Usage(0, 0)
        self._reserved: list[Usage] = []
        self.num_calls = 0

    def reserve(self, prompt_tokens: int, output_tokens: int) -> Usage:
        """Reserve the worst case of a call; every reservation is released, or charged, once.

        Raises:
            BudgetSpent: it does not fit; the message names the limit.
        """
        worst = Usage(prompt_tokens, output_tokens)
        if self.exceeds(worst):
            left = f"{self._max_tokens - self._num_committed()} of {self._max_tokens} tokens"
            if self._max_cost is not None:
                left += f" and {self._max_cost - self._committed_cost():.4f} of {self._max_cost:g} (teacher.max_cost)"
            raise BudgetSpent(
                f"the next call may take {worst.num_tokens} tokens, and {left} are left: raise teacher.max_tokens or "
                "teacher.max_cost, or run the command again later"
            )
        self._reserved.append(worst)
        return worst

    def exceeds(self, worst: Usage) -> bool:
        """Return whether a call with this worst case would exceed a limit."""
        if self._num_committed() + worst.num_tokens > self._max_tokens:
            return True
        return self._max_cost is not None and self._committed_cost() + self._cost(worst) > self._max_cost

    def release(self, reservation: Usage) -> None:
        """Take back the reservation of a call that the endpoint refused and does not charge."""
        self._reserved.remove(reservation)

    def charge(self, reservation: Usage, usage: Usage | None) -> None:
        """Replace a reservation by what the endpoint reports; without a report the worst case is charged."""
        self._reserved.remove(reservation)
        used = reservation if usage is None else usage
        self.num_calls += 1
        self._spent = Usage(
            self._spent.prompt_tokens + used.prompt_tokens, self._spent.output_tokens + used.output_tokens
        )

    def to_json(self) -> dict[str, int | float | None]:
        """Return what was spent and what is left; costs are None without prices."""
        has_prices = self._prompt_price is not None and self._output_price is not None
        cost = self._cost(self._spent) if has_prices else None
        return {
            "num_calls": self.num_calls,
            "prompt_tokens": self._spent.prompt_tokens,
            "output_tokens": self._spent.output_tokens,
            "tokens_spent": self._spent.num_tokens,
            "tokens_left": max(0, self._max_tokens - self._spent.num_tokens),
            "cost_spent": None if cost is None else round(cost, 6),
            "cost_left": None if cost is None or self._max_cost is None else round(max(0.0, self._max_cost - cost), 6),
        }

    def _num_committed(self) -> int:
        return self._spent.num_tokens + sum(each.num_tokens for each in self._reserved)

    def _committed_cost(self) -> float:
        return sum(map(self._cost, [self._spent, *self._reserved]))

    def _cost(self, usage: Usage) -> float:
        prompt = usage.prompt_tokens * (self._prompt_price or 0.0)
        return (prompt + usage.output_tokens * (self._output_price or 0.0)) / MILLION
