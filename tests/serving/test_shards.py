"""The arithmetic of the table of shards."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual_transformers_tf.serving.shards import (
    SHARDS,
    ServerAddress,
    ShardTable,
    epoch_after,
    shard_of,
)


def addresses(names):
    return {name: ServerAddress(f"{name}:1", f"{name}:2") for name in names}


def moved(before, after):
    return sum(a != b for a, b in zip(before.shards, after.shards, strict=True))


def test_the_shard_of_a_name_is_its_crc32():
    # CRC-32's check value, and what tests/cc checks the server with.
    assert shard_of("123456789") == 0xCBF43926 % 256
    assert shard_of("") == 0
    assert shard_of("ä") == shard_of("ä")
    counts = Counter(shard_of(str(i)) for i in range(10_000))
    assert len(counts) == SHARDS
    assert (min(counts.values()), max(counts.values())) == (33, 44)


def test_a_table_is_the_same_after_json():
    table = ShardTable.empty().next(addresses(["a", "b"]))
    sent = {**table.to_json(), "self": "a"}
    assert ShardTable.of_json(sent) == table
    assert ShardTable.of_json(json.dumps(sent).encode()) == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": None}, "cannot be read"),
        ({"servers": {"a": {}}}, "'grpc'"),
        ({"shards": ["a"] * 255}, "a table of 255 shards, expected 256"),
        ({"shards": ["a", "z"] * 128}, "with shards of z"),
    ],
)
def test_what_is_no_table_is_refused(change, message):
    table = ShardTable.empty().next(addresses(["a", "b"]))
    with pytest.raises(ValueError, match=message):
        ShardTable.of_json({**table.to_json(), **change})
    with pytest.raises(ValueError, match="cannot be read"):
        ShardTable.of_json(b"no table")


@settings(deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcdefgh"), min_size=1), min_size=1, max_size=6))
def test_tables_are_balanced_and_move_as_little_as_possible(sets):
    table = ShardTable.empty()
    for names in sets:
        after = table.next(addresses(names))
        counts = Counter(after.shards)
        assert set(counts) == names
        assert max(counts.values()) - min(counts.values()) <= 1
        # The largest owners keep what balance lets them keep; everything else has to move.
        before = sorted((table.shards.count(name) for name in names), reverse=True)
        least, larger = divmod(SHARDS, len(names))
        kept = sum(min(n, least + (i < larger)) for i, n in enumerate(before))
        assert moved(table, after) == SHARDS - kept
        table = after


@settings(deadline=None)
@given(
    st.sets(st.sampled_from("abcdefgh"), min_size=1),
    st.sets(st.sampled_from("abcdefgh"), min_size=1),
    st.integers(1, 64),
)
def test_slices_move_no_more_shards_than_one_table(names, others, most):
    table = ShardTable.empty().next(addresses(names))
    everyone = addresses(names | others)
    needed = moved(table, table.next(everyone, owners=others))
    total = 0
    for _ in range(SHARDS):
        after = table.next(everyone, others, most)
        if after.same_but_for_epoch(table):
            break
        assert after.epoch > table.epoch
        if set(table.servers) == set(after.servers):
            assert moved(table, after) <= most
        total += moved(table, after)
        table = after
    assert total == needed
    assert set(table.shards) == others


def test_shards_of_a_lost_server_get_an_owner_at_once():
    table = ShardTable.empty().next(addresses("abc"))
    after = table.next(addresses("ab"), most=0)
    assert None not in after.shards
    assert all(b == a or a == "c" for a, b in zip(table.shards, after.shards, strict=True))
    nobody = table.next({})
    assert set(nobody.shards) == {None}
    assert nobody.owner("a stream") is None


def test_since_says_when_a_shard_changed_its_server():
    table = ShardTable.empty().next(addresses("a"))
    assert set(table.since) == {table.epoch}
    after = table.next(addresses("ab"))
    changed = [n for n, s in zip(after.shards, after.since, strict=True) if s == after.epoch]
    assert changed == ["b"] * 128
    again = after.next(addresses("a"))
    assert again.shards == table.shards
    assert set(again.since) == {table.epoch, again.epoch}


def test_the_epochs_of_a_service_are_above_those_of_one_before():
    assert epoch_after(0, now=1.0009) == 1_000
    assert epoch_after(1_000, now=1.0009) == 1_001  # Two in one millisecond.
    assert epoch_after(1_001, now=0.7) == 1_002  # The clock was set back.
    ended = ShardTable.empty()
    for _ in range(100):
        ended = ended.next(addresses("ab"), now=1)
    assert ShardTable.empty().next(addresses("a"), now=1.2).epoch > ended.epoch
    assert ShardTable.empty().next(addresses("a")).epoch > 1_700_000_000_000


def test_owners_and_their_shards():
    table = ShardTable.empty().next(addresses("ab"))
    assert table.shards_of("a") | table.shards_of("b") == set(range(SHARDS))
    for name in map(str, range(50)):
        assert shard_of(name) in table.shards_of(table.owner(name))
