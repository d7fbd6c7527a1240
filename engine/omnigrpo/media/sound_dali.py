"""Sound files by DALI's audio decoder, at their own rate; swresample resamples them, as it does all sound.

For files of sound alone in WAV, FLAC and Ogg Vorbis, of one or two channels. What else DALI could read is left to
FFmpeg: of Opus it gives the rate that the file names as its source's, 24 kHz say, where the codec itself runs at
48 kHz, so the waveform would be another one; and more than two channels are not in one order everywhere.
"""

from io import BufferedReader
from itertools import pairwise

import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.error import FFmpegError
from torch import Tensor

from omnigrpo.media.clip_error import Deadline
from omnigrpo.media.decode_dali import DaliFailure, dali_decoder
from omnigrpo.media.sound import place, resampled
from omnigrpo.media.tracks import Track, Window

_CODECS = {
    "wav": frozenset(("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le")),
    "flac": frozenset(("flac",)),
    "ogg": frozenset(("vorbis", "flac")),
}
"""What is decoded of each container, by FFmpeg's names."""
_MAX_BYTES = 64 * 2**20
"""Of compressed sound; DALI does not look at the deadline on the way."""
_LENGTH_SECONDS = 0.05
"""Most that the length of DALI's sound may differ from the packets': a header may count other samples than there are,
and of chained files DALI reads the first."""
_LAYOUTS = {1: "mono", 2: "stereo"}


def is_for_dali(track: Track[AudioStream], window: Window) -> bool:
    """Whether DALI is asked for this file's sound: it reads all of a file, so not for a window, nor of a huge one."""
    if (window.start_seconds, window.end_seconds) != (None, None):
        return False
    if sum(packet.size for packet in track.packets) > _MAX_BYTES:
        return False
    stream = track.stream
    container, codec = stream.container, stream.codec_context
    codecs = _CODECS.get(container.format.name, frozenset())
    is_alone = len(container.streams) == 1
    return is_alone and codec.codec.canonical_name in codecs and codec.channels in _LAYOUTS


def decode_waveform_by_dali(
    file: BufferedReader, track: Track[AudioStream], window: Window, sample_rate_hz: int, deadline: Deadline
) -> Tensor | DaliFailure:
    """As ``decode_waveform``, of a whole file that is for DALI; equal to it within 1e-4.

    Raises ClipError as ``place``, and TIMEOUT.
    """
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    with dali_decoder(torch.device("cpu"), 1) as decoder:
        sound = decoder.decode_sound(content)
    deadline.check()
    if isinstance(sound, DaliFailure):
        return sound
    codec = track.stream.codec_context
    expected = (codec.sample_rate, codec.channels)
    got = (sound.sample_rate_hz, sound.samples_TC.shape[1])
    if got != expected:
        return DaliFailure(
            reason=f"it reads {got[1]} channels at {got[0]} Hz, FFmpeg {expected[1]} at {expected[0]}"
        )
    misfit = _misfit(track, len(sound.samples_TC) / sound.sample_rate_hz)
    if misfit is not None:
        return DaliFailure(reason=misfit)
    frame = AudioFrame.from_ndarray(
        np.ascontiguousarray(sound.samples_TC.T), format="fltp", layout=_LAYOUTS[codec.channels]
    )
    frame.sample_rate = sound.sample_rate_hz
    try:
        start_seconds = _first_sound_seconds(track)
    except FFmpegError as error:
        return DaliFailure(reason=f"FFmpeg does not decode its first sound: {error.strerror}")
    return place([resampled([frame], start_seconds, sample_rate_hz)], window, sample_rate_hz)


def _misfit(track: Track[AudioStream], seconds: float) -> str | None:
    """Why sound of this length is not that of the packets; None if it is."""
    stamps = [packet.pts for packet in track.packets if packet.pts is not None]
    if any(later < earlier for earlier, later in pairwise(stamps)):
        return "its time stamps go back"
    expected = float(sum(packet.duration or 0 for packet in track.packets) * track.time_base)
    if abs(seconds - expected) > _LENGTH_SECONDS:
        return f"it reads {seconds:.2f} s of sound, the packets hold {expected:.2f} s"
    return None


def _first_sound_seconds(track: Track[AudioStream]) -> float:
    """Container time of the first sample; of Vorbis it is not the first packet's, which gives none."""
    times = (frame.time for packet in track.packets for frame in track.stream.decode(packet))
    first = next(times, None)
    track.stream.codec_context.flush_buffers()
    return (track.start_seconds or 0.0) if first is None else first
