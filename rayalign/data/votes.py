"""What annotators said of one answer, as votes: how many of them chose each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]  # ratings from … to …


@dataclass(frozen=True)
class Classes:
    """The classes that votes are for.

    Attributes:
        names: in the order of the votes; empty: whatever the rows have.
        ratings: for each class the lowest and the highest rating that is a vote for it; none: each whole number from
            the lowest to the highest rating of the data is a class.
    """

    names: tuple[str, ...] = ()
    ratings: tuple[Range, ...] | None = None

    def place_of(self, rating: int) -> int | None:
        """The class of a rating; None for one that is in no range."""
        return next((place for place, (low, high) in enumerate(self.ratings or ()) if low <= rating <= high), None)

    def counted(self, ratings: Sequence[int]) -> tuple[float, ...]:
        """Votes for each class, by ranges that hold each of the ratings."""
        places = [self.place_of(rating) for rating in ratings]
        return tuple(float(places.count(place)) for place in range(len(self.ratings or ())))

    @property
    def in_words(self) -> str:
        return ", ".join(self.names)


ANY = Classes()
