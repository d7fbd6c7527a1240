"""Features on disk: shards of many entries, their index, their budget, and what damage does to them."""

import os
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from omnigrpo.media import shard_writer
from omnigrpo.media.feature_cache import FeatureCache, feature_key
from omnigrpo.schema import ClipFeatures

BUDGET_BYTES = 96 * 1024
"""Eight shards of three entries each."""
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def key(number: int) -> str:
    return feature_key(str(number), "recipe")


def features(number: int) -> ClipFeatures:
    """As in kill_puts.py, which processes of their own run."""
    generator = torch.Generator().manual_seed(number)
    return ClipFeatures(
        vision_FND=torch.randn(4, 9, 16, generator=generator).to(torch.bfloat16),
        audio_AD=torch.randn(20, 32, generator=generator).to(torch.bfloat16),
    )


def same(left: ClipFeatures, right: ClipFeatures) -> bool:
    """Whether both hold the same bits in both modalities."""
    pairs = ((left.vision_FND, right.vision_FND), (left.audio_AD, right.audio_AD))
    return all(a is not None and b is not None and a.dtype == b.dtype and a.equal(b) for a, b in pairs)


def open_cache(directory: Path, budget_bytes: int = BUDGET_BYTES) -> FeatureCache:
    """A cache that keeps nothing in memory."""
    return FeatureCache(directory, 0, budget_bytes)


def fill(directory: Path, count: int, budget_bytes: int = BUDGET_BYTES) -> None:
    """Put entries 0, 1, ... and leave."""
    cache = open_cache(directory, budget_bytes)
    for number in range(count):
        cache.put(key(number), features(number))
    cache.close()


def found(cache: FeatureCache, count: int) -> list[int]:
    """Which of the entries 0, 1, ... are there; one that is not what was put fails."""
    present = []
    for number in range(count):
        hit, expected = cache.get(key(number)), features(number)
        if hit is not None:
            assert same(hit, expected)
            present.append(number)
    return present


def files(directory: Path, suffix: str) -> list[Path]:
    return sorted(directory.glob(f"*{suffix}"))


def only(directory: Path, suffix: str) -> Path:
    (path,) = files(directory, suffix)
    return path


def change_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)


def test_a_shard_is_a_safetensors_file(tmp_path: Path):
    cache = open_cache(tmp_path)
    for number in range(3):
        cache.put(key(number), features(number))
        with safe_open(only(tmp_path, ".safetensors"), framework="pt") as file:
            assert len(list(file.keys())) == 2 * (number + 1)
            for member in range(number + 1):
                tensor = file.get_tensor(f"{key(member)}.vision_FND")
                assert tensor.dtype == torch.bfloat16
                assert tensor.equal(features(member).vision_FND)
                assert file.get_tensor(f"{key(member)}.audio_AD").equal(features(member).audio_AD)


def test_a_full_shard_is_followed_by_another(tmp_path: Path):
    fill(tmp_path, 7)
    sizes = [path.stat().st_size for path in files(tmp_path, ".safetensors")]
    assert len(sizes) == 3
    assert max(sizes) <= BUDGET_BYTES // 8
    assert found(open_cache(tmp_path), 7) == list(range(7))


def test_a_header_without_room_ends_a_shard_too(tmp_path: Path):
    """Entries so small that the header is full before the data are much."""
    cache = open_cache(tmp_path, 2**20)
    small = ClipFeatures(vision_FND=None, audio_AD=torch.ones(2, 2))
    for number in range(40):
        cache.put(key(number), small)
    assert len(files(tmp_path, ".safetensors")) > 1
    for path in files(tmp_path, ".safetensors"):
        with safe_open(path, framework="pt") as file:
            assert len(list(file.keys())) > 5
    again = open_cache(tmp_path, 2**20)
    assert all(again.get(key(number)) is not None for number in range(40))


def test_tensors_of_several_dtypes_stay_aligned(tmp_path: Path):
    odd = ClipFeatures(
        vision_FND=torch.arange(3, dtype=torch.bfloat16).reshape(1, 1, 3), audio_AD=torch.arange(5.0)[None]
    )
    cache = open_cache(tmp_path)
    for number in range(3):
        cache.put(key(number), odd)
    for number in range(3):
        hit = open_cache(tmp_path).get(key(number))
        assert hit is not None
        assert same(hit, odd)


def test_a_later_writer_goes_on_with_the_shard(tmp_path: Path):
    fill(tmp_path, 1)
    cache = open_cache(tmp_path)
    cache.put(key(1), features(1))
    assert len(files(tmp_path, ".safetensors")) == 1
    assert found(open_cache(tmp_path), 2) == [0, 1]


def test_writers_at_the_same_time_have_shards_of_their_own_and_see_each_other(tmp_path: Path):
    one, other = open_cache(tmp_path), open_cache(tmp_path)
    one.put(key(0), features(0))
    other.put(key(1), features(1))
    one.put(key(2), features(2))
    assert len(files(tmp_path, ".safetensors")) == 2
    assert found(one, 3) == found(other, 3) == [0, 1, 2]


