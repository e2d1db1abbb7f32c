"""The registry of state kinds: sections in and out, and what versions promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from protocol import sections, state
from protocol.codec import encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.messages import StateSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Lamp:
    watts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewerLamp:
    watts: int
    colour: str = "white"


@pytest.fixture(autouse=True)
def lamp_kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in list(state.KINDS):
        monkeypatch.delitem(state.KINDS, kind)
    monkeypatch.setitem(state.KINDS, "lamp", None)  # Gone again afterwards.
    del state.KINDS["lamp"]
    state.register("lamp", Lamp, version_id=2, minimum_version_id=1)
    yield


def section(*, version: int = 2, minimum: int = 1, required: bool = True) -> StateSection:
    return StateSection(
        kind="lamp",
        version_id=version,
        minimum_version_id=minimum,
        required=required,
        owner_id=1,
        body=encode(NewerLamp(watts=5) if version > 2 else Lamp(watts=5)),
    )


def test_section_survives() -> None:
    made = sections.encode_section("lamp", 7, Lamp(watts=5))
    assert (made.kind, made.owner_id, made.version_id, made.required) == ("lamp", 7, 2, True)
    assert sections.decode_section(made) == Lamp(watts=5)
    assert sections.decode_section_as(Lamp, made).watts == 5


def test_kind_object_is_as_good_as_its_name() -> None:
    assert sections.encode_section(state.KINDS["lamp"], 1, Lamp(watts=5)) == section()


@pytest.mark.parametrize("required", [True, False])
def test_unknown_kind_fails_only_when_it_is_required(required: bool) -> None:
    unknown = replace(section(required=required), kind="heater")
    if required:
        with pytest.raises(RemoteProtocolError, match="required section 'heater': unknown kind"):
            sections.decode_section(unknown)
    else:
        assert sections.decode_section(unknown) is None


def test_older_section_is_read() -> None:
    assert sections.decode_section(section(version=1)) == Lamp(watts=5)


def test_newer_section_is_read_when_it_says_older_readers_may() -> None:
    assert sections.decode_section(section(version=3, minimum=2)) == Lamp(watts=5)


@pytest.mark.parametrize("required", [True, False])
def test_newer_section_that_needs_a_newer_reader_is_refused(required: bool) -> None:
    newer = section(version=4, minimum=3, required=required)
    if required:
        with pytest.raises(RemoteProtocolError, match="'lamp': version 4 needs a reader of"):
            sections.decode_section(newer)
    else:
        assert sections.decode_section(newer) is None


def test_section_of_this_version_must_fit_exactly() -> None:
    extra = replace(section(), body=encode(NewerLamp(watts=5)))
    with pytest.raises(RemoteProtocolError, match="colour"):
        sections.decode_section(extra)


def test_malformed_section_fails_even_when_it_is_optional() -> None:
    with pytest.raises(RemoteProtocolError):
        sections.decode_section(replace(section(required=False), body=b"\xc1"))


def test_section_of_another_kind_than_expected_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="holds Lamp instead of NewerLamp"):
        sections.decode_section_as(NewerLamp, section())


def test_unregistered_kind_or_other_object_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError):
        sections.encode_section("heater", 1, Lamp(watts=5))
    with pytest.raises(LocalProtocolError):
        sections.encode_section("lamp", 1, NewerLamp(watts=5))


def test_kind_is_registered_once() -> None:
    state.register("lamp", Lamp, version_id=2, minimum_version_id=1)
    with pytest.raises(ValueError, match="already registered"):
        state.register("lamp", NewerLamp)


def test_section_of_a_version_that_is_read_no_more_is_refused_by_name() -> None:
    state.KINDS.clear()
    state.register("lamp", Lamp, version_id=2, minimum_version_id=2, oldest_version_id=2)
    with pytest.raises(RemoteProtocolError, match="'lamp': version 1 is of an older Ferry"):
        sections.decode_section(section(version=1, minimum=1))
