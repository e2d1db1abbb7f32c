"""A record is what the standard decorator would have made, but for the time it takes."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any, Generic, TypeVar

import pytest

from protocol.record import record

T = TypeVar("T")


@record(frozen=True, slots=True, kw_only=True)
class Ours:
    """Has one of everything."""

    required: int
    defaulted: str = "x"
    made: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.required < 0:
            raise ValueError("negative")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Theirs:
    """The model."""

    required: int
    defaulted: str = "x"
    made: list[int] = dataclasses.field(default_factory=list)


@record(frozen=True, slots=True)
class Pair(Generic[T]):
    """Positional, generic and hashable."""

    left: T
    right: int = 7


@record(frozen=True, slots=True, kw_only=True)
class Nothing:
    """Has no fields."""


@record(frozen=True, slots=True, kw_only=True)
class Styled:
    """Keeps what it defines itself."""

    value: int

    def __repr__(self) -> str:
        return "styled"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


def test_init_takes_what_the_standard_one_takes() -> None:
    ours, theirs = Ours(required=1), Theirs(required=1)
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs) == {"required": 1, "defaulted": "x", "made": []}
    assert Ours(required=1).made is not ours.made
    for make in (Ours, Theirs):
        untyped: Any = make
        for arguments, named in (((), {}), ((1,), {}), ((), {"required": 1, "unknown": 2})):
            with pytest.raises(TypeError):
                untyped(*arguments, **named)
    assert (Pair(1).right, Pair(1, 2).right, Pair(left=1, right=3).right) == (7, 2, 3)


def test_post_init_checks() -> None:
    with pytest.raises(ValueError, match="negative"):
        Ours(required=-1)
    with pytest.raises(ValueError, match="negative"):
        dataclasses.replace(Ours(required=1), required=-1)


def test_it_is_a_dataclass() -> None:
    assert dataclasses.is_dataclass(Ours)
    assert [field.name for field in dataclasses.fields(Ours)] == ["required", "defaulted", "made"]
    assert dataclasses.replace(Ours(required=1), defaulted="y") == Ours(required=1, defaulted="y")
    assert Pair.__match_args__ == ("left", "right")


def test_equality_and_hash_go_by_class_and_fields() -> None:
    assert Ours(required=1) == Ours(required=1) != Ours(required=2)
    theirs: object = Theirs(required=1)
    assert Ours(required=1) != theirs
    assert Nothing() == Nothing()
    assert len({Pair(1), Pair(1), Pair(2), Nothing(), Nothing()}) == 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(Ours(required=1))


def test_repr_is_the_standard_one() -> None:
    assert repr(Ours(required=1)) == repr(Theirs(required=1)).replace("Theirs", "Ours")
    assert repr(Nothing()) == "Nothing()"


@pytest.mark.parametrize("made", [Ours(required=1), Pair(1), Nothing()])
def test_it_cannot_be_changed(made: object) -> None:
    for name in ("required", "left", "new"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"assign to field '{name}'"):
            setattr(made, name, 2)
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"delete field '{name}'"):
            delattr(made, name)
    assert not hasattr(made, "__dict__")


@pytest.mark.parametrize("made", [Ours(required=1, made=[2]), Pair(1), Nothing()])
def test_it_can_be_copied_and_pickled(made: object) -> None:
    assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made


def test_own_methods_are_kept() -> None:
    assert repr(Styled(value=1)) == "styled"
    assert Styled(value=1) == Styled(value=2)
    assert hash(Styled(value=2)) == 1
