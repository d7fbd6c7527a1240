"""Memory of frames: lent once at a time, taken again when the last reader is gone, and never more than the limit."""

import threading

import torch

from omnigrpo.media.frame_memory import FrameMemory


def test_memory_comes_back_with_the_last_tensor_that_shares_it():
    memory = FrameMemory()
    first = memory.empty(2, 3, 4)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((2, 3, 4), torch.uint8, True)
    place, part = first.data_ptr(), first[1]
    del first
    other = memory.empty(2, 3, 4)
    assert other.data_ptr() != place
    assert memory.free_bytes == 0
    del part
    assert memory.free_bytes == 24
    again = memory.empty(24)
    assert again.data_ptr() == place
    assert memory.free_bytes == 0


def test_smaller_frames_take_a_block_of_up_to_twice_their_size():
    memory = FrameMemory()
    place = (block := memory.empty(100)).data_ptr()
    del block
    half = memory.empty(50)
    assert half.data_ptr() == place
    del half
    tiny = memory.empty(49)
    assert tiny.data_ptr() != place
    assert memory.empty(101).data_ptr() != place


def test_what_comes_back_above_the_limit_is_freed_the_oldest_first():
    memory = FrameMemory(kept_bytes=250)
    blocks = [memory.empty(100) for _ in range(4)]
    places = [block.data_ptr() for block in blocks]
    while blocks:
        blocks.pop(0)
    assert memory.free_bytes == 200
    taken = [memory.empty(100), memory.empty(100)]
    assert [block.data_ptr() for block in taken] == [places[3], places[2]]
    del taken
    FrameMemory(kept_bytes=0).empty(10)
    assert memory.free_bytes == 200


def test_a_block_above_the_limit_drives_out_no_other():
    memory = FrameMemory(kept_bytes=250)
    small, large = memory.empty(200), memory.empty(300)
    del small, large
    assert memory.free_bytes == 200


def test_nothing_is_kept_without_a_limit():
    memory = FrameMemory(kept_bytes=0)
    memory.empty(10)
    assert memory.free_bytes == 0


def test_threads_never_share_memory():
    memory, wrong = FrameMemory(), []

    def write(number: int) -> None:
        for _ in range(300):
            block = memory.empty(1000)
            block.fill_(number)
            if not (block == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert memory.free_bytes <= 6 * 2 * 1000  # A thread takes the next block before it lets go of the last.
