"""Which replicas there are: those that take part in a center's exchanges now."""

from dataclasses import dataclass

from typing_extensions import Self

__all__ = ["Membership"]


@dataclass(frozen=True)
class Membership:
    """The replicas of a center, as one of them sees them.

    Code that needs the number of replicas reads it from here at each exchange and does not keep it, because a center
    may have other replicas by the next exchange. With today's transports the replicas are constant.

    Attributes:
        replicas: a name of each, which stays the same as long as it takes part. Its place is the replica's index.
        mine: index of this one.
        generation: a number that grows whenever ``replicas`` changes.

    Raises:
        ValueError: two have the same name, or this one is none of them.
    """

    replicas: tuple[str, ...]
    mine: int
    generation: int = 0

    def __post_init__(self) -> None:
        if len(set(self.replicas)) < len(self.replicas):
            raise ValueError(f"Membership(replicas={self.replicas!r}): each must have a name of its own")
        if not 0 <= self.mine < len(self.replicas):
            raise ValueError(f"Membership(mine={self.mine!r}): must be at least 0 and below {len(self.replicas)}")

    @classmethod
    def constant(cls, *, replica: int, num_replicas: int) -> Self:
        """Returns the membership of a center that always has the same replicas, named by their numbers."""
        return cls(tuple(map(str, range(num_replicas))), replica)

    @property
    def size(self) -> int:
        """How many replicas there are."""
        return len(self.replicas)

    def changed(self, *, joined: tuple[str, ...] = (), left: tuple[str, ...] = ()) -> Self:
        """Returns the membership after some have joined and some have left, of the next generation.

        Those that stay keep their order; those that join come last.

        Raises:
            ValueError: one that joins is there, one that leaves is not, or it is this one.
        """
        if not set(left) <= set(self.replicas):
            raise ValueError(f"Membership.changed(left={left!r}): must be among {self.replicas!r}")
        own = self.replicas[self.mine]
        if own in left:
            raise ValueError(f"Membership.changed(left={left!r}): this replica, {own!r}, cannot be without itself")
        replicas = (*(name for name in self.replicas if name not in left), *joined)
        return type(self)(replicas, replicas.index(own), self.generation + 1)
