"""The book of digests: what was delivered, and what differs from it."""

from __future__ import annotations

import random
from array import array

from agent.ranges import RangeSet
from agent.tracker.content import BLOCK_PAGES, Book, page_digests

PAGE = 4096


def content(*values: int) -> memoryview:
    return memoryview(b"".join(bytes([value]) * PAGE for value in values))


def pages(*numbers: int) -> RangeSet:
    return RangeSet.of((number * PAGE, (number + 1) * PAGE) for number in numbers)


def test_digest_is_of_each_page() -> None:
    first, second, third = page_digests(content(1, 2, 1))
    assert first == third != second


def test_what_was_never_delivered_differs() -> None:
    assert Book().differing(pages(3, 4).pairs, content(0, 0)) == pages(3, 4)


def test_what_was_delivered_alike_does_not_differ() -> None:
    book = Book()
    book.deliver(pages(3, 4, 9).pairs, content(1, 2, 3))
    assert not book.differing(pages(3, 4, 9).pairs, content(1, 2, 3))
    assert book.differing(pages(4, 9).pairs, content(2, 4)) == pages(9)
    assert book.held == pages(3, 4, 9)


def test_runs_across_blocks_are_joined() -> None:
    first = BLOCK_PAGES - 1
    assert Book().differing(pages(first, first + 1).pairs, content(1, 1)).nr_ranges == 1


def test_distrusted_pages_differ_and_are_held() -> None:
    book = Book()
    book.deliver(pages(1, 2).pairs, content(1, 2))
    book.distrust(pages(2, 3))
    assert book.differing(pages(1, 2).pairs, content(1, 2)) == pages(2)
    assert book.held == pages(1, 2)


def test_dropped_pages_are_neither_known_nor_held() -> None:
    book = Book()
    book.deliver(pages(1, 2).pairs, content(1, 2))
    book.drop(pages(2, 700))
    assert book.held == pages(1)
    assert book.differing(pages(1, 2).pairs, content(1, 2)) == pages(2)


def test_memory_of_dropped_blocks_is_given_back() -> None:
    book = Book()
    book.deliver(array("Q", (0, 100 * BLOCK_PAGES * PAGE)), memoryview(bytes(100 * BLOCK_PAGES * PAGE)))
    book.drop(RangeSet((0, 99 * BLOCK_PAGES * PAGE)))
    assert len(book._blocks) == 1


def test_book_is_a_dictionary_of_pages() -> None:
    # Against the obvious model.
    chance = random.Random(1)
    book, model = Book(), dict[int, int]()
    for _ in range(300):
        numbers = sorted(chance.sample(range(4 * BLOCK_PAGES), chance.randint(1, 40)))
        values = [chance.randrange(3) for _ in numbers]
        action = chance.randrange(4)
        if action == 0:
            book.deliver(pages(*numbers).pairs, content(*values))
            model.update(zip(numbers, values))
        elif action == 1:
            book.drop(pages(*numbers))
            for number in numbers:
                model.pop(number, None)
        elif action == 2:
            book.distrust(pages(*numbers))
            model.update({number: -1 for number in numbers if number in model})
        else:
            expected = pages(*(n for n, v in zip(numbers, values) if model.get(n, -1) != v))
            assert book.differing(pages(*numbers).pairs, content(*values)) == expected
        assert book.held == pages(*model)
