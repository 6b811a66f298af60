"""Groups of things that belong together, such as tensors that share a scale: disjoint sets that are joined."""

from __future__ import annotations

from typing import Generic, TypeVar

Member = TypeVar("Member")


class Groups(Generic[Member]):
    """Everything is a group of its own until it is joined with something else."""

    def __init__(self) -> None:
        self._next: dict[Member, Member] = {}

    def leader(self, member: Member) -> Member:
        """Return the one that stands for the member's group."""
        while member in self._next:
            member = self._next[member]
        return member

    def join(self, first: Member, second: Member) -> None:
        """Make one group of two; the leader of the first one's leads it."""
        leader, other = self.leader(first), self.leader(second)
        if leader != other:
            self._next[other] = leader