def test_another_process_fills_what_this_one_reads(tmp_path: Path):
    """Real processes: four writers at once, and a reader that was there before them."""
    reader = open_cache(tmp_path, 2**24)
    assert found(reader, 40) == []
    script = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from kill_puts import features, key
        from omnigrpo.media.feature_cache import FeatureCache, feature_key

        cache = FeatureCache(Path(sys.argv[2]), 0, 2**24)
        for number in range(int(sys.argv[3]), 40, 4):
            cache.put(key(number), features(number))
    """
    here = str(Path(__file__).parent)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), here, str(tmp_path), str(rank)], env=ENVIRONMENT
        )
        for rank in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert found(reader, 40) == list(range(40))
    assert reader.stats.damaged == 0


def test_the_least_recently_used_shards_leave(tmp_path: Path):
    fill(tmp_path, 18)
    cache = open_cache(tmp_path)
    assert found(cache, 3) == [0, 1, 2]
    for number in range(18, 30):
        cache.put(key(number), features(number))
        assert cache.disk_bytes <= BUDGET_BYTES
    assert cache.stats.shard_evictions >= 2
    left = found(cache, 30)
    assert {0, 1, 2, *range(18, 30)} <= set(left)
    assert not {3, 4, 5} & set(left)
    assert found(open_cache(tmp_path), 30) == left
    assert cache.stats.damaged == 0


def test_a_reader_survives_the_eviction_of_what_it_knows(tmp_path: Path):
    fill(tmp_path, 6)
    reader, writer = open_cache(tmp_path), open_cache(tmp_path)
    assert found(reader, 6) == list(range(6))
    for number in range(6, 40):
        writer.put(key(number), features(number))
    left = found(reader, 40)
    assert 0 not in left
    assert 39 in left
    assert reader.stats.damaged == 0


def test_shards_that_are_being_written_are_not_evicted(tmp_path: Path):
    """Nine writers do not fit; the ninth keeps to the budget and says so."""
    writers = [open_cache(tmp_path, 40_000) for _ in range(9)]
    for number, writer in enumerate(writers):
        writer.put(key(number), features(number))
    refused = [writer.stats.refused for writer in writers]
    assert sum(refused) > 0
    assert writers[0].disk_bytes <= 40_000
    left = found(open_cache(tmp_path, 40_000), 9)
    assert left == [number for number, no in enumerate(refused) if not no]
    for writer in writers:
        writer.close()
    writers[-1].put(key(8), features(8))
    assert writers[-1].get(key(8)) is not None


def test_an_entry_larger_than_the_budget_is_not_written(tmp_path: Path):
    cache = FeatureCache(tmp_path, 2**20, 4096)
    cache.put(key(0), features(0))
    assert cache.stats.refused == 1
    assert cache.disk_bytes == 0
    assert found(cache, 1) == [0]


def test_a_damaged_entry_is_dropped_for_good_and_rebuilt(tmp_path: Path):
    fill(tmp_path, 3)
    shard = only(tmp_path, ".safetensors")
    change_byte(shard, shard.stat().st_size - 5)
    cache = open_cache(tmp_path)
    assert found(cache, 3) == [0, 1]
    assert (cache.stats.damaged, cache.stats.misses) == (1, 1)
    after = open_cache(tmp_path)
    assert found(after, 3) == [0, 1]
    assert after.stats.damaged == 0
    after.put(key(2), features(2))
    assert found(open_cache(tmp_path), 3) == [0, 1, 2]


def test_a_damaged_entry_of_the_shard_being_written_is_rebuilt_too(tmp_path: Path):
    cache = open_cache(tmp_path)
    cache.put(key(0), features(0))
    shard = only(tmp_path, ".safetensors")
    with shard.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x00\x01\x02\x03\x04")
    assert cache.get(key(0)) is None
    cache.put(key(0), features(0))
    assert found(cache, 1) == found(open_cache(tmp_path), 1) == [0]
    assert cache.stats.damaged == 1


def _cut_in_half(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size * 3 // 5)


def _empty(shard: Path) -> None:
    shard.write_bytes(b"")


def _write_a_foreign_file(shard: Path) -> None:
    from safetensors.torch import save_file

    save_file({"vision_FND": torch.zeros(3000)}, shard)


def _swap_entries(shard: Path) -> None:
    content = shard.read_bytes()
    size = 2432
    shard.write_bytes(content[: -2 * size] + content[-size:] + content[-2 * size : -size])


@pytest.mark.parametrize(
    ("damage", "left"),
    [(_cut_in_half, [0]), (_empty, []), (_write_a_foreign_file, []), (_swap_entries, [0])],
)
def test_damage_to_a_shard_costs_the_entries_it_hits(
    tmp_path: Path, damage: Callable[[Path], None], left: list[int]
):
    fill(tmp_path, 3)
    damage(only(tmp_path, ".safetensors"))
    cache = open_cache(tmp_path)
    assert found(cache, 3) == left
    assert cache.stats.damaged == 3 - len(left)
    for number in range(3):
        cache.put(key(number), features(number))
    assert found(open_cache(tmp_path), 3) == [0, 1, 2]


def test_a_journal_is_rebuilt_from_the_shard_wherever_it_is_damaged(tmp_path: Path):
    fill(tmp_path / "whole", 3)
    journal = only(tmp_path / "whole", ".journal")
    content = journal.read_bytes()
    for at in range(0, len(content) - 1, 7):
        change_byte(journal, at)
        cache = open_cache(tmp_path / "whole")
        assert found(cache, 3) == [0, 1, 2], at
        assert cache.stats.damaged == 0
        assert len(journal.read_bytes()) == len(content)


def test_a_lost_journal_is_rebuilt_from_the_shard(tmp_path: Path):
    fill(tmp_path, 3)
    only(tmp_path, ".journal").unlink()
    assert found(open_cache(tmp_path), 3) == [0, 1, 2]
    assert only(tmp_path, ".journal").stat().st_size > 0


def test_a_journal_that_was_cut_serves_what_it_names(tmp_path: Path):
    fill(tmp_path, 3)
    journal = only(tmp_path, ".journal")
    content = journal.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", content)]
    for size in range(0, len(content), 5):
        journal.write_bytes(content[:size])
        cache = open_cache(tmp_path)
        assert found(cache, 3) == list(range(sum(end <= size for end in ends)))
        assert cache.stats.damaged == 0
        assert journal.read_bytes() == content[:size]


def test_a_damaged_header_costs_nothing_while_the_journal_is_sound(tmp_path: Path):
    fill(tmp_path, 3)
    shard = only(tmp_path, ".safetensors")
    for at in (0, 9, 40, 200):
        change_byte(shard, at)
    assert found(open_cache(tmp_path), 3) == [0, 1, 2]


def test_a_damaged_header_and_journal_leave_the_sound_lines(tmp_path: Path):
    fill(tmp_path, 3)
    change_byte(only(tmp_path, ".safetensors"), 12)
    change_byte(only(tmp_path, ".journal"), 30)
    cache = open_cache(tmp_path)
    assert found(cache, 3) == [1, 2]
    cache.put(key(0), features(0))
    assert found(open_cache(tmp_path), 3) == [0, 1, 2]


def test_random_damage_never_serves_wrong_features(tmp_path: Path):
    """Bytes changed, removed and inserted anywhere in any file; what is left is right, and can be filled up again."""
    generator = random.Random(0)
    for _ in range(60):
        for path in tmp_path.iterdir():
            path.unlink()
        fill(tmp_path, 7)
        for path in generator.sample(sorted(tmp_path.iterdir()), k=2):
            content = bytearray(path.read_bytes())
            at = generator.randrange(min(len(content), 6000))
            how = generator.randrange(3)
            content[at : at + (how != 2) * generator.randrange(1, 40)] = generator.randbytes(40 * (how != 1))
            path.write_bytes(content)
        cache = open_cache(tmp_path)
        for number in sorted(set(range(7)) - set(found(cache, 7))):
            cache.put(key(number), features(number))
        assert found(open_cache(tmp_path), 7) == list(range(7))


def test_a_disk_without_space_is_an_error_and_leaves_the_cache_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = open_cache(tmp_path)
    cache.put(key(0), features(0))
    before = {path: path.stat().st_size for path in tmp_path.iterdir()}
    original = os.pwrite

    def no_space(handle: int, content: memoryview, position: int) -> int:
        if position > 4096:
            original(handle, content[:100], position)
            raise OSError(28, "No space left on device")
        return original(handle, content, position)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.os, "pwrite", no_space)
        with pytest.raises(OSError, match="No space left"):
            cache.put(key(1), features(1))
    assert found(cache, 2) == [0]
    cache.put(key(1), features(1))
    assert found(open_cache(tmp_path), 2) == [0, 1]
    assert set(tmp_path.iterdir()) == set(before)


def test_a_directory_that_was_emptied_is_filled_again(tmp_path: Path):
    cache = open_cache(tmp_path)
    cache.put(key(0), features(0))
    for path in tmp_path.iterdir():
        path.unlink()
    assert found(cache, 1) == []
    assert cache.stats.damaged == 0
    cache.put(key(0), features(0))
    assert found(open_cache(tmp_path), 1) == [0]


@pytest.mark.parametrize("mode", ["calls", "times"])
def test_a_kill_at_any_moment_leaves_entries_whole_or_absent(mode: str, tmp_path: Path):
    """SIGKILL before, after and half way through each call that touches the disk, and at 60 random moments."""
    script = Path(__file__).with_name("kill_puts.py")
    result = subprocess.run(
        [sys.executable, str(script), mode, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.match(r"survived \d{2,} kills", result.stdout), result.stdout
    print(result.stdout)
