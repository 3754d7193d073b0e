"""What rows of one call beside another have in common."""

from __future__ import annotations


class Compared:
    """A row whose time is to be at most `goal` times that of what it stands beside."""

    seconds: float
    other_seconds: float
    goal: float
    problem: str

    @property
    def ratio(self) -> float:
        """The time in units of the other's."""
        return self.seconds / self.other_seconds

    @property
    def missed(self) -> bool:
        return bool(self.problem) or self.ratio > self.goal
